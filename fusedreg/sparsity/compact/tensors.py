"""What is known of the tensors of a graph: where their channels lie, and which of those are constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Channels


@dataclass(frozen=True, eq=False)
class Followed:
    """A tensor of the graph. At most one of its dimensions has channels; the others keep their size."""

    shape: tuple[int, ...]
    dim: int | None = None
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The channel of each index of ``dim``."""
    known: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """Whether all elements of a channel are one number, whatever the inputs are."""
    value: Tensor = field(default_factory=lambda: torch.empty(0))
    """That number; anything finite where it is not known."""

    def over(self, shape: Any, dim: int | None) -> Followed:
        """The same channels in another place."""
        return replace(self, shape=tuple(shape), dim=dim)

    def pick(self, shape: Any, dim: int, places: Tensor) -> Followed:
        """Some of the channels, in another order or several times."""
        return Followed(tuple(shape), dim, self.ids[places], self.known[places], self.value[places])

    def constant(self, known: Tensor, value: Tensor) -> Followed:
        """With other constants, of which those that are not finite are none."""
        known = known & value.isfinite()
        return replace(self, known=known, value=torch.where(known, value, 0.0))

    def unknown(self) -> Followed:
        return replace(self, known=torch.zeros_like(self.known))


@dataclass(frozen=True, eq=False)
class Stored:
    """A parameter or buffer of the model. Each of its dimensions may have channels."""

    key: str
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class ChannelCount:
    """The size of a dimension with channels, as a number that the forward computes with."""

    ids: Tensor


class Store:
    """The model's parameters and buffers, by one name each, and the channels of their dimensions."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self._channels = channels
        self._keys: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[str, list[str]] = {}
        """All names of one tensor, by its first."""
        self._owner: dict[str, tuple[int, str]] = {}
        self._met: set[tuple[int, str]] = set()
        """The modules, with the names there, as which the forward has used them."""
        for name, tensor in named_tensors(model):
            key = self._keys.setdefault(id(tensor), name)
            self.tensors[key] = tensor
            self.names.setdefault(key, []).append(name)
            path, _, last = name.rpartition(".")
            self._owner[name] = (id(model.get_submodule(path)), last)
        self.channels: dict[tuple[str, int], Tensor] = {}
        self.pinned: set[str] = set()
        """What something looks at that does not only add or multiply."""

    def find(self, name: str, tensor: Any) -> Stored | None:
        key = self._keys.get(id(tensor))
        if key is None:
            return None
        if name in self._owner:
            self._met.add(self._owner[name])
        return Stored(key, self.tensors[key])

    def ids(self, stored: Stored, dim: int) -> Tensor:
        if (stored.key, dim) not in self.channels:
            self.channels[stored.key, dim] = self._channels.new(stored.tensor.shape[dim])
        return self.channels[stored.key, dim]

    def pin(self, stored: Stored, dims: Any, where: str, reason: str = "") -> None:
        self.pinned.add(stored.key)
        for dim in dims:
            self._channels.pin(self.ids(stored, dim), where, reason)

    def names_under(self, path: str) -> set[str]:
        return {key for key, names in self.names.items() if any(name.startswith(f"{path}.") for name in names)}

    def pin_what_others_use(self) -> None:
        """Parameters that also something uses that the forward has not called."""
        for key, dim in list(self.channels):
            others = [name for name in self.names[key] if self._owner[name] not in self._met]
            if others:
                reason = f"{others[0]} is the same tensor, in a module that the forward does not call"
                self._channels.pin(self.channels[key, dim], key, reason)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, a shared one under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
