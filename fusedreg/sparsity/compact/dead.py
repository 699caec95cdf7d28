"""Which channels can go, and what has to be added to the biases for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .follow import Follower, Reading


@dataclass(frozen=True, eq=False)
class Merge:
    """Inputs of a convolution that are constants, put together in one of them: ``w[to] += sum of factor * w[goes]``.

    What a constant comes to beside a padding of zeros is no constant. But it is the same for all constants, times the
    constant itself, so that one channel can stand for all.
    """

    dim: int
    to: int
    factor: Tensor
    """[inputs], 0 for those that stay."""


@dataclass(frozen=True)
class Plan:
    """What to cut. Keys are names of parameters and buffers, as ``Store.tensors`` has them."""

    keep: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """By tensor and dimension, a mask of what stays; only where something goes."""
    add: dict[str, Tensor] = field(default_factory=dict)
    """By bias, what is added to it before it is cut."""
    new_biases: dict[str, Tensor] = field(default_factory=dict)
    """By layer, the bias that it gets, before it is cut."""
    merge: dict[str, Merge] = field(default_factory=dict)
    """By weight, which inputs become a part of another one before it is cut."""
    groups: dict[str, int] = field(default_factory=dict)
    """By convolution, how many groups stay."""
    features: dict[str, int] = field(default_factory=dict)
    """By norm layer without tensors, how many channels stay."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """By attention, a mask of the heads that stay; only where something of it goes."""
    folded: int = 0
    """How often a channel that is a constant other than 0 became a part of a bias, or of another such channel."""
    left: list[tuple[str, str, int]] = field(default_factory=list)
    """What is left whole, (where, reason, how many dead channels are in it)."""


def plan(f: Follower, may_add_bias: bool) -> Plan:
    """What goes: the channels that nothing needs.

    Needed is what something pins, and what a needed output reads, unless it reads a constant that its bias can take.
    From the pins on, need spreads until nothing is added; the rest is needed by nothing. At least one channel of every
    tensor stays, since layers of no channels are not allowed everywhere.
    """
    labels = f.channels.labels()
    uses = Counter((each.bias.stored.key, each.bias.offset) for each in f.readings if each.bias.stored is not None)
    shared = _used_otherwise(f, uses)
    folds = [_folds(each, uses, shared, may_add_bias, f) for each in f.readings]
    readers = Counter(each.weight.key for each in f.readings if each.weight is not None)
    merges = [
        _merges(each, can, readers, f) if may_add_bias else None for each, can in zip(f.readings, folds, strict=True)
    ]
    without = [
        can if to is None else _without(each, can, to) for each, can, to in zip(f.readings, folds, merges, strict=True)
    ]
    needed = torch.zeros(f.channels.count, dtype=torch.bool)
    for pin in f.channels.pins:
        needed[labels[pin.ids]] = True
    arrays = [labels[ids] for ids in (*f.store.channels.values(), *f.arrays) if len(ids)]
    while True:
        _spread(f.readings, without, merges, labels, needed)
        empty = next((ids for ids in arrays if not needed[ids].any()), None)
        if empty is None:
            break
        needed[empty[0]] = True

    keep = {key: needed[labels[ids]] for key, ids in f.store.channels.items()}
    result = Plan({key: mask for key, mask in keep.items() if not mask.all()})
    count = 0
    for reading, can_fold in zip(f.readings, folds, strict=True):
        goes = ~needed[labels[reading.inputs]] & can_fold & (reading.value != 0)
        goes &= reading.is_read[needed[labels[reading.outputs]]].any(dim=0)
        if not goes.any():
            continue
        count += int(goes.sum())
        constant = reading.sums[:, goes] @ reading.value[goes].to(reading.sums.dtype)
        if reading.bias.stored is not None:
            key = reading.bias.stored.key
            total = result.add.setdefault(key, torch.zeros_like(f.store.tensors[key]))
            total[reading.bias.offset : reading.bias.offset + len(constant)] += constant
        else:
            assert reading.bias.module is not None
            result.new_biases[reading.bias.module] = constant
    for reading, can_fold, to in zip(f.readings, folds, merges, strict=True):
        if to is not None and reading.weight is not None:
            goes = ~needed[labels[reading.inputs]] & reading.known & ~can_fold
            factor = torch.where(goes, reading.value / reading.value[to], 0.0)
            if factor.any():
                result.merge[reading.weight.key] = Merge(reading.dim, to, factor)
                count += int((factor != 0).sum())
    for path, ids in f.grouped.items():
        result.groups[path] = int(needed[labels[ids]].sum())
    for path, ids in f.norms.items():
        result.features[path] = int(needed[labels[ids]].sum())
    for attention in f.attentions:
        names = f.store.names_under(attention.path)
        if any(key in names for key, _ in result.keep):
            result.heads[attention.path] = needed[labels[attention.heads]]
    dead: Counter[tuple[str, str]] = Counter()
    for pin in f.channels.pins:
        dead[pin.where, pin.reason] += int(pin.is_dead.sum())
    unfolded = _unfolded(f, folds, labels, needed)
    left = [(where, reason, dead[where, reason]) for where, reason in f.left]
    left += [(pin.where, pin.reason, 0) for pin in f.channels.pins if "same tensor" in pin.reason]
    return replace(result, folded=count, left=list(dict.fromkeys([*left, *unfolded])))


def _used_otherwise(f: Follower, uses: Counter[tuple[str, int]]) -> set[str]:
    """Biases that are not only one layer's: a constant would be added for all."""
    called = Counter(each.bias.stored.key for each in f.readings if each.bias.stored is not None)
    return {key for key in called if len(f.store.names[key]) > 1 or key in f.store.pinned}


