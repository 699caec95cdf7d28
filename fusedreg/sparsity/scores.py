"""Every weight's rank among all, counted without being written down: what target sparsity selects by.

A rank is a key and, where keys are equal, a position. The key is the score, ``d * w^2`` for a rule with a metric d (1
where no step has said what it is) and ``|w|`` for others, as the unsigned number that its bits are, so that a NaN comes
last; 0 is a weight that is zero, and no other. The position is the number of the element among all weights that are
selected together, whichever process holds it and however it lies in memory.

Two classes count: ``CppScores`` in C++ on the CPU, ``TorchScores`` with torch, a chunk at a time, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.cpp import CppBackend, load_extension
from ..backends.reference import arithmetic_dtype
from ..hyperparameters import read_numbers
from ..memory import memory_order
from ..penalties.units import unit_code
from .weights import Weights, flat, position_layout

BINS = 1 << 16
LEADING_BINS = BINS // 2  # scores have no sign
BEYOND = (1 << 63) - 1


class Rank(NamedTuple):
    key: int
    position: int


class Largest(NamedTuple):
    """The weight of a parameter with the highest rank.

    ``BEYOND``, -1 and -1 where its key was not counted; 0, -1 and -1 where all weights are zero, or there are none."""

    key: int
    position: int
    place: int
    """Its place in memory, in this process."""


class Scores(Protocol):
    """Those of some parameters. Positions begin at ``firsts``, one a parameter.

    All but ``sample`` come after a ``count`` of the leading digits, and ask for no larger keys than were counted."""

    weights: list[Weights]

    def sample(self, counts: Tensor) -> None:
        """Counts the leading digits of a part of the weights, of all parameters the same, or of none.

        Args:
            counts: as below, of ``LEADING_BINS`` elements.
        """

    def count(self, shift: int, prefix: int, end: int, counts: Tensor) -> None:
        """Adds to ``counts`` the keys that are ``prefix`` above a digit of 16 bits, by that digit.

        Args:
            shift: how many bits are below the digit.
            end: only smaller digits are counted, > 0; of the leading digit a small number is fast.
            counts: int64, on the CPU, of ``end`` elements.
        """

    def count_positions(self, key: int, shift: int, prefix: int, counts: Tensor) -> None:
        """Likewise the positions of the weights that have a key; ``BINS``."""

    def largest(self) -> list[Largest]:
        """Of each parameter."""

    def zero(self, rank: Rank, kept: list[int]) -> None:
        """Zeroes the weights below a rank, but the one at a parameter's place in ``kept``, if that is not -1."""


class CppScores(Scores):
    """In C++ (csrc/cpu/selection.h)."""

    def __init__(self, weights: list[Weights], firsts: list[int], is_wide: bool) -> None:
        extension, _ = load_extension()
        assert extension is not None
        self.weights = weights
        spec, groups = weights[0].spec, {id(each.group): each.group for each in weights}
        fields = {key: [float(number) for number in read_numbers(spec, group)] for key, group in groups.items()}
        parameters = [
            self._parameter(each, fields[id(each.group)], first) for each, first in zip(weights, firsts, strict=True)
        ]
        self._selection = extension.Selection(spec.name, parameters, is_wide)

    @staticmethod
    def takes(weights: Weights) -> bool:
        states = list(weights.stored.values())
        backend = CppBackend()
        return (
            backend.unavailable_reason() is None
            and backend.rejection(weights.spec, weights.tensor, states) is None
            and memory_order(weights.tensor) is not None
            and all(state.stride() == weights.tensor.stride() for state in states)
        )

    @staticmethod
    def _parameter(weights: Weights, fields: list[float], first: int) -> tuple[object, ...]:
        spec = weights.spec
        dims = memory_order(weights.tensor)
        assert dims is not None
        begin, layout = position_layout(weights, dims)
        return (
            weights.tensor,
            tuple(weights.stored.get(state.name) for state in spec.states),
            fields,
            [weights.scalars.get(each.name, 0.0) for each in spec.scalar_states],
            weights.in_metric,
            first + begin,
            layout,
            tuple(weights.scales.get(state.name) for state in spec.states),
        )

    def sample(self, counts: Tensor) -> None:
        self._selection.sample(counts)

    def count(self, shift: int, prefix: int, end: int, counts: Tensor) -> None:
        self._selection.count(shift, prefix, end, counts)

    def count_positions(self, key: int, shift: int, prefix: int, counts: Tensor) -> None:
        self._selection.count_positions(key, shift, prefix, counts)

    def largest(self) -> list[Largest]:
        return [Largest(*each) for each in self._selection.largest()]

    def zero(self, rank: Rank, kept: list[int]) -> None:
        self._selection.zero(rank.key, rank.position, kept)

    def add_up(self, unit: Literal["rows", "columns"]) -> list[Tensor]:
        """The sum of d * w^2 over each unit of each parameter that this process holds, in float64."""
        dim = 1 if unit == "columns" else 0
        sums = [torch.zeros(each.tensor.shape[dim], dtype=torch.float64, device="cpu") for each in self.weights]
        self._selection.add_up(unit_code(unit), sums)
        return sums


