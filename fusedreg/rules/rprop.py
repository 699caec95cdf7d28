"""FusedRegRprop: torch.optim.Rprop with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from ..penalties.spec import on_host
from .spec import Group, Hyperparameter, RuleSpec, Scalars, ScalarState, Step, TensorState


def rprop(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm"."""
    (etaminus, etaplus), (smallest, largest) = group["etas"], group["step_sizes"]
    product, size = g * state["prev"], state["step_size"]
    size = torch.where(product > 0, size * etaplus, torch.where(product < 0, size * etaminus, size))
    size = size.clamp(smallest, largest)
    g = torch.where(product < 0, torch.zeros_like(g), g)
    direction = torch.where(g.isnan(), g, g.sign())  # torch.sign makes a zero of a NaN
    return Step(w - size * direction, {"prev": g, "step_size": size}, tau=group["lr"])


WHY_NO_CODES = "its step sizes grow and shrink by factors, over more orders of magnitude than a block of codes has"


class FusedRegRprop(FusedRegOptimizer, torch.optim.Rprop):
    """
    For full batches: it goes by the signs of gradients, which the noise of small batches turns. Every weight has a step
    size of its own, which begins at ``lr`` and goes its own way; a later ``lr`` only scales the penalties. A gradient
    that is NaN makes its weight a NaN, which torch's hides.

    The rule is that of Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm", IEEE International Conference on Neural Networks, 1993.
    """

    spec = RuleSpec(
        "rprop",
        rprop,
        states=(
            TensorState("prev", why_no_codes=WHY_NO_CODES),
            TensorState("step_size", initial=lambda group: on_host(group["lr"]), why_no_codes=WHY_NO_CODES),
        ),
        scalar_states=(ScalarState("step"),),
        hyperparameters=(
            Hyperparameter("etas", fields=("etaminus", "etaplus")),
            Hyperparameter("step_sizes", fields=("step_size_min", "step_size_max")),
        ),
        twin=torch.optim.Rprop,
        variants={
            "plain": {},
            "maximize": {"maximize": True, "etas": (0.7, 1.6), "step_sizes": (0.01, 0.05)},
        },
        modes=("decoupled", "subgradient"),
        why_not_others=(
            "its steps go by signs, which have no metric: where a weight has settled, its gradient does not say how "
            "far a step moves it, and no prox could take that back"
        ),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            etas,
            step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
