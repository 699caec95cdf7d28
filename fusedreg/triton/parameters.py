"""The parameters of a plan with their gradients, state and clocks: what a plan rests on, checked in every step.

``Parameters`` does in Python what csrc/plan/tables.h does: the same tables, and the same answers. Where the compiled
extension is there it is taken, as a loop over a thousand parameters costs Python more than their step costs a GPU.
"""

from __future__ import annotations

import operator
import struct
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import Entry
from ..backends.base import columns, objects_held
from ..backends.cpp import load_extension
from .kernels import COLUMNS, MAX_STATES, NUMEL
from .rules import RULES
from .scalars import FLOAT32_AT, FLOAT64_AT, VALUE

_LAYOUT = operator.attrgetter("layout", "dtype", "device", "shape")
_GRAD = operator.attrgetter("grad")


class Rows(Protocol):
    """A row of the tables for each parameter that has a gradient."""

    def set_groups(self, groups: list[dict[str, float]]) -> bool:
        """Takes the groups' scalars, in the rule's order; False if another number of state tensors is needed."""

    def refresh(self) -> bool:
        """Reads the gradients; False if something that a plan rests on has changed."""

    def tables(self) -> tuple[bytes, bytes]:
        """Of this step: rows and slots (kernels.py)."""
        ...

    def move_clocks(self) -> None:
        """Those that the host keeps."""

    def finish_update(self) -> None:
        """After the kernels: copies back what was staged, and tells autograd of the in-place changes."""


def make_rows(rule: str, entries: list[Entry], state: dict[Any, Any], host_clocks: bool) -> Rows:
    made_by = CompiledParameters if load_extension()[0] is not None else Parameters
    return made_by(rule, entries, state, host_clocks)


class CompiledParameters(Rows):
    def __init__(self, rule: str, entries: list[Entry], state: dict[Any, Any], host_clocks: bool) -> None:
        extension, _ = load_extension()
        assert extension is not None
        self._held = objects_held(entries, state)
        self._tables = extension.Tables(
            rule,
            *columns(entries),
            state,
            host_clocks,
        )

    def set_groups(self, groups: list[dict[str, float]]) -> bool:
        return self._tables.set_groups([list(group.values()) for group in groups])

    def refresh(self) -> bool:
        return self._tables.refresh()

    def tables(self) -> tuple[bytes, bytes]:
        return self._tables.tables()

    def move_clocks(self) -> None:
        self._tables.move_clocks()

    def finish_update(self) -> None:
        self._tables.finish_update()


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


