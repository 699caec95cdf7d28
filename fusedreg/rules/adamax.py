"""FusedRegAdamax: torch.optim.Adamax with the regularizers in its update pass."""

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


def adamax_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    return state["exp_inf"]


def adamax(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", section 7.1, https://arxiv.org/abs/1412.6980."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * g
    exp_inf = torch.maximum(beta2 * state["exp_inf"], g.abs() + group["eps"])
    new_state = {"exp_avg": exp_avg, "exp_inf": exp_inf}
    d = adamax_metric(new_state, scalars.after, group)
    m_hat = exp_avg / (1 - beta1 ** scalars.after["step"])
    return Step(w - lr * m_hat / d, new_state, tau=lr, metric=d)


class FusedRegAdamax(FusedRegOptimizer, torch.optim.Adamax):
    """
    With ``penalty_mode="proximal"`` the prox's metric is the infinity norm that the step is divided by.

    The rule is that of Kingma and Ba, "Adam: A Method for Stochastic Optimization", section 7.1,
    https://arxiv.org/abs/1412.6980.
    """

    spec = RuleSpec(
        "adamax",
        adamax,
        metric=adamax_metric,
        states=(TensorState("exp_avg", codes=LINEAR), TensorState("exp_inf", codes=ROOTS)),
        scalar_states=(ScalarState("step"),),
        hyperparameters=(Hyperparameter("betas", fields=("beta1", "beta2")), Hyperparameter("eps")),
        twin=torch.optim.Adamax,
        variants={"plain": {}, "maximize": {"maximize": True, "betas": (0.8, 0.9), "eps": 1e-3}},
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
