"""FusedRegAdadelta: torch.optim.Adadelta with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import ROOTS
from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from .spec import Group, Hyperparameter, RuleSpec, Scalar, Scalars, ScalarState, Step, TensorState

# Where eps is 0 nothing has moved yet and nothing will, and the metric would be infinite: a prox that moves nothing.
LARGEST_METRIC = 1e18


def adadelta_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    """Of a step, while ``acc_delta`` is still that of the steps before it."""
    eps = group["eps"]
    return ((state["square_avg"] + eps).sqrt() / (state["acc_delta"] + eps).sqrt()).clamp(max=LARGEST_METRIC)


def adadelta(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Zeiler, "ADADELTA: An Adaptive Learning Rate Method", https://arxiv.org/abs/1212.5701."""
    lr, rho, eps = group["lr"], group["rho"], group["eps"]
    square_avg = rho * state["square_avg"] + (1 - rho) * g * g
    of_gradients, of_steps = (square_avg + eps).sqrt(), (state["acc_delta"] + eps).sqrt()
    delta = of_steps / of_gradients * g
    new_state = {"square_avg": square_avg, "acc_delta": rho * state["acc_delta"] + (1 - rho) * delta * delta}
    d = adadelta_metric({"square_avg": square_avg, "acc_delta": state["acc_delta"]}, scalars.after, group)
    # The floor is a gradient, and d is a gradient over a step.
    return Step(w - lr * delta, new_state, tau=lr, metric=d, safeguard=of_gradients)


class FusedRegAdadelta(FusedRegOptimizer, torch.optim.Adadelta):
    """
    With ``penalty_mode="proximal"`` the prox's metric is the root of the gradients' second moment over that of the
    steps'. Mind that the steps grow: at a solution with a penalty the gradient stands still at the penalty's, so that
    the rule's own step does not fall. It comes to rest as the ``lr`` falls.

    The rule is that of Zeiler, "ADADELTA: An Adaptive Learning Rate Method", https://arxiv.org/abs/1212.5701.
    """

    spec = RuleSpec(
        "adadelta",
        adadelta,
        metric=adadelta_metric,
        states=(TensorState("square_avg", codes=ROOTS), TensorState("acc_delta", codes=ROOTS)),
        scalar_states=(ScalarState("step"),),
        hyperparameters=(Hyperparameter("rho"), Hyperparameter("eps")),
        twin=torch.optim.Adadelta,
        variants={"plain": {}, "maximize": {"maximize": True, "rho": 0.7, "eps": 1e-2}},
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