class Parameters(Rows):
    """Each check is one list made by C code, compared with another."""

    def __init__(self, rule: str, entries: list[Entry], state: dict[Any, Any], host_clocks: bool) -> None:
        active = [entry for entry in entries if entry.state is not None]
        self._rule = RULES[rule]
        self._params = [entry.param for entry in active]
        self._group_of_row = [entry.group for entry in active]
        self._clocks = [entry.clock for entry in active]
        self._host_clocks = [
            (row, clock) for row, clock in enumerate(self._clocks) if clock is not None and clock.is_cpu and host_clocks
        ]
        self._device_clocks = [
            (row, clock)
            for row, clock in enumerate(self._clocks)
            if clock is not None and not (clock.is_cpu and host_clocks)
        ]
        self._optimizer_state = state
        self._held = list(map(state.get, self._params))
        self._without_gradient = [entry.param for entry in entries if entry.state is None]
        self._state_dicts: list[dict[str, Any]] = [entry.state for entry in active if entry.state is not None]
        self._state_keys = [key for state in self._state_dicts for key in state]
        self._state_values = [value for state in self._state_dicts for value in state.values()]
        self._has_states = [_leading(state, self._rule.state_names) for state in self._state_dicts]
        self._param_layouts = Layouts.of(self._params)
        self._has_complex = any(param.is_complex() for param in self._params)
        # Elements as the kernels count them: a complex number is two real ones, as in torch's own optimizers.
        self._numels = [param.numel() * (2 if param.is_complex() else 1) for param in self._params]

        # Known when the groups are: the state tensors that their options need.
        self._groups: list[dict[str, float]] = []
        self._used: list[int] = []
        self._states: list[list[Tensor]] = []
        self._flat_states: list[Tensor] = []
        self._state_layouts = Layouts()
        # The strides that a gradient must have for the kernels to work in place; None where nothing would do.
        self._in_place: list[tuple[int, ...] | None] = []

        # Of this step: a list of addresses each for w, g and the state tensors, with one item a row, 0 for none.
        self._columns: list[list[int]] = []
        self._grads: list[Tensor] = []  # held, as another thread may set p.grad meanwhile
        self._staged: dict[int, Staged] = {}
        self._slots_made_for: Any = None
        self._slots: list[int] = []
        self._slot_of_row: list[int] = []

    def set_groups(self, groups: list[dict[str, float]]) -> bool:
        self._groups = groups
        needed = [self._rule.state_count(group) for group in groups]
        used = [needed[group] for group in self._group_of_row]
        if self._used:
            # Whether a rule keeps a clock changes with its state, and the optimizer makes both.
            return used == self._used
        if any(len(has) < count for has, count in zip(self._has_states, used, strict=True)):
            return False
        self._used = used
        self._states = [has[:count] for has, count in zip(self._has_states, used, strict=True)]
        self._flat_states = [tensor for states in self._states for tensor in states]
        self._state_layouts = Layouts.of(self._flat_states)
        self._in_place = [
            param.stride()
            if _is_dense(param) and _is_plain(param) and all(state.stride() == param.stride() for state in states)
            else None
            for param, states in zip(self._params, self._states, strict=True)
        ]
        return True

    def refresh(self) -> bool:
        if any(grad is not None for grad in map(_GRAD, self._without_gradient)):
            return False
        grads: list[Tensor] = list(map(_GRAD, self._params))
        if any(grad is None for grad in grads):
            return False
        # Layouts first: a sparse tensor has neither strides nor a pointer.
        layouts = self._param_layouts
        if list(map(_LAYOUT, grads)) != layouts.layouts or Layouts.of(self._params) != layouts:
            return False
        if not self._states_are_current():
            return False
        # Outside of InferenceMode, torch lets nobody write what was made inside.
        if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, self._written())):
            return False
        self._bind(grads)
        return True

    def _written(self) -> list[Tensor]:
        return [*self._params, *self._flat_states]

    def _states_are_current(self) -> bool:
        if not all(map(operator.is_, map(self._optimizer_state.get, self._params), self._held)):
            return False
        if [key for state in self._state_dicts for key in state] != self._state_keys:
            return False
        values = [value for state in self._state_dicts for value in state.values()]
        return all(map(operator.is_, values, self._state_values)) and Layouts.of(self._flat_states) == (
            self._state_layouts
        )

    def _bind(self, grads: list[Tensor]) -> None:
        self._staged.clear()
        self._grads = grads
        pointers = iter(self._state_layouts.pointers)
        states = [[next(pointers) for _ in range(used)] + [0] * (MAX_STATES - used) for used in self._used]
        self._columns = [
            list(self._param_layouts.pointers),
            list(map(Tensor.data_ptr, grads)),
            *([addresses[i] for addresses in states] for i in range(MAX_STATES)),
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

        staged = Staged(copy(self._params[row]), copy(grad), [copy(state) for state in self._states[row]])
        self._staged[row] = staged
        for column, tensor in zip(self._columns, (staged.param, staged.grad, *staged.state), strict=False):
            column[row] = tensor.data_ptr()

    def tables(self) -> tuple[bytes, bytes]:
        self._assign_slots()
        rows = [*self._columns, self._numels, self._slot_of_row]
        assert (len(rows), len(self._columns)) == (COLUMNS.value, NUMEL.value)
        numbers = array("q")
        for column in rows:
            numbers.extend(column)
        return numbers.tobytes(), array("q", self._slots).tobytes()

    def _assign_slots(self) -> None:
        addresses = [clock.data_ptr() for _, clock in self._device_clocks]
        values = array("q", array("d", [clock.item() for _, clock in self._host_clocks]).tobytes()).tolist()
        if self._slots_made_for == (addresses, values):
            return
        self._slots_made_for = (addresses, values)
        clocks = [(VALUE.value, bits_of(0.0))] * len(self._clocks)
        for row, clock in self._device_clocks:
            clocks[row] = encode_address(clock)
        for (row, _), value in zip(self._host_clocks, values, strict=True):
            clocks[row] = (VALUE.value, value)
        slots: dict[tuple[int, tuple[int, int]], int] = {}
        self._slot_of_row = [slots.setdefault(key, len(slots)) for key in zip(self._group_of_row, clocks, strict=True)]
        self._slots = [number for group, clock in slots for number in (group, *clock)]

    def move_clocks(self) -> None:
        for row, clock in self._host_clocks:
            clock.fill_(self._rule.next_clock(self._groups[self._group_of_row[row]], clock.item()))

    def finish_update(self) -> None:
        for row, staged in self._staged.items():
            # detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
            self._params[row].detach().copy_(staged.param)
            for state, copy in zip(self._states[row], staged.state, strict=True):
                state.detach().copy_(copy)
        self._staged.clear()
        self._grads = []
        # Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest.
        written = self._written()
        if torch.is_inference_mode_enabled():  # a tensor made there has no version
            written = [tensor for tensor in written if not tensor.is_inference()]
        torch.autograd.graph.increment_version(written)


def bits_of(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def encode_address(scalar: Tensor) -> tuple[int, int]:
    return (FLOAT64_AT if scalar.dtype == torch.float64 else FLOAT32_AT).value, scalar.data_ptr()


def _leading(state: Mapping[str, Any], names: Iterable[str]) -> list[Tensor]:
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
