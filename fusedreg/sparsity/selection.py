"""Zeroes the weights, or the units of weights, with the smallest scores: exactly as many as asked for.

The rank below which weights go is found by radix selection: the numbers of keys by their leading 16 bits say in which
of 2^16 bins it is, the numbers of those in that bin by the next 16 bits where in it, and so on; among equal keys
positions decide, likewise. Counts are integers, so that neither threads nor shards change the result, and nothing of a
parameter's size is made. Processes add up the counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..step.partition import Partition, reduce_over_shards
from .scores import BINS, Rank, Scores, make_scores
from .units import Unit, add_up_scores, units_in, zero_units
from .weights import Weights

# Of a rank that need not be exact: 7 bits of a float32 score behind its exponent, 20 of a float64.
_COARSE_BITS = {32: 16, 64: 32}


@dataclass
class Hint:
    """Where the rank was in the last selection, and how far it had moved: the next is likely not far behind."""

    digit: int = BINS
    moved: int = BINS

    @property
    def end(self) -> int:
        """A digit that is likely larger than the rank's."""
        return min(self.digit + 2 * max(self.moved, 0) + 16, BINS)


def zero_smallest(weights: Sequence[Weights], share: float, hint: Hint, *, is_exact: bool) -> list[Weights]:
    """Makes the weights with the smallest scores zero; what is zero already counts.

    Args:
        weights: they are ranked together.
        share: of them all that is to be zero; rounded to a number of weights.
        hint: makes it fast, and is renewed; it changes nothing.
        is_exact: otherwise the scores are looked at to 7 bits behind the exponent, and as many fewer go as that takes.

    Returns:
        Those that would have become empty, and so keep their best weight, and those that are empty.
    """
    return _Elements(weights, hint).zero(share, is_exact)


def zero_smallest_units(weights: Sequence[Weights], unit: Unit, share: float) -> list[Weights]:
    """Likewise of units, exactly."""
    counts = [units_in(each, unit) for each in weights]
    scores = [add_up_scores(each, unit) for each in weights]
    goal = round(share * sum(counts))
    kept: list[int | None] = [None] * len(weights)
    spared: list[Weights] = []
    going = _smallest(scores, goal, kept)
    if any(bool(each.all()) for each in going if each.numel()):
        # The best of each is not among those that may go: where it would not have gone, that changes nothing.
        kept = [len(each) - 1 - int(each.flip(0).argmax()) if each.any() else None for each in scores]
        spared = [each for each, goes in zip(weights, going, strict=True) if goes.numel() and bool(goes.all())]
        going = _smallest(scores, goal, kept)
    for each, goes in zip(weights, going, strict=True):
        zero_units(each, unit, goes)
    return spared


def _smallest(scores: list[Tensor], goal: int, kept: list[int | None]) -> list[Tensor]:
    """Which of the units are the ``goal`` smallest, but those that are kept; the first among equals."""
    candidates = [torch.ones_like(each, dtype=torch.bool) for each in scores]
    for mask, place in zip(candidates, kept, strict=True):
        if place is not None:
            mask[place] = False
    may_go = torch.cat(candidates)
    order = torch.where(may_go, torch.cat(scores), torch.iinfo(torch.int64).max).sort(stable=True).indices
    goes = torch.zeros_like(may_go)
    goes[order[: min(goal, int(may_go.sum()))]] = True
    return list(goes.split([len(each) for each in scores]))


