"""The compiled CUDA backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .base import Entry, Plan, StepScalars, columns, objects_held, rejection_of_memory
from .cpp import DTYPES, load_extension


class CudaPlan(Plan):
    stays_on_device = True

    def __init__(
        self, extension: ModuleType, rule: str, entries: list[Entry], state: dict[Any, Any], host_clocks: bool = True
    ) -> None:
        self._step = extension.Step()
        self._scalar_names = extension.scalar_names(rule)
        self._device = entries[0].param.device
        self._held = objects_held(entries, state)
        self._plan = extension.Plan(
            rule,
            *columns(entries),
            state,
            host_clocks,
        )

    def refresh(self) -> bool:
        return self._plan.refresh()

    def set_groups(self, groups: list[dict[str, Any]], scalars: list[tuple[float | Tensor, ...]]) -> bool:
        on_device = [
            (index, name, self._to_device(value))
            for index, values in enumerate(scalars)
            for name, value in zip(self._scalar_names, values, strict=True)
            if isinstance(value, Tensor)
        ]
        on_host = [[0.0 if isinstance(value, Tensor) else value for value in values] for values in scalars]
        return self._plan.set_groups(on_host, on_device)

    def _to_device(self, scalar: Tensor) -> Tensor:
        """As the kernels read it: float32 or float64, on this plan's device. Waits for nothing."""
        dtype = scalar.dtype if scalar.dtype in (torch.float32, torch.float64) else torch.float32
        return scalar.detach().to(self._device, dtype, non_blocking=True)

    def _read(self, step: StepScalars) -> Any:
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._step.stream = torch.cuda.current_stream().cuda_stream
                self._step.capturing = torch.cuda.is_current_stream_capturing()
        scale = step.grad_scale
        if isinstance(scale, Tensor) and scale.device.type == self._device.type:
            self._step.grad_scale = self._to_device(scale)
        else:
            self._step.grad_scale, self._step.inv_grad_scale = None, step.inv_grad_scale
        self._step.found_inf = None if step.found_inf is None else self._to_device(step.found_inf)
        return self._step

    def sum_of_squares(self, step: StepScalars) -> Tensor:
        return self._plan.sum_of_squares(self._read(step))

    def update(self, step: StepScalars) -> None:
        if step.norm is None:
            self._plan.update(self._read(step), None, 0.0, None, None)
            return
        squares = step.norm.squares.to(self._device, non_blocking=True)
        limit = step.norm.max_grad_norm
        limit_on_host, limit_on_device = (0.0, self._to_device(limit)) if isinstance(limit, Tensor) else (limit, None)
        norm = step.norm.norm if step.norm.norm.device == self._device else torch.empty_like(squares[0])
        self._plan.update(self._read(step), squares, limit_on_host, limit_on_device, norm)


class CudaBackend:
    name = "cuda"
    device_type: str | None = "cuda"

    def unavailable_reason(self) -> str | None:
        if not torch.cuda.is_available():
            return "there is no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        return load_extension("_cuda")[1]

    def rejection(self, param: Tensor, states: list[Tensor]) -> str | None:
        return rejection_of_memory(param, states, "cuda", DTYPES)

    def make_plan(self, rule: str, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        extension, _ = load_extension("_cuda")
        assert extension is not None
        return CudaPlan(extension, rule, entries, state)
