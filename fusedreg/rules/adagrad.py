"""FusedRegAdagrad: torch.optim.Adagrad with the regularizers in its update pass."""

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


def adagrad_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    return state["sum"].sqrt() + group["eps"]


def adagrad(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Duchi, Hazan and Singer, "Adaptive Subgradient Methods", https://jmlr.org/papers/v12/duchi11a.html."""
    t = scalars.after["step"]
    lr = group["lr"] / (1 + (t - 1) * group["lr_decay"])
    sum_ = state["sum"] + g * g
    d = adagrad_metric({"sum": sum_}, scalars.after, group)
    return Step(w - lr * g / d, {"sum": sum_}, tau=lr, metric=d)


class FusedRegAdagrad(FusedRegOptimizer, torch.optim.Adagrad):
    """
    The rule is that of Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", https://jmlr.org/papers/v12/duchi11a.html.
    """

    spec = RuleSpec(
        "adagrad",
        adagrad,
        metric=adagrad_metric,
        states=(TensorState("sum", initial=lambda group: group["initial_accumulator_value"], codes=ROOTS),),
        scalar_states=(ScalarState("step"),),
        hyperparameters=(
            Hyperparameter("lr_decay"),
            Hyperparameter("eps"),
            Hyperparameter("initial_accumulator_value", fields=()),
        ),
        twin=torch.optim.Adagrad,
        variants={
            "plain": {},
            "lr_decay": {"lr_decay": 0.1, "initial_accumulator_value": 0.3},
            "maximize": {"maximize": True},
        },
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        with torch.device("cpu"):  # or step counts, which torch makes at once, would be on another default device
            super().__init__(
                params,
                lr,
                lr_decay,
                weight_decay,
                initial_accumulator_value,
                eps,
                foreach,
                maximize=maximize,
                differentiable=differentiable,
                fused=fused,
            )
