"""FusedRegSGD: torch.optim.SGD with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import LINEAR
from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from .spec import (
    Group,
    Hyperparameter,
    RuleSpec,
    Scalars,
    ScalarState,
    Step,
    TensorState,
    has_momentum,
    next_momentum_gain,
)


def sgd(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """With (Nesterov) momentum and dampening, as torch.optim.SGD has them."""
    lr, momentum, dampening = group["lr"], group["momentum"], group["dampening"]
    if momentum == 0:
        return Step(w - lr * g, {}, tau=lr)
    is_first = scalars.before["momentum_gain"] == 0
    buffer = g if is_first else momentum * state["momentum_buffer"] + (1 - dampening) * g
    gain = scalars.after["momentum_gain"]
    direction, step_gain = (g + momentum * buffer, 1 + momentum * gain) if group["nesterov"] else (buffer, gain)
    # With dampening above 1 the gain can be negative; a prox has no negative step size.
    tau = lr * max(step_gain, 0.0)
    return Step(w - lr * direction, {"momentum_buffer": buffer}, tau)


class FusedRegSGD(FusedRegOptimizer, torch.optim.SGD):
    """
    With ``penalty_mode="proximal"`` the prox's step size is ``lr`` times the momentum's gain, so that heavy-ball,
    damped and Nesterov momentum all end at the exact minimiser. With momentum, a parameter's state also has
    ``momentum_gain``. The proximal gradient method is that of Parikh and Boyd, "Proximal Algorithms",
    https://web.stanford.edu/~boyd/papers/prox_algs.html.
    """

    spec = RuleSpec(
        "sgd",
        sgd,
        states=(TensorState("momentum_buffer", needed=has_momentum, codes=LINEAR),),
        scalar_states=(
            ScalarState(
                "momentum_gain",
                needed=has_momentum,
                next=next_momentum_gain,
                accompanies="momentum_buffer",
                is_step=False,
            ),
        ),
        hyperparameters=(
            Hyperparameter("momentum", is_on_host=True),
            Hyperparameter("dampening", is_on_host=True),
            Hyperparameter("nesterov"),
        ),
        twin=torch.optim.SGD,
        variants={
            "plain": {},
            "momentum": {"momentum": 0.9},
            "dampening": {"momentum": 0.8, "dampening": 0.3},
            "nesterov": {"momentum": 0.9, "nesterov": True},
            "maximize": {"momentum": 0.9, "maximize": True},
        },
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