def _folds(
    reading: Reading, uses: Counter[tuple[str, int]], shared: set[str], may_add_bias: bool, f: Follower
) -> Tensor:
    """[inputs]: whether the reader does without it: it is 0, or a constant for which there is a bias."""
    bias = reading.bias
    if bias.stored is not None:
        has_place = uses[bias.stored.key, bias.offset] == 1 and bias.stored.key not in shared
    else:
        has_place = may_add_bias and bias.module is not None and f.calls[bias.module] == 1
    return reading.constant & ((reading.value == 0) | has_place)


def _merges(reading: Reading, can_fold: Tensor, readers: Counter[str], f: Follower) -> int | None:
    """The input that can stand for all others that are constants: the largest of them."""
    weight = reading.weight
    if weight is None or readers[weight.key] > 1 or len(f.store.names[weight.key]) > 1 or weight.key in f.store.pinned:
        return None
    sizes = torch.where(reading.known & ~can_fold, reading.value.abs(), 0.0)
    return int(sizes.argmax()) if sizes.any() else None


def _without(reading: Reading, can_fold: Tensor, to: int) -> Tensor:
    """[inputs]: whether the reader does without it, if one channel stands for all constants."""
    without = can_fold | reading.known
    without[to] = False
    return without


def _spread(
    readings: list[Reading], without: list[Tensor], merges: list[int | None], labels: Tensor, needed: Tensor
) -> None:
    """Adds what the needed outputs read, until nothing is added."""
    while True:
        before = int(needed.sum())
        for reading, can_go, to in zip(reversed(readings), reversed(without), reversed(merges), strict=True):
            is_read = reading.is_read[needed[labels[reading.outputs]]].any(dim=0)
            needed[labels[reading.inputs][is_read & ~can_go]] = True
            if to is not None and (is_read & reading.known & (reading.value != 0)).any():
                needed[labels[reading.inputs[to]]] = True
        if int(needed.sum()) == before:
            return


def _unfolded(f: Follower, folds: list[Tensor], labels: Tensor, needed: Tensor) -> list[tuple[str, str, int]]:
    """Readers that keep channels which are constants, because they cannot take them into a bias."""
    found = []
    for reading, can_fold in zip(f.readings, folds, strict=True):
        stays = needed[labels[reading.inputs]] & reading.known & ~can_fold
        stays &= reading.is_read[needed[labels[reading.outputs]]].any(dim=0)
        if stays.any():
            at_border = bool((stays & ~reading.constant).any())
            reason = (
                "a constant beside its padding, or under its stride, is not one constant"
                if at_border
                else "its bias cannot take a constant: it has none, or others use it"
            )
            found.append((reading.where, reason, int(stays.sum())))
    return found
