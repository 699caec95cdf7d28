"""Units of weights: rows, columns, or neighbouring rows together, which a small network is made without."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..penalties.units import Unit, count_units
from ..step.partition import reduce_over_shards
from .weights import Weights


def units_in(weights: Weights, unit: Unit) -> int:
    """How many units a parameter has, on all processes together.

    Raises:
        ValueError: it has none.
    """
    return count_units(tuple(weights.param.shape), unit, "sparsity_unit", weights.name)


@torch.no_grad()
def add_up_scores(weights: Weights, unit: Unit) -> Tensor:
    """A key for each unit: the root of the sum of d * w^2, rounded to float32 so that the order of the sum does not
    matter, as the unsigned number that its bits are. int64, on the CPU; 0 where all is zero."""
    w, dim = weights.tensor, 1 if unit == "columns" else 0
    sums = torch.zeros(w.shape[dim], dtype=torch.float64, device=w.device)
    others = [each for each in range(w.ndim) if each != dim]
    rows = max(weights.chunk // max(math.prod(w.shape[1:]), 1), 1)
    for begin in range(0, w.shape[0] if w.numel() else 0, rows):
        states = {name: state[begin : begin + rows] for name, state in weights.states.items()}
        squares = weights.squares(w[begin : begin + rows], states)
        part = sums[begin : begin + rows] if dim == 0 else sums
        part += squares.sum(others, dtype=torch.float64) if others else squares
    of_all = torch.zeros(units_in(weights, unit), dtype=torch.float64, device="cpu")
    of_all.index_add_(0, _numbers(weights, unit), sums.cpu())
    of_all = reduce_over_shards(weights.partition, of_all)
    return of_all.sqrt().float().abs().view(torch.int32).long()


@torch.no_grad()
def zero_units(weights: Weights, unit: Unit, goes: Tensor) -> None:
    """Zeroes the units that a mask over all of them, on the CPU, names."""
    places = goes[_numbers(weights, unit)].nonzero().flatten()
    weights.tensor.index_fill_(1 if unit == "columns" else 0, places.to(weights.tensor.device), 0.0)


def _numbers(weights: Weights, unit: Unit) -> Tensor:
    """The number of the unit of each row, or column, that this process holds."""
    dim = 1 if unit == "columns" else 0
    numbers = weights.offsets[dim] + torch.arange(weights.tensor.shape[dim], device="cpu")
    return numbers // unit if isinstance(unit, int) else numbers
