"""FusedRegAdam and FusedRegAdamW: torch's, with the regularizers in their update pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import LINEAR, ROOTS
from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from .spec import Group, Hyperparameter, RuleSpec, Scalar, Scalars, ScalarState, Step, TensorState


def adam_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    second_moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return second_moment.sqrt() / (1 - group["betas"][1] ** scalars["step"]) ** 0.5 + group["eps"]


def adam(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    t = scalars.after["step"]
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * g
    exp_avg_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    new_state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if group["amsgrad"]:
        new_state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq)
    m_hat = exp_avg / (1 - beta1**t)
    d = adam_metric(new_state, scalars.after, group)
    return Step(w - lr * m_hat / d, new_state, tau=lr, metric=d)


ADAM = RuleSpec(
    "adam",
    adam,
    metric=adam_metric,
    states=(
        TensorState("exp_avg", codes=LINEAR),
        TensorState("exp_avg_sq", codes=ROOTS),
        TensorState("max_exp_avg_sq", needed=lambda group: group["amsgrad"], codes=ROOTS),
    ),
    scalar_states=(ScalarState("step"),),
    hyperparameters=(
        Hyperparameter("betas", fields=("beta1", "beta2")),
        Hyperparameter("eps"),
        Hyperparameter("amsgrad", fields=()),
    ),
    twin=torch.optim.Adam,
    variants={"plain": {}, "amsgrad": {"amsgrad": True}, "maximize": {"maximize": True}},
)


class FusedRegAdam(FusedRegOptimizer, torch.optim.Adam):
    """
    The rule is that of Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = FusedRegAdam(model.parameters(), lr=1e-3, l1=1e-4, max_grad_norm=1.0)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
    """

    spec = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class FusedRegAdamW(FusedRegOptimizer, torch.optim.AdamW):
    """
    Mind that AdamW's own default is ``weight_decay=0.01``, decoupled decay, which acts beside ``l1`` and ``l2``.

    The rule is that of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101.
    """

    spec = dataclasses.replace(ADAM, twin=torch.optim.AdamW)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
