"""Units of weights: rows, columns, or neighbouring rows together, which a small network is made without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..penalties.units import Unit, count_units
from ..step.partition import reduce_over_shards
from .scores import CppScores
from .weights import Weights


def units_in(weights: Weights, unit: Unit) -> int:
    """How many units a parameter has, on all processes together.

    Raises:
        ValueError: it has none.
    """
    return count_units(tuple(weights.param.shape), unit, "sparsity_unit", weights.name)


@torch.no_grad()
def add_up_scores(weights: Sequence[Weights], unit: Unit) -> list[Tensor]:
    """A key for each unit of each parameter: int64, on the CPU; 0 where all is zero, and only there.

    It is the root of the sum of d * w^2, rounded to float32 so that the order of the sum does not matter, as the
    unsigned number that its bits are."""
    part: Literal["rows", "columns"] = "columns" if unit == "columns" else "rows"
    fast = [each for each in weights if each.tensor.numel() > 0 and CppScores.takes(each)]
    sums = dict(zip(fast, CppScores(fast, [0] * len(fast), True).add_up(part), strict=True)) if fast else {}
    keys = []
    for each in weights:
        of_all = torch.zeros(units_in(each, unit), dtype=torch.float64, device="cpu")
        own = sums[each] if each in sums else _add_up_with_torch(each, part)
        of_all.index_add_(0, _numbers(each, unit), own)
        of_all = reduce_over_shards(each.partition, of_all)
        bits = of_all.sqrt().float().abs().view(torch.int32).long()
        keys.append(torch.where(of_all == 0, 0, bits.clamp(min=1)))
    return keys


def _add_up_with_torch(weights: Weights, part: Literal["rows", "columns"]) -> Tensor:
    w, dim = weights.tensor, 1 if part == "columns" else 0
    sums = torch.zeros(w.shape[dim], dtype=torch.float64, device=w.device)
    others = [each for each in range(w.ndim) if each != dim]
    rows = max(weights.chunk // max(math.prod(w.shape[1:]), 1), 1)
    for begin in range(0, w.shape[0] if w.numel() else 0, rows):
        some = w[begin : begin + rows]
        states = {name: state[begin : begin + rows] for name, state in weights.states.items()}
        squares = some.double().square() if weights.spec.metric is None else weights.squares(some, states)
        smallest = torch.finfo(squares.dtype).smallest_normal * torch.finfo(squares.dtype).eps
        squares = torch.where(some != 0, squares.clamp(min=smallest), 0.0)  # as in csrc/maths/score.h
        own = sums[begin : begin + rows] if dim == 0 else sums
        own += squares.sum(others, dtype=torch.float64) if others else squares
    return sums.cpu()


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