class TorchScores(Scores):
    """Of one parameter, with torch, which makes temporaries of a chunk's size."""

    def __init__(self, weights: Weights, first: int, is_wide: bool) -> None:
        self.weights = [weights]
        self._is_wide = is_wide
        dims = memory_order(weights.tensor)
        self._is_dense = dims is not None
        # What is not dense is copied, and what is not laid out as its parameter.
        self._w = flat(weights.tensor) if self._is_dense else weights.tensor.reshape(-1)
        self._states = {
            name: state.reshape(-1)
            if not self._is_dense
            else flat(state)
            if state.stride() == weights.tensor.stride()
            else flat(torch.empty_like(weights.tensor, dtype=state.dtype).copy_(state))
            for name, state in weights.states.items()
        }
        begin, self._layout = position_layout(weights, dims if dims is not None else list(range(weights.tensor.ndim)))
        self._first = first + begin

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The place of each chunk's first weight, and its keys."""
        weights = self.weights[0]
        dtype = arithmetic_dtype(weights.tensor.dtype)
        for begin in range(0, self._w.numel(), weights.chunk):
            w = self._w[begin : begin + weights.chunk]
            if weights.spec.metric is None:
                score = w.to(dtype).abs()
            else:
                states = {name: state[begin : begin + weights.chunk] for name, state in self._states.items()}
                score = weights.squares(w, states).abs()  # a zero, and a NaN, may have a sign
            if self._is_wide:
                score = score.double()
            bits = score.view(torch.int64 if self._is_wide else torch.int32).to(torch.int64)
            yield begin, torch.where(w == 0, 0, bits.clamp(min=1))

    def _positions(self, places: Tensor) -> Tensor:
        positions = torch.full_like(places, self._first)
        for size, stride in reversed(self._layout):
            positions += places % size * stride
            places = places // size
        return positions

    def sample(self, counts: Tensor) -> None:
        """Of none: to count fewer digits makes nothing faster here."""

    def count(self, shift: int, prefix: int, end: int, counts: Tensor) -> None:
        for _, keys in self._chunks():
            _count_digits(keys, shift, prefix, counts)

    def count_positions(self, key: int, shift: int, prefix: int, counts: Tensor) -> None:
        for begin, keys in self._chunks():
            places = (keys == key).nonzero().flatten() + begin
            _count_digits(self._positions(places), shift, prefix, counts)

    def largest(self) -> list[Largest]:
        found = Largest(0, -1, -1)
        for begin, keys in self._chunks():
            key = int(keys.max())
            if key < max(found.key, 1):
                continue
            places = (keys == key).nonzero().flatten() + begin
            positions = self._positions(places)
            last = int(positions.argmax())
            found = max(found, Largest(key, int(positions[last]), int(places[last])))
        return [found]

    def zero(self, rank: Rank, kept: list[int]) -> None:
        for begin, keys in self._chunks():
            goes = keys < rank.key
            if rank.position > 0:
                places = torch.arange(begin, begin + keys.numel(), device=keys.device)
                goes |= (keys == rank.key) & (self._positions(places) < rank.position)
            if begin <= kept[0] < begin + keys.numel():
                goes[kept[0] - begin] = False
            self._w[begin : begin + keys.numel()].masked_fill_(goes, 0.0)
        if not self._is_dense:
            self.weights[0].tensor.copy_(self._w.view(self.weights[0].tensor.shape))


def _count_digits(numbers: Tensor, shift: int, prefix: int, counts: Tensor) -> None:
    leading = numbers >> shift
    first, end = prefix << 16, len(counts)
    digits = leading[(leading >= first) & (leading < first + end)] - first
    counts += torch.bincount(digits, minlength=end).to(counts.device)


def make_scores(weights: Sequence[Weights], firsts: Sequence[int], is_wide: bool) -> list[Scores]:
    """Of parameters that lie alike on a mesh, or all on none."""
    fast: list[tuple[Weights, int]] = []
    scores: list[Scores] = []
    for each, first in zip(weights, firsts, strict=True):
        if CppScores.takes(each):
            fast.append((each, first))
        else:
            scores.append(TorchScores(each, first, is_wide))
    if fast:
        scores.append(CppScores([each for each, _ in fast], [first for _, first in fast], is_wide))
    return scores