class _Elements:
    def __init__(self, weights: Sequence[Weights], hint: Hint) -> None:
        self._weights = list(weights)
        self._hint = hint
        self._bits = 64 if any(each.tensor.dtype == torch.float64 for each in weights) else 32
        sizes = [each.param.numel() for each in weights]
        self._size = sum(sizes)
        firsts = list(itertools.accumulate(sizes, initial=0))[:-1]
        self._scores: list[tuple[Partition | None, list[int], list[Scores]]] = []
        for partition in dict.fromkeys(each.partition for each in weights):
            places = [i for i, each in enumerate(weights) if each.partition == partition]
            held = [i for i in places if weights[i].tensor.numel() > 0]
            scores = make_scores([weights[i] for i in held], [firsts[i] for i in held], self._bits == 64)
            self._scores.append((partition, places, scores))
        self._largest: dict[Weights, int] = {}

    def zero(self, share: float, is_exact: bool) -> list[Weights]:
        goal = round(share * self._size)
        rank = self._rank_above(goal, is_exact, {})
        kept: dict[Weights, int] = {}
        emptied = [each for each in self._weights if each.param.numel() and self._largest[each] == 0]
        # Whoever's largest key is that of the rank may still have a weight behind it.
        if any(0 < self._largest[each] <= rank.key for each in self._weights):
            best, kept = self._best()
            if any(each[:2] < rank for each in best.values()):
                # The best of each are not among those that may go: where one would not have gone, that changes nothing.
                emptied += [weights for weights, each in best.items() if each[:2] < rank]
                rank = self._rank_above(goal, is_exact, best)
        for scores in (each for _, _, some in self._scores for each in some):
            scores.zero(rank, [kept.get(each, -1) for each in scores.weights])
        return emptied

    def _rank_above(self, goal: int, is_exact: bool, excluded: dict[Weights, Rank]) -> Rank:
        """The rank that ``goal`` weights are below, those that are excluded not counted; or nearly as many."""
        goal = min(goal, self._size - len(excluded))
        below, prefix = 0, 0
        for shift in range(self._bits - 16, -1, -16):
            is_first = shift == self._bits - 16
            counts = self._count_keys(shift, prefix, self._hint.end if is_first else BINS, excluded)
            if is_first and int(counts.sum()) < goal:
                counts = self._count_keys(shift, prefix, BINS, excluded)
            if goal <= 0:
                return Rank(0, 0)
            digit, before, within = _find(counts, goal - below)
            if is_first:
                self._hint.moved = digit - self._hint.digit if self._hint.digit < BINS else BINS
                self._hint.digit = digit
            prefix = prefix << 16 | digit
            if below + before + within == goal:
                return Rank((prefix + 1) << shift, 0)
            below += before
            if not is_exact and shift <= self._bits - _COARSE_BITS[self._bits]:
                return Rank(prefix << shift, 0)
        key, prefix = prefix, 0
        if key == 0:
            return Rank(0, 0)  # they are zero
        top = (max(self._size - 1, 1).bit_length() + 15) // 16 * 16 - 16
        for shift in range(top, -1, -16):
            digit, before, within = _find(self._count_positions(key, shift, prefix, excluded), goal - below)
            prefix = prefix << 16 | digit
            if below + before + within == goal:
                return Rank(key, (prefix + 1) << shift)
            below += before
        raise AssertionError("two weights have one position")

    def _count_keys(self, shift: int, prefix: int, end: int, excluded: dict[Weights, Rank]) -> Tensor:
        largest: dict[Weights, int] = {}

        def count(scores: Scores, counts: Tensor) -> None:
            largest.update(zip(scores.weights, scores.count(shift, prefix, end, counts), strict=True))

        numbers = (each.key for each in excluded.values() if each.key >> shift & BINS - 1 < end)
        counts = self._count(count, shift, prefix, numbers)
        if not self._largest:
            for partition, places, _ in self._scores:
                own = torch.tensor([largest.get(self._weights[i], 0) for i in places], dtype=torch.int64, device="cpu")
                of_all = reduce_over_shards(partition, own, "max").tolist()
                self._largest.update(zip([self._weights[i] for i in places], of_all, strict=True))
        return counts

    def _count_positions(self, key: int, shift: int, prefix: int, excluded: dict[Weights, Rank]) -> Tensor:
        return self._count(
            lambda scores, counts: scores.count_positions(key, shift, prefix, counts),
            shift,
            prefix,
            (each.position for each in excluded.values() if each.key == key),
        )

    def _count(
        self, count: Callable[[Scores, Tensor], None], shift: int, prefix: int, excluded: Iterable[int]
    ) -> Tensor:
        total = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        for partition, _, some in self._scores:
            counts = torch.zeros_like(total)
            for scores in some:
                count(scores, counts)
            total += reduce_over_shards(partition, counts)
        for number in excluded:
            if number >> shift >> 16 == prefix:
                total[number >> shift & BINS - 1] -= 1
        return total

    def _best(self) -> tuple[dict[Weights, Rank], dict[Weights, int]]:
        """The highest rank in each parameter that is not all zero, and the places of those that this process holds."""
        best: dict[Weights, Rank] = {}
        kept: dict[Weights, int] = {}
        for partition, places, some in self._scores:
            own = {weights: found for each in some for weights, found in zip(each.weights, each.largest(), strict=True)}
            positions = [
                own[weights].position if weights in own and own[weights].key == self._largest[weights] else -1
                for weights in (self._weights[i] for i in places)
            ]
            last = reduce_over_shards(partition, torch.tensor(positions, device="cpu"), "max").tolist()
            for weights, position in zip((self._weights[i] for i in places), last, strict=True):
                if self._largest[weights] > 0:
                    best[weights] = Rank(self._largest[weights], position)
                    if weights in own and own[weights][:2] == best[weights]:
                        kept[weights] = own[weights].place
        return best, kept


def _find(counts: Tensor, goal: int) -> tuple[int, int, int]:
    """The digit of the ``goal``-th number, how many numbers have smaller ones, and how many have this."""
    ends = counts.cumsum(0)
    digit = int(torch.searchsorted(ends, goal))
    within = int(counts[digit])
    return digit, int(ends[digit]) - within, within
