"""The compiled CUDA backend: kernels that nvcc compiled. Not yet run on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rules.spec import RuleSpec
from .base import Entry, Plan
from .cpp import DTYPES, load_extension
from .device_plan import DevicePlan, Kernels, Launch, StepTables
from .memory import rejection_of_memory


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
    takes_units = False

    def unavailable_reason(self) -> str | None:
        if not torch.cuda.is_available():
            return "there is no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        return load_extension("_cuda")[1]

    def rejection(self, spec: RuleSpec, param: Tensor, states: list[Tensor]) -> str | None:
        if spec.name not in _rules():
            return f"it has no kernel for the rule {spec.name!r}"
        return rejection_of_memory(param, states, "cuda", DTYPES)

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        extension, _ = load_extension("_cuda")
        assert extension is not None
        return DevicePlan(spec, entries, state, CudaKernels(extension, spec))
