"""Channels: numbers for what goes or stays together, in however many tensors it has an index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pin:
    """Channels that stay, because something looks at all of them."""

    ids: Tensor
    is_dead: Tensor
    """Those of them that are constant where they are looked at."""
    where: str
    reason: str
    """Empty for what is no fault: the model's inputs and outputs."""


class Channels:
    """A union-find over channels, put together at the end: ``join`` remembers, ``labels`` resolves."""

    def __init__(self) -> None:
        self.count = 0
        self.pins: list[Pin] = []
        self._joined: list[tuple[Tensor, Tensor]] = []

    def new(self, count: int) -> Tensor:
        ids = torch.arange(self.count, self.count + count)
        self.count += count
        return ids

    def join(self, some: Tensor, others: Tensor) -> None:
        """From now on ``some[i]`` and ``others[i]`` are one channel."""
        assert some.shape == others.shape
        self._joined.append((some, others))

    def pin(self, ids: Tensor, where: str, reason: str = "", is_dead: Tensor | None = None) -> None:
        dead = torch.zeros(len(ids), dtype=torch.bool) if is_dead is None else is_dead
        self.pins.append(Pin(ids, dead, where, reason))

    def labels(self) -> Tensor:
        """For each channel the smallest number of those that it is joined with. int64 [count]."""
        labels = torch.arange(self.count)
        if not self._joined:
            return labels
        some, others = (torch.cat(each) for each in zip(*self._joined, strict=True))
        while True:
            before = labels.clone()
            smallest = torch.minimum(labels[some], labels[others])
            for ids in (labels[some], labels[others], some, others):
                labels.scatter_reduce_(0, ids, smallest, "amin")
            labels = labels[labels]
            if torch.equal(labels, before):
                return labels
