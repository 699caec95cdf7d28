"""FusedRegLion: the sign of a momentum, with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import LINEAR
from ..optimizer import FusedRegOptimizer
from ..penalties import Option, Regularizers
from .spec import Group, Hyperparameter, RuleSpec, Scalars, Step, TensorState


def lion(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", https://arxiv.org/abs/2302.06675, algorithm 2."""
    lr, (beta1, beta2), exp_avg = group["lr"], group["betas"], state["exp_avg"]
    mixed = beta1 * exp_avg + (1 - beta1) * g
    direction = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch.sign makes a zero of a NaN
    return Step(w - lr * direction, {"exp_avg": beta2 * exp_avg + (1 - beta2) * g}, tau=lr)


BETAS = Option(
    "betas",
    (0.9, 0.99),
    "tuple[float, float]",
    """how much of the momentum is in the direction of a step, and how much of it is kept for the next one. Default:
    (0.9, 0.99).""",
    "two numbers in [0, 1)",
    lambda value: (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(each, (int, float)) and 0.0 <= each < 1.0 for each in value)
    ),
)


class FusedRegLion(FusedRegOptimizer):
    """
    The rule is that of Chen et al., "Symbolic Discovery of Optimization Algorithms", https://arxiv.org/abs/2302.06675.
    Every weight moves by ``lr``, whatever the size of its gradient, so that ``lr`` is a third to a tenth of
    AdamW's, and ``weight_decay``, which is decoupled, three to ten times as large.

    A parameter's state is ``exp_avg``, the momentum, of its shape and dtype.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = FusedRegLion(model.parameters(), lr=1e-4, weight_decay=0.1, l1=0.1)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
    """

    spec = RuleSpec(
        "lion",
        lion,
        states=(TensorState("exp_avg", codes=LINEAR),),
        hyperparameters=(Hyperparameter("betas", fields=("beta1", "beta2"), option=BETAS),),
        variants={
            "plain": {},
            "maximize": {"maximize": True, "betas": (0.6, 0.3)},
        },
        modes=("decoupled", "subgradient"),
        why_not_others=(
            "its steps are signs, which have no metric: where a weight has settled, its gradient does not say how far "
            "a step moves it, and no prox could take that back"
        ),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "differentiable": differentiable,
            "decoupled_weight_decay": True,  # as torch's AdamW has it
        }
        super().__init__(params, defaults)
