"""The parameters of a plan with their gradients and state: what a plan rests on, checked in every step.

What csrc/plan/parameters.cpp is to the compiled backends. In Python a loop over a thousand parameters costs more than
their step on a GPU, so each check is one list made by C code, compared with another.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import Entry

_LAYOUT = operator.attrgetter("layout", "dtype", "device", "shape")
_GRAD = operator.attrgetter("grad")


@dataclass
class Staged:
    """Contiguous copies of a parameter that is not laid out as the kernels need it, of its gradient and its state."""

    param: Tensor
    grad: Tensor
    state: list[Tensor]


@dataclass
class Layouts:
    """Where some tensors are, and how."""

    pointers: list[int] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    layouts: list[tuple[Any, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Layouts:
        return cls(list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)), list(map(_LAYOUT, tensors)))


class Parameters:
    def __init__(self, entries: list[Entry], state_names: tuple[str, ...], optimizer_state: dict[Any, Any]) -> None:
        active = [entry for entry in entries if entry.state is not None]
        self.params = [entry.param for entry in active]
        self.groups = [entry.group for entry in active]
        self.clocks = [entry.clock for entry in active]
        self._optimizer_state = optimizer_state
        self._held = list(map(optimizer_state.get, self.params))
        self._without_gradient = [entry.param for entry in entries if entry.state is None]
        self._state_dicts: list[dict[str, Any]] = [entry.state for entry in active if entry.state is not None]
        self._state_keys = [key for state in self._state_dicts for key in state]
        self._state_values = [value for state in self._state_dicts for value in state.values()]
        self.states = [_leading(state, state_names) for state in self._state_dicts]
        self._flat_states = [tensor for states in self.states for tensor in states]
        self._param_layouts = Layouts.of(self.params)
        self._state_layouts = Layouts.of(self._flat_states)
        # The strides that a gradient must have for the kernels to work in place; None where nothing would do.
        self._in_place: list[tuple[int, ...] | None] = [
            param.stride()
            if _is_dense(param) and _is_plain(param) and all(state.stride() == param.stride() for state in states)
            else None
            for param, states in zip(self.params, self.states, strict=True)
        ]
        self._has_complex = any(param.is_complex() for param in self.params)
        self._staged: dict[int, Staged] = {}
        # Elements as the kernels count them: a complex number is two real ones, as in torch's own optimizers.
        self.numels = [param.numel() * (2 if param.is_complex() else 1) for param in self.params]
        # This step's pointers: a list each for w, g and the state tensors, with one item a parameter, 0 for none.
        self.columns: list[list[int]] = []
        self._width = len(state_names)

    def refresh(self) -> bool:
        """Reads the gradients; False if something that a plan rests on has changed."""
        if any(grad is not None for grad in map(_GRAD, self._without_gradient)):
            return False
        grads: list[Tensor] = list(map(_GRAD, self.params))
        if any(grad is None for grad in grads):
            return False
        # Layouts first: a sparse tensor has neither strides nor a pointer.
        layouts = self._param_layouts
        if list(map(_LAYOUT, grads)) != layouts.layouts or Layouts.of(self.params) != layouts:
            return False
        if not self._states_are_current():
            return False
        self._bind(grads)
        return True

    def _states_are_current(self) -> bool:
        if not all(map(operator.is_, map(self._optimizer_state.get, self.params), self._held)):
            return False
        if [key for state in self._state_dicts for key in state] != self._state_keys:
            return False
        values = [value for state in self._state_dicts for value in state.values()]
        return all(map(operator.is_, values, self._state_values)) and Layouts.of(self._flat_states) == (
            self._state_layouts
        )

    def _bind(self, grads: list[Tensor]) -> None:
        self._staged.clear()
        gradients = list(map(Tensor.data_ptr, grads))
        self.columns = [
            list(self._param_layouts.pointers),
            gradients,
            *([states[i].data_ptr() if i < len(states) else 0 for states in self.states] for i in range(self._width)),
        ]
        plain = not any(map(torch.is_neg, grads)) and not (self._has_complex and any(map(torch.is_conj, grads)))
        if plain and list(map(Tensor.stride, grads)) == self._in_place:
            return
        for row, (grad, strides) in enumerate(zip(grads, self._in_place, strict=True)):
            if grad.stride() != strides or not _is_plain(grad):
                self._stage(row, grad)

    def _stage(self, row: int, grad: Tensor) -> None:
        def copy(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())

        staged = Staged(copy(self.params[row]), copy(grad), [copy(state) for state in self.states[row]])
        self._staged[row] = staged
        for column, tensor in zip(self.columns, (staged.param, staged.grad, *staged.state), strict=False):
            column[row] = tensor.data_ptr()

    def finish_update(self) -> None:
        """After the kernels: copies back what was staged, and tells autograd of the in-place changes."""
        for row, staged in self._staged.items():
            # detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
            self.params[row].detach().copy_(staged.param)
            for state, copy in zip(self.states[row], staged.state, strict=True):
                state.detach().copy_(copy)
        self._staged.clear()
        # Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest.
        torch.autograd.graph.increment_version(self.params)
        torch.autograd.graph.increment_version(self._flat_states)


def _leading(state: dict[str, Any], names: Iterable[str]) -> list[Tensor]:
    """The state tensors, in the rule's order, up to the first that is missing."""
    found = []
    for name in names:
        if not isinstance(state.get(name), Tensor):
            break
        found.append(state[name])
    return found


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.is_conj() and not tensor.is_neg()


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor, which does not overlap itself, has no gaps in memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() in (0, extent)
