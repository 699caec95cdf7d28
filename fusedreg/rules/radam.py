"""FusedRegRAdam: torch.optim.RAdam with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import LINEAR, ROOTS
from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from .spec import Group, Hyperparameter, RuleSpec, Scalar, Scalars, ScalarState, Step, TensorState


def length_of_average(t: Scalar, group: Group) -> tuple[Scalar, Scalar]:
    """How many steps the average of squares stands for: in the limit, and after t of them."""
    beta2 = group["betas"][1]
    longest = 2 / (1 - beta2) - 1
    return longest, longest - 2 * t * beta2**t / (1 - beta2**t)


def is_rectified(t: Scalar, group: Group) -> bool:
    """Not in the first steps, which have too few squares to go by: those are gradient descent, with no metric."""
    _, length = length_of_average(t, group)
    return bool(length > 5)


def radam_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    t = scalars["step"]
    if not is_rectified(t, group):
        return torch.ones_like(state["exp_avg_sq"])
    return (state["exp_avg_sq"].sqrt() + group["eps"]) / (1 - group["betas"][1] ** t) ** 0.5


def radam(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", https://arxiv.org/abs/1908.03265."""
    lr, (beta1, beta2), t = group["lr"], group["betas"], scalars.after["step"]
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * g
    exp_avg_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    new_state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    m_hat = exp_avg / (1 - beta1**t)
    d = radam_metric(new_state, scalars.after, group)
    if not is_rectified(t, group):
        return Step(w - lr * m_hat, new_state, lr, metric=d, safeguard=-d)  # below zero, no floor acts
    longest, length = length_of_average(t, group)
    tau = lr * ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    return Step(w - tau * m_hat / d, new_state, tau, metric=d)


class FusedRegRAdam(FusedRegOptimizer, torch.optim.RAdam):
    """
    With ``penalty_mode="proximal"`` the prox follows the step: in the rectified metric, or, in the first steps, which
    are gradient descent, with step size ``lr``.

    The rule is that of Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond",
    https://arxiv.org/abs/1908.03265.
    """

    spec = RuleSpec(
        "radam",
        radam,
        metric=radam_metric,
        states=(TensorState("exp_avg", codes=LINEAR), TensorState("exp_avg_sq", codes=ROOTS)),
        scalar_states=(ScalarState("step"),),
        hyperparameters=(Hyperparameter("betas", fields=("beta1", "beta2")), Hyperparameter("eps")),
        twin=torch.optim.RAdam,
        variants={
            "plain": {},
            "decoupled": {"decoupled_weight_decay": True, "betas": (0.8, 0.9)},
            "maximize": {"maximize": True},
        },
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
