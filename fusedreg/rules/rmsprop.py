"""FusedRegRMSprop: torch.optim.RMSprop with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import LINEAR, ROOTS
from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from .spec import (
    Group,
    Hyperparameter,
    RuleSpec,
    Scalar,
    Scalars,
    ScalarState,
    Step,
    TensorState,
    has_momentum,
    next_momentum_gain,
)


def rmsprop_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    second_moment = state["square_avg"]
    if group["centered"]:
        # A variance below zero is a rounding error; torch takes its root, a NaN.
        second_moment = (second_moment - state["grad_avg"].square()).clamp(min=0)
    return second_moment.sqrt() + group["eps"]


def rmsprop(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Hinton's lecture 6e, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves,
    "Generating Sequences With Recurrent Neural Networks", https://arxiv.org/abs/1308.0850."""
    lr, alpha, momentum = group["lr"], group["alpha"], group["momentum"]
    square_avg = alpha * state["square_avg"] + (1 - alpha) * g * g
    new_state, safeguard = {"square_avg": square_avg}, None
    if group["centered"]:
        # At a solution the gradient stands still, and its variance goes to zero; its second moment does not.
        safeguard = square_avg.sqrt() + group["eps"]
        new_state["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * g
    d = rmsprop_metric(new_state, scalars.after, group)
    direction, gain = g / d, 1.0
    if momentum != 0:
        direction = new_state["momentum_buffer"] = momentum * state["momentum_buffer"] + direction
        gain = scalars.after["momentum_gain"]
    return Step(w - lr * direction, new_state, tau=lr * gain, metric=d, safeguard=safeguard)


class FusedRegRMSprop(FusedRegOptimizer, torch.optim.RMSprop):
    """
    With ``penalty_mode="proximal"`` the prox's step size is ``lr`` times the momentum's gain, over the root of the
    (centered) second moment. With momentum, a parameter's state also has ``momentum_gain``.

    The rule is that of Hinton's lecture 6e, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf;
    the centered one that of Graves, "Generating Sequences With Recurrent Neural Networks",
    https://arxiv.org/abs/1308.0850. Where a centered variance comes out below zero by rounding, it is taken as zero;
    torch makes the weight a NaN.
    """

    spec = RuleSpec(
        "rmsprop",
        rmsprop,
        metric=rmsprop_metric,
        states=(
            TensorState("square_avg", codes=ROOTS),
            TensorState("momentum_buffer", needed=has_momentum, codes=LINEAR),
            TensorState(
                "grad_avg",
                needed=lambda group: group["centered"],
                why_no_codes="centered, it divides by one average less another, of which codes may leave 0",
            ),
        ),
        scalar_states=(
            ScalarState("step"),
            ScalarState(
                "momentum_gain",
                needed=has_momentum,
                next=next_momentum_gain,
                accompanies="momentum_buffer",
                is_step=False,
            ),
        ),
        hyperparameters=(
            Hyperparameter("alpha"),
            Hyperparameter("eps"),
            Hyperparameter("momentum", is_on_host=True),
            Hyperparameter("centered", fields=()),
        ),
        twin=torch.optim.RMSprop,
        variants={
            "plain": {},
            "momentum": {"momentum": 0.9},
            "centered": {"centered": True},
            "centered-momentum": {"centered": True, "momentum": 0.8, "alpha": 0.9},
            "maximize": {"maximize": True, "momentum": 0.9},
        },
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )
