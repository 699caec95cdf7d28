"""Zeroes the weights, or the units of weights, with the smallest scores: exactly as many as asked for.

The rank below which weights go is found by radix selection: the numbers of keys by their leading 16 bits say in which
of 2^16 bins it is, the numbers of those in that bin by the next 16 bits where in it, and so on; among equal keys
positions decide, likewise. Counts are integers, so that neither threads nor shards change the result, and nothing of a
parameter's size is made. Processes add up the counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..step.partition import Partition, reduce_over_shards
from .scores import BINS, LEADING_BINS, Largest, Rank, Scores, make_scores
from .units import Unit, add_up_scores, units_in, zero_units
from .weights import Weights

# Of a rank that need not be exact: 7 bits of a float32 score behind its exponent, 20 of a float64.
_COARSE_BITS = {32: 16, 64: 32}


# How many standard deviations of a sample's count the weights that go may be more than they seem. More than of numbers
# that are independent: neighbours are alike.
_DEVIATIONS = (6.0, 30.0)


def zero_smallest(weights: Sequence[Weights], share: float, *, is_exact: bool) -> list[Weights]:
    """Makes the weights with the smallest scores zero; what is zero already counts.

    Args:
        weights: they are ranked together.
        share: of them all that is to be zero; rounded to a number of weights.
        is_exact: otherwise the scores are looked at to 7 bits behind the exponent, and as many fewer go as that takes.

    Returns:
        Those that would have become empty, and so keep their best weight, and those that are empty.
    """
    return _Elements(weights).zero(share, is_exact)


def zero_smallest_units(weights: Sequence[Weights], unit: Unit, share: float) -> list[Weights]:
    """Likewise of units, exactly."""
    counts = [units_in(each, unit) for each in weights]
    scores = add_up_scores(weights, unit)
    goal = round(share * sum(counts))
    kept: list[int | None] = [None] * len(weights)
    spared: list[Weights] = []
    going = _smallest(scores, goal, kept)
    if any(bool(each.all()) for each in going if each.numel()):
        # The best of each is not among those that may go: where it would not have gone, that changes nothing.
        kept = [len(each) - 1 - int(each.flip(0).argmax()) if each.any() else None for each in scores]
        spared = [each for each, goes in zip(weights, going, strict=True) if goes.numel() and bool(goes.all())]
        going = _smallest(scores, goal, kept)
    for each, goes, keys in zip(weights, going, scores, strict=True):
        zero_units(each, unit, goes & (keys != 0))
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
    def __init__(self, weights: Sequence[Weights]) -> None:
        self._weights = list(weights)
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
        self._leading = torch.zeros(0)  # numbers of keys by their leading digit, as far as they are counted

    def zero(self, share: float, is_exact: bool) -> list[Weights]:
        goal = round(share * self._size)
        for end in self._likely_ends(goal):
            self._leading = self._count_keys(self._bits - 16, 0, end)
            selected = self._select(goal, is_exact, end)
            if selected is not None:
                rank, kept, emptied = selected
                for scores in (each for _, _, some in self._scores for each in some):
                    scores.zero(rank, [kept.get(each, -1) for each in scores.weights])
                return emptied
        raise AssertionError("fewer weights than there are")

    def _likely_ends(self, goal: int) -> Iterator[int]:
        """Leading digits below which there are likely ``goal`` keys, and not many more; at last what is above all."""
        counts = self._count(LEADING_BINS, lambda scores, counts: scores.sample(counts)).cumsum(0)
        size = int(counts[-1])
        share = goal / max(self._size, 1)
        for deviations in _DEVIATIONS:
            sampled = share * size + deviations * (math.sqrt(share * (1 - share) * size) + 1)
            if sampled < size:
                yield int(torch.searchsorted(counts, math.ceil(sampled))) + 1
        yield LEADING_BINS

    def _select(self, goal: int, is_exact: bool, end: int) -> tuple[Rank, dict[Weights, int], list[Weights]] | None:
        """The rank that ``goal`` weights are below, or nearly as many; the places of weights that stay all the same;
        which parameters would be emptied. None where it takes keys beyond those that were counted."""
        rank = self._rank_above(goal, is_exact, {}, end)
        if rank is None:
            return None
        largest = self._find_largest()
        emptied = [each for each in self._weights if each.param.numel() and largest[each].key == 0]
        kept: dict[Weights, int] = {}
        # Whoever's largest key is that of the rank may still have a weight behind it.
        if any(0 < each.key <= rank.key for each in largest.values()):
            best, kept = self._best(largest)
            below = [weights for weights, each in best.items() if each < rank]
            if below:
                # The best of each are not among those that may go: where one would not have gone, that changes nothing.
                emptied += below
                rank = self._rank_above(goal, is_exact, best, end)
        return None if rank is None else (rank, kept, emptied)

    def _rank_above(self, goal: int, is_exact: bool, best: dict[Weights, Rank], end: int) -> Rank | None:
        """The rank that ``goal`` weights are below, the best not counted; None where it may be beyond the counted."""
        goal = min(goal, self._size - len(best))
        if goal <= 0:
            return Rank(0, 0)
        best_keys = [each.key for each in best.values() if each.key >> self._bits - 16 < end]
        counts = _without(best_keys, self._bits - 16, 0, self._leading)
        if int(counts.sum()) < goal:
            return None
        below, prefix = 0, 0
        for shift in range(self._bits - 16, -1, -16):
            if shift < self._bits - 16:
                counts = _without(best_keys, shift, prefix, self._count_keys(shift, prefix, BINS))
            digit, before, within = _find(counts, goal - below)
            prefix = prefix << 16 | digit
            if below + before + within == goal:
                return Rank((prefix + 1) << shift, 0)
            below += before
            if not is_exact and shift <= self._bits - _COARSE_BITS[self._bits]:
                return Rank(prefix << shift, 0)
        key, prefix = prefix, 0
        if key == 0:
            return Rank(0, 0)  # they are zero
        positions = [each.position for each in best.values() if each.key == key]
        top = (max(self._size - 1, 1).bit_length() + 15) // 16 * 16 - 16
        for shift in range(top, -1, -16):
            counts = _without(positions, shift, prefix, self._count_positions(key, shift, prefix))
            digit, before, within = _find(counts, goal - below)
            prefix = prefix << 16 | digit
            if below + before + within == goal:
                return Rank(key, (prefix + 1) << shift)
            below += before
        raise AssertionError("two weights have one position")

    def _count_keys(self, shift: int, prefix: int, end: int) -> Tensor:
        return self._count(end, lambda scores, counts: scores.count(shift, prefix, end, counts))

    def _count_positions(self, key: int, shift: int, prefix: int) -> Tensor:
        return self._count(BINS, lambda scores, counts: scores.count_positions(key, shift, prefix, counts))

    def _count(self, bins: int, count: Callable[[Scores, Tensor], None]) -> Tensor:
        total = None
        for partition, _, some in self._scores:
            counts = torch.zeros(bins, dtype=torch.int64, device="cpu")
            for scores in some:
                count(scores, counts)
            counts = reduce_over_shards(partition, counts)
            total = counts if total is None else total + counts
        assert total is not None
        return total

    def _find_largest(self) -> dict[Weights, Largest]:
        """Of each parameter, on all processes together; the place is -1 in those that do not hold the key."""
        found: dict[Weights, Largest] = {}
        for partition, places, some in self._scores:
            own = {
                weights: largest for each in some for weights, largest in zip(each.weights, each.largest(), strict=True)
            }
            largest = [own.get(self._weights[i], Largest(0, -1, -1)) for i in places]
            keys = torch.tensor([each.key for each in largest], dtype=torch.int64, device="cpu")
            of_all = reduce_over_shards(partition, keys, "max").tolist()
            for i, each, key in zip(places, largest, of_all, strict=True):
                found[self._weights[i]] = each if each.key == key else Largest(key, -1, -1)
        return found

    def _best(self, largest: dict[Weights, Largest]) -> tuple[dict[Weights, Rank], dict[Weights, int]]:
        """The highest rank in each parameter that is not all zero, and the places of those that this process holds."""
        best: dict[Weights, Rank] = {}
        kept: dict[Weights, int] = {}
        for partition, places, _ in self._scores:
            own = [self._weights[i] for i in places]
            positions = torch.tensor([largest[each].position for each in own], dtype=torch.int64, device="cpu")
            last = reduce_over_shards(partition, positions, "max").tolist()
            for weights, position in zip(own, last, strict=True):
                found = largest[weights]
                if found.key > 0:
                    best[weights] = Rank(found.key, position)
                    if found.place >= 0 and found.position == position:
                        kept[weights] = found.place
        return best, kept


def _without(numbers: Iterable[int], shift: int, prefix: int, counts: Tensor) -> Tensor:
    """Counts of digits that have ``prefix`` above them, those of some numbers taken off."""
    digits = [number >> shift & BINS - 1 for number in numbers if number >> shift >> 16 == prefix]
    if not digits:
        return counts
    return counts - torch.bincount(torch.tensor(digits, device="cpu"), minlength=len(counts))


def _find(counts: Tensor, goal: int) -> tuple[int, int, int]:
    """The digit of the ``goal``-th number, how many numbers have smaller ones, and how many have this."""
    ends = counts.cumsum(0)
    digit = int(torch.searchsorted(ends, goal))
    within = int(counts[digit])
    return digit, int(ends[digit]) - within, within
