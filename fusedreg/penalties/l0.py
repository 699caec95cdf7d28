"""The L0 penalty, ``l0`` for each weight that is not zero: it takes weights, and shrinks none.

Its prox is the hard threshold: Blumensath and Davies, "Iterative thresholding for sparse approximations",
https://doi.org/10.1007/s00041-008-9035-z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mcp import gain
from .spec import Group, Penalty, Prox, like, strength


def _prox(x: Tensor, problem: Prox) -> Tensor:
    is_dear = gain(x, problem) <= like(x, problem.group["l0"])  # a NaN is not
    return torch.where(is_dear, torch.zeros_like(x), x)


def _value(w: Tensor, group: Group) -> Tensor:
    return torch.where(w.isnan(), w, like(w, group["l0"]) * (w != 0))


def _subdifferential(w: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """At 0 every gradient: no step away is short enough to pay for the jump."""
    end = torch.where((w == 0) & (like(w, group["l0"]) != 0), math.inf, torch.zeros_like(w))
    return -end, end


L0 = Penalty(
    strength("l0", "strength of the penalty ``l0`` * (number of weights that are not zero), >= 0. Default: 0."),
    prox=_prox,
    value=_value,
    subdifferential=_subdifferential,
    needs_zero=True,
)
