"""FusedRegFTRL: FTRL-Proximal, whose closed form has an L1 penalty in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedRegOptimizer
from ..penalties import Option, Regularizers
from ..penalties.l1 import soft_threshold
from ..penalties.spec import strength
from .spec import AsStored, Group, Hyperparameter, RuleSpec, Scalar, Scalars, ScalarState, Step, TensorState, number


def l1_of_step(group: Group) -> Scalar:
    """What a step adds to all that l1 has come to: nothing where it is in the gradient."""
    return group["l1"] if group["penalty_mode"] == "proximal" else 0.0


@dataclass(frozen=True)
class L1OfStep(Hyperparameter):
    def read(self, group: Group) -> tuple[float | Tensor, ...]:
        return (number(l1_of_step(group)),)


def next_l1_sum(scalars: Mapping[str, Scalar], group: Group, as_stored: AsStored) -> Scalar:
    return scalars["l1_sum"] + number(l1_of_step(group))


def ftrl_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    return state["sum"].sqrt() + group["beta"]


def ftrl(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """McMahan et al., "Ad click prediction", algorithm 1, as it is said step by step in docs/formulas.md."""
    lr, before, after = group["lr"], scalars.before["l1_sum"], scalars.after["l1_sum"]
    sum_ = state["sum"] + g * g
    d = ftrl_metric({"sum": sum_}, scalars.after, group)
    moved = w - lr * g / d
    arriving = moved if not isinstance(lr, Tensor) and lr == 0 else d * moved / lr + before * w.sign()
    dual = torch.where(w == 0, state["held_back"] - g, arriving)
    # Where it was zero, or is to change its sign, the whole sum counts: it must outweigh l1 on the other side.
    z = torch.where((w == 0) | (w.sign() * moved < 0), lr * soft_threshold(dual, before) / d, moved)
    dual = torch.where(dual.abs() > after, after * dual.sign(), dual)

    def held_back(w: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"held_back": torch.where(w == 0, dual, torch.zeros_like(dual))}

    return Step(z, {"sum": sum_}, tau=lr, metric=d, safeguard=-d, finish=held_back)  # below zero, no floor acts


BETA = Option(
    "beta",
    1.0,
    "float",
    """what is added to the root of the sum of squares, > 0: no step is longer than ``lr / beta`` times its gradient.
    Default: 1.""",
    "a finite number > 0",
    lambda value: isinstance(value, (int, float)) and 0.0 < value < math.inf,
)
INITIAL_SUM = strength("initial_accumulator_value", "what the sum of squares begins with. Default: 0.")


WHY_NO_CODES = "what wakes a weight is a sum of small gradients, and rounding would lose or invent it"


class FusedRegFTRL(FusedRegOptimizer):
    """
    Follow the regularized leader, per coordinate: for sparse linear models on a stream of examples. A weight that is
    not zero moves as Adagrad's. One that is zero sums up its gradients, and moves when their sum outweighs what ``l1``
    has come to over the steps: so gradients that are only noise wake no weight.

    The rule is that of McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013,
    https://doi.org/10.1145/2487575.2488200, in the form of McMahan, "Follow-the-regularized-leader and mirror descent",
    AISTATS 2011, where every step adds its ``l1``. docs/formulas.md says how the strengths of others are given here.

    A parameter's state is ``sum``, the sum of squared gradients, and ``held_back``, what a weight that is zero has
    summed up, of its shape and dtype; and ``l1_sum``, the sum of ``l1`` over the steps, 0-dim, float64.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = FusedRegFTRL(model.parameters(), lr=0.1, l1=0.01)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
    """

    spec = RuleSpec(
        "ftrl",
        ftrl,
        metric=ftrl_metric,
        states=(
            TensorState("held_back", why_no_codes=WHY_NO_CODES),
            TensorState("sum", initial=lambda group: group["initial_accumulator_value"], why_no_codes=WHY_NO_CODES),
        ),
        scalar_states=(ScalarState("l1_sum", next=next_l1_sum, is_step=False),),
        hyperparameters=(
            Hyperparameter("beta", option=BETA),
            L1OfStep("l1_of_step"),
            Hyperparameter("initial_accumulator_value", fields=(), option=INITIAL_SUM),
        ),
        variants={
            "plain": {},
            "maximize": {"maximize": True, "beta": 0.3, "initial_accumulator_value": 0.1},
        },
        modes=("proximal", "subgradient"),
        why_no_units="its weights and what they hold back are moved together, element by element",
        why_not_others="its l1 is a part of its step, in its metric; FusedRegAdagrad has the same metric and all modes",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        beta: float | Tensor = 1.0,
        initial_accumulator_value: float = 0.0,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        defaults = {
            "lr": lr,
            "beta": beta,
            "initial_accumulator_value": initial_accumulator_value,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)
