"""The parameters of a plan as tables of numbers, which the kernels of both GPU backends walk in device memory.

csrc/plan/tables.h makes them and checks, in every step, all that a plan rests on. ``PythonTables`` does the same where
the compiled extension is not there: the same tables, bit for bit, and the same answers, but slowly.
"""

from __future__ import annotations

import struct
from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hyperparameters import compiled_field_names
from ..memory import copy_of, has_layout_of, is_plain, local
from ..rules.spec import COMMON, RuleSpec
from .base import Entry, make_columns, objects_held
from .cpp import load_extension

MAX_STATES, MAX_SCALAR_STATES = 3, 3  # of any rule

# How a scalar stands in a table: two numbers, its kind, and its value's bits or its address. FLOAT32_VALUE: a value
# that the host keeps in float32.
VALUE, FLOAT32_AT, FLOAT64_AT, FLOAT32_VALUE = range(4)

# The columns of `rows`, each with an item for every parameter that has a gradient: pointers to w, g and the states (0
# for one that is not needed), the number of elements, the scalar set.
W, G, STATE = range(3)
NUMEL, SET, ROW_COLUMNS = (STATE + MAX_STATES + i for i in range(3))

# A scalar set in `sets`: a group, and the scalar states as two numbers each.
SET_WIDTH = 1 + 2 * MAX_SCALAR_STATES


def encode_value(value: float) -> tuple[int, int]:
    return VALUE, struct.unpack("q", struct.pack("d", value))[0]


def encode_address(scalar: Tensor) -> tuple[int, int]:
    """Of a float32 or float64 scalar, which is read where it is."""
    return FLOAT64_AT if scalar.dtype == torch.float64 else FLOAT32_AT, scalar.data_ptr()


class Tables(Protocol):
    def set_groups(self, groups: list[dict[str, Any]], numbers: list[list[float]]) -> None:
        """As ``Plan.set_groups``, with 0 for numbers that only the device knows: no scalar state is moved by them."""

    def refresh(self, gradients: list[Tensor | None] | None) -> bool:
        """As ``Plan.refresh``."""
        ...

    def tables(self) -> tuple[bytes, bytes]:
        """Of this step: rows and sets."""
        ...

    def move_scalar_states(self) -> None:
        """Those that the host keeps."""

    def finish_update(self) -> None:
        """After the kernels: copies back what was staged, and tells autograd of the in-place changes."""


def make_tables(spec: RuleSpec, entries: list[Entry], state: dict[Any, Any], scalars_on_host: bool) -> Tables:
    """``scalars_on_host``: scalar states in the CPU's memory are the host's to move. False only where the CPU emulates
    the GPU."""
    extension, _ = load_extension()
    compiled = extension is not None and spec.name in extension.rules()
    return (CompiledTables if compiled else PythonTables)(spec, entries, state, scalars_on_host)


class CompiledTables(Tables):
    def __init__(self, spec: RuleSpec, entries: list[Entry], state: dict[Any, Any], scalars_on_host: bool) -> None:
        extension, _ = load_extension()
        assert extension is not None
        columns = make_columns(spec, entries, state)
        self._held = objects_held(entries, state), columns
        self._tables = extension.Tables(spec.name, columns, scalars_on_host)

    def set_groups(self, groups: list[dict[str, Any]], numbers: list[list[float]]) -> None:
        self._tables.set_groups(numbers)

    def refresh(self, gradients: list[Tensor | None] | None) -> bool:
        return self._tables.refresh(gradients)

    def tables(self) -> tuple[bytes, bytes]:
        return self._tables.tables()

    def move_scalar_states(self) -> None:
        self._tables.move_scalar_states()

    def finish_update(self) -> None:
        self._tables.finish_update()


