"""The compiled CPU backend."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base import Entry, Plan, StepScalars

REBUILD = "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .` in fusedreg's source folder"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


@functools.cache
def load_extension() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and the reason why it cannot be used."""
    try:
        built_with = importlib.import_module("fusedreg._built_with").TORCH_VERSION
    except ImportError:
        return None, f"the compiled extension is not there: {REBUILD}"
    # Asked before the import: an extension on another torch's binary interface can crash, or quietly go wrong.
    if built_with != torch.__version__:
        return None, f"it was compiled for torch {built_with}, and this is torch {torch.__version__}: {REBUILD}"
    try:
        return importlib.import_module("fusedreg._C"), None
    except ImportError as error:
        return None, f"the compiled extension does not load ({error}): {REBUILD}"


class CppPlan(Plan):
    def __init__(self, rule: str, entries: list[Entry]) -> None:
        extension, _ = load_extension()
        assert extension is not None
        self._plan = extension.Plan(
            rule,
            [entry.param for entry in entries],
            [entry.group for entry in entries],
            [entry.state for entry in entries],
            [entry.clock for entry in entries],
        )

    def refresh(self) -> bool:
        return self._plan.refresh()

    def set_groups(self, groups: list[dict[str, Any]], scalars: list[tuple[float, ...]]) -> bool:
        return self._plan.set_groups(scalars)

    def sum_of_squares(self, step: StepScalars) -> float:
        return self._plan.sum_of_squares(float(step.inv_grad_scale))

    def update(self, step: StepScalars) -> None:
        self._plan.update(float(step.inv_grad_scale), float(step.clip_coef))


class CppBackend:
    name = "cpp"

    def unavailable_reason(self) -> str | None:
        return load_extension()[1]

    def rejection(self, param: Tensor, states: list[Tensor]) -> str | None:
        if param.device.type != "cpu":
            return f"it runs on CPU parameters, and one is on {param.device}"
        if param.dtype not in DTYPES:
            return f"it has no kernel for {param.dtype} parameters"
        if param.layout != torch.strided or is_traceable_wrapper_subclass(param):
            return f"it needs plain memory, and one parameter is a {type(param).__name__} of layout {param.layout}"
        for state in states:
            if state.dtype != param.dtype or state.shape != param.shape or state.device != param.device:
                return (
                    f"it needs state of the parameter's dtype, shape and device, and one is {state.dtype} of "
                    f"{tuple(state.shape)} on {state.device} beside {param.dtype} of {tuple(param.shape)}"
                )
        return None

    def make_plan(self, rule: str, entries: list[Entry], differentiable: bool) -> Plan:
        return CppPlan(rule, entries)
