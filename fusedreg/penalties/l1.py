"""The L1 penalty, ``l1 * sum |w|``: weights that the loss does not hold up become exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Group, Penalty, Scalar, strength


def soft_threshold(z: Tensor, t: Scalar | Tensor) -> Tensor:
    """``sign(z) * max(|z| - t, 0)``; its zeros are +0.0 and a NaN stays NaN."""
    return torch.where(z.abs() <= t, torch.zeros_like(z), z - t * z.sign())


def _subdifferential(w: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    l1 = group["l1"]
    is_zero = w == 0
    return torch.where(is_zero, -l1, l1 * w.sign()), torch.where(is_zero, l1, l1 * w.sign())


L1 = Penalty(
    strength("l1", "strength of the penalty ``l1 * sum |w|``, >= 0. Default: 0."),
    prox=lambda x, problem: soft_threshold(x, problem.kappa * problem.group["l1"]),
    value=lambda w, group: group["l1"] * w.abs(),
    subdifferential=_subdifferential,
    gradient=lambda w, group: group["l1"] * w.sign(),
)
