"""The box, ``lower <= w <= upper``. Nonnegative weights are ``lower=0``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import Group, Option, Penalty, Prox, like


def _at_least(x: Tensor, problem: Prox) -> Tensor:
    lower = like(x, problem.group["lower"])
    return torch.where(x < lower, lower, x)  # a NaN stays


def _at_most(x: Tensor, problem: Prox) -> Tensor:
    upper = like(x, problem.group["upper"])
    return torch.where(x > upper, upper, x)


def _below(w: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The normal cone: at the bound, every gradient that pulls the weight over it."""
    zero = torch.zeros_like(w)
    return torch.where(w <= like(w, group["lower"]), -math.inf, zero), zero


def _above(w: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(w)
    return zero, torch.where(w >= like(w, group["upper"]), math.inf, zero)


def _option(name: str, default: float, doc: str) -> Option:
    return Option(
        name,
        default,
        "float",
        doc,
        f"a number, or {default:g} for none",
        # one that is infinite on the other side would leave no number between the two
        lambda value: isinstance(value, (int, float)) and not math.isnan(value) and value != -default,
    )


LOWER = Penalty(
    _option("lower", -math.inf, "the least that a weight may be: 0 for nonnegative ones. Default: -inf."),
    prox=_at_least,
    value=lambda w, group: torch.where(w < like(w, group["lower"]), math.inf, torch.zeros_like(w)),
    subdifferential=_below,
    is_constraint=True,
)
UPPER = Penalty(
    _option("upper", math.inf, "the most that a weight may be. Default: inf."),
    prox=_at_most,
    value=lambda w, group: torch.where(w > like(w, group["upper"]), math.inf, torch.zeros_like(w)),
    subdifferential=_above,
    is_constraint=True,
)