class PythonTables(Tables):
    def __init__(self, spec: RuleSpec, entries: list[Entry], state: dict[Any, Any], scalars_on_host: bool) -> None:
        self._spec, self._entries, self._state, self._scalars_on_host = spec, entries, state, scalars_on_host
        self._active = [entry for entry in entries if entry.state is not None]
        self._written = [[entry.param, *_there(entry.states)] for entry in self._active]
        self._held = objects_held(entries, state)  # so that no other object comes to have the identity of one of them
        self._rests_on = self._observe()
        self._groups: list[dict[str, Any]] = []
        # Of this step: the first columns of each row; the gradients, held as another thread may set p.grad meanwhile.
        self._pointers: list[list[int]] = []
        self._grads: list[Tensor] = []
        self._staged: list[tuple[Tensor, Tensor]] = []

    def set_groups(self, groups: list[dict[str, Any]], numbers: list[list[float]]) -> None:
        names = compiled_field_names(self._spec)
        self._groups = []
        for group, values in zip(groups, numbers, strict=True):
            number_of, own = dict(zip(names, values, strict=True)), dict(group)
            for each in (*COMMON, *self._spec.hyperparameters):
                if each.field_names:
                    its = tuple(number_of[name] for name in each.field_names)
                    own[each.name] = its[0] if each.fields is None else its
            self._groups.append(own)

    def _observe(self) -> Any:
        """What stays the same as long as a plan can be kept."""
        dicts = [self._state, *(entry.state for entry in self._active if entry.state is not None)]
        return (
            [(id(key), id(value)) for each in dicts for key, value in each.items()],
            [(local(each).data_ptr(), each.shape, each.dtype) for written in self._written for each in written],
            [local(entry.param).stride() for entry in self._active],
        )

    def refresh(self, gradients: list[Tensor | None] | None) -> bool:
        grads = [entry.param.grad for entry in self._entries] if gradients is None else gradients
        if any((grad is None) != (entry.state is None) for entry, grad in zip(self._entries, grads, strict=True)):
            return False
        if self._observe() != self._rests_on:
            return False
        for (param, *_), grad in zip(self._written, _there(grads), strict=True):
            known = (local(param).shape, param.dtype, param.device)
            if not is_plain(grad) or (grad.shape, grad.dtype, grad.device) != known:
                return False
        # Outside of InferenceMode, torch lets nobody write what was made inside.
        if not torch.is_inference_mode_enabled() and any(
            each.is_inference() for written in self._written for each in written
        ):
            return False
        self._pointers, self._grads, self._staged = [], [], []
        for entry, written, grad in zip(self._active, self._written, _there(grads), strict=True):
            self._bind(entry, written, grad)
        return True

    def _bind(self, entry: Entry, written: list[Tensor], grad: Tensor) -> None:
        param = local(entry.param)
        tensors = [param, grad, *(None if each is None else local(each) for each in entry.states)]
        if not (
            torch.ops.aten.is_non_overlapping_and_dense(param)
            and _is_as_stored(param)
            and _is_as_stored(grad)
            and all(has_layout_of(param, each) for each in _there(tensors))
        ):
            tensors = [None if each is None else copy_of(each) for each in tensors]
            self._staged += zip(map(local, written), _there([tensors[W], *tensors[STATE:]]), strict=True)
        pointers = [0 if each is None else each.data_ptr() for each in tensors]
        self._pointers.append(pointers + [0] * (NUMEL - len(pointers)))
        self._grads += _there([tensors[G]])

    def tables(self) -> tuple[bytes, bytes]:
        index_of: dict[tuple[int, ...], int] = {}
        set_index = [index_of.setdefault(self._set_of(entry), len(index_of)) for entry in self._active]
        numels = [local(entry.param).numel() * (2 if entry.param.is_complex() else 1) for entry in self._active]
        columns = [*([row[i] for row in self._pointers] for i in range(NUMEL)), numels, set_index]
        rows = array("q", [number for column in columns for number in column])
        return rows.tobytes(), array("q", [number for each in index_of for number in each]).tobytes()

    def _is_on_host(self, scalar: Tensor) -> bool:
        return self._scalars_on_host and scalar.is_cpu

    def _value(self, scalar: Tensor | None) -> float:
        return scalar.item() if scalar is not None and self._is_on_host(scalar) else 0.0

    def _set_of(self, entry: Entry) -> tuple[int, ...]:
        numbers = [entry.group]
        for scalar in entry.scalar_states:
            if scalar is None or self._is_on_host(scalar):
                kind, bits = encode_value(self._value(scalar))
                is_single = scalar is not None and scalar.dtype != torch.float64
                numbers += (FLOAT32_VALUE if is_single else kind, bits)
            else:
                numbers += encode_address(scalar)
        return (*numbers, *[0] * (SET_WIDTH - len(numbers)))

    def move_scalar_states(self) -> None:
        """As the spec says."""
        for entry in self._active:
            scalars = dict(zip((each.name for each in self._spec.scalar_states), entry.scalar_states, strict=True))
            before = {name: self._value(scalar) for name, scalar in scalars.items()}
            dtypes = {name: torch.float64 if scalar is None else scalar.dtype for name, scalar in scalars.items()}
            after = self._spec.next_scalars(before, self._groups[entry.group], dtypes)
            for name, scalar in scalars.items():
                if scalar is not None and self._is_on_host(scalar):
                    scalar.fill_(after[name])

    def finish_update(self) -> None:
        for original, copy in self._staged:
            # detach(): an in-place copy into a leaf, or into a view of one, is what autograd would forbid.
            original.detach().copy_(copy)
        self._staged, self._grads = [], []
        # Raw pointers bypass autograd's check of in-place changes; the version counters keep it honest. A tensor that
        # was made in InferenceMode has none.
        written = {
            each for its in self._written for one in its for each in (one, local(one)) if not each.is_inference()
        }
        torch.autograd.graph.increment_version(written)


def _there(tensors: Any) -> list[Tensor]:
    return [each for each in tensors if each is not None]


def _is_as_stored(tensor: Tensor) -> bool:
    return not tensor.is_conj() and not tensor.is_neg()
