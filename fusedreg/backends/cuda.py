"""The compiled CUDA backend: kernels that nvcc compiled. Not yet run on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..memory import rejection_of_memory
from ..rules.spec import RuleSpec
from .base import Entry, Plan
from .cpp import DTYPES, load_extension
from .device_plan import DevicePlan, Kernels, Launch, StepTables
from .device_units import UnitLaunch, UnitLayout, UnitShape


class CudaKernels(Kernels):
    """Launches the kernels of one rule, on the current device."""

    def __init__(self, extension: ModuleType, spec: RuleSpec) -> None:
        self._extension = extension
        self._rule = spec.name
        self._dtypes = {getattr(torch, name): number for name, number in extension.DTYPES.items()}
        self.constants_width: int = extension.constants_width(spec.name)

    def squares(self, launch: Launch, tables: StepTables, partial_sums: Tensor) -> None:
        self._extension.squares(
            self._rule,
            self._dtypes[launch.dtype],
            *_chunks(launch, tables),
            tables.sets.data_ptr(),
            tables.scalars.data_ptr(),
            partial_sums.data_ptr(),
            partial_sums.numel(),
            tables.stream,
        )

    def ready(self, launches: Sequence[Launch], tables: StepTables, device: torch.device) -> None:
        """Everything was compiled ahead of time."""

    def ready_for_units(self, launches: Sequence[UnitLaunch], tables: StepTables) -> None:
        """Likewise."""

    def prepare(self, tables: StepTables, squares: Tensor | None, norm: Tensor | None) -> None:
        self._extension.prepare(
            self._rule,
            tables.sets.data_ptr(),
            tables.set_count,
            tables.scalars.data_ptr(),
            tables.constants.data_ptr(),
            *((0, 0) if squares is None else (squares.data_ptr(), squares.numel())),
            0 if norm is None else norm.data_ptr(),
            tables.stream,
        )

    def update(self, launch: Launch, tables: StepTables) -> None:
        self._extension.update(
            self._rule,
            self._dtypes[launch.dtype],
            launch.states,
            *_chunks(launch, tables),
            tables.constants.data_ptr(),
            tables.stream,
        )

    def unit_shape(self, layout: UnitLayout, element_size: int) -> UnitShape:
        return shape_of_threads(layout, element_size)

    def units(self, launch: UnitLaunch, tables: StepTables, number: int) -> None:
        assert tables.units is not None
        units, width = tables.units.data_ptr(), tables.units.element_size()
        self._extension.units(
            self._rule,
            self._dtypes[launch.dtype],
            launch.states,
            tables.rows.data_ptr(),
            tables.row_count,
            tables.constants.data_ptr(),
            units,
            units + width * launch.first_item,
            launch.items,
            tables.constants.data_ptr() + tables.constants.element_size() * tables.scratch,
            number,
            tables.stream,
        )


# A block's, as in csrc/cuda/args.h.
THREADS = 256


def shape_of_threads(layout: UnitLayout, element_size: int) -> UnitShape:
    """How the threads of a block share a panel's weights, powers of two each. Within a run, threads are side by side as
    far as each has a few weights left. Where a run is short, the other threads take other slices, or other units, as
    many as fill a sector of 32 bytes, so that nothing is read twice."""
    along = min(_power_of_two_in(layout.run), max(32, _power_of_two_in(layout.run // 8)), THREADS)
    in_sector = max(32 // (element_size * along), 1)
    slices = min(THREADS // along // in_sector, 2 * _power_of_two_in(layout.outer))
    if layout.outer == 1:
        slices = 1
    together = min(THREADS // along // slices, 2 * _power_of_two_in(layout.units))
    return UnitShape(together, along)


def _power_of_two_in(number: int) -> int:
    """The largest that is not above it; 1 for 0."""
    return 1 << max(number.bit_length() - 1, 0)


def _chunks(launch: Launch, tables: StepTables) -> tuple[bool, int, int, int, int]:
    """What a kernel that walks chunks is given of them: whether they are aligned, the rows, the chunks."""
    first_chunk = tables.chunks.data_ptr() + 2 * launch.first_chunk * tables.chunks.element_size()
    return launch.is_aligned, tables.rows.data_ptr(), tables.row_count, first_chunk, launch.chunks


@functools.cache
def _rules() -> frozenset[str]:
    extension, _ = load_extension("_cuda")
    return frozenset(extension.rules()) if extension is not None else frozenset()


class CudaBackend:
    name = "cuda"
    device_type: str | None = "cuda"
    takes_units = True
    rounds_stochastically = False

    def unavailable_reason(self) -> str | None:
        if not torch.cuda.is_available():
            return "there is no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        return load_extension("_cuda")[1]

    def rejection(
        self,
        spec: RuleSpec,
        param: Tensor,
        states: list[Tensor],
        state_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> str | None:
        if spec.name not in _rules():
            return f"it has no kernel for the rule {spec.name!r}"
        return rejection_of_memory(param, states, state_dtype, grad_dtype, "cuda", DTYPES)

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        extension, _ = load_extension("_cuda")
        assert extension is not None
        return DevicePlan(spec, entries, state, CudaKernels(extension, spec))
