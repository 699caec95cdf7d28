"""Frozen zeros: a weight that is exactly zero stays zero, so that a support is refitted without a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Group, Option, Penalty, Prox


def _prox(x: Tensor, problem: Prox) -> Tensor:
    stays_zero = (problem.w_old == 0) & ~problem.z.isnan()  # a NaN is to be seen
    return torch.where(stays_zero, torch.zeros_like(x), x)


def _subdifferential(w: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Of a weight that may not move, every gradient is one that it may stay with."""
    end = torch.where((w == 0) & bool(group["freeze_zeros"]), torch.inf, torch.zeros_like(w))
    return -end, end


FREEZE_ZEROS = Penalty(
    Option(
        "freeze_zeros",
        False,
        "bool",
        """whether a weight that is exactly zero stays zero, whatever its gradient: to refit or finetune on a support,
        without a mask. Its state moves on. Default: False.""",
        "True or False",
        lambda value: isinstance(value, bool),
    ),
    prox=_prox,
    value=lambda w, group: torch.zeros_like(w),
    subdifferential=_subdifferential,
    is_constraint=True,
    needs_zero=True,
)
