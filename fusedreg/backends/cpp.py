"""The compiled CPU backend."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..codes import DTYPES as CODES
from ..hyperparameters import Numbers
from ..memory import rejection_of_memory
from ..rules.spec import RuleSpec
from .base import Entry, Plan, StepScalars, make_columns, objects_held

REBUILD = "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .` in fusedreg's source folder"
SOURCES = Path(__file__).parents[2]
BUILD_OR_LEAVE = (
    "if you have installed it, run Python in another folder, or `fusedreg info`; to use these sources, "
    "`pip install --no-build-isolation --editable .`"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor: (2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def load_extension(name: str = "_C") -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and the reason why it cannot be used."""
    try:
        built_with = importlib.import_module("fusedreg._built_with")
    except ImportError:
        if (SOURCES / "setup.py").exists():
            return None, f"Python runs in the source folder {SOURCES}, in which nothing was built: {BUILD_OR_LEAVE}"
        return None, f"the compiled extension is not there: {REBUILD}"
    reason = built_with.NOT_BUILT.get(name)
    if reason is not None:
        return None, reason
    # Asked before the import: an extension on another torch's binary interface can crash, or quietly go wrong.
    expected = built_with.TORCH_VERSION
    if expected is None:
        if _release(torch.__version__) < built_with.OLDEST_TORCH:
            oldest = ".".join(map(str, built_with.OLDEST_TORCH))
            return None, f"fusedreg's wheel is for torch {oldest} and later, and this is {torch.__version__}: {REBUILD}"
    elif torch.__version__ != expected:
        return None, f"it was compiled for torch {expected}, and this is torch {torch.__version__}: {REBUILD}"
    try:
        return importlib.import_module(f"fusedreg.{name}"), None
    except (ImportError, AttributeError, RuntimeError) as error:  # the wheel's, on a torch that answers otherwise
        return None, f"the compiled extension does not load ({error}): {REBUILD}"


OTHER, SAME, OTHER_NUMBERS = range(3)
"""What a watch sees: ``Watch::Seen`` of csrc/plan/watch.h."""


def make_watch(attributes: dict[str, Any], empty: tuple[dict[Any, Any], ...], followed: tuple[str, ...]) -> Any:
    """Of an optimizer's ``__dict__`` and its param groups, whose parameters and constants the caller holds; None where
    there is no extension, or the groups are no lists and dicts.

    Args:
        empty: hooks, its own and torch's, of which there are none.
        followed: the keys of groups under which other floats may come to be.
    """
    extension, _ = load_extension()
    groups = attributes["param_groups"]
    are_plain = type(groups) is list and all(isinstance(each, dict) and type(each["params"]) is list for each in groups)
    return extension.Watch(attributes, empty, followed) if extension is not None and are_plain else None


@functools.cache
def _rules() -> frozenset[str]:
    extension, _ = load_extension()
    return frozenset(extension.rules()) if extension is not None else frozenset()


def _state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a kernel converts, without a loss, to what it computes in for parameters of ``dtype``."""
    if dtype.is_complex:
        return (dtype,)
    narrow = (torch.float32, torch.bfloat16, torch.float16, *CODES)
    return (torch.float64, *narrow) if dtype == torch.float64 else narrow


class CppPlan(Plan):
    stays_on_device = False

    def __init__(self, spec: RuleSpec, entries: list[Entry], state: dict[Any, Any]) -> None:
        extension, _ = load_extension()
        assert extension is not None
        columns = make_columns(spec, entries, state)
        self._held = objects_held(entries, state), columns
        self._plan = extension.Plan(spec.name, columns)

    def refresh(self, gradients: list[Tensor | None] | None = None) -> bool:
        return self._plan.refresh(gradients)

    def set_groups(self, groups: list[dict[str, Any]], numbers: Numbers) -> None:
        self._plan.set_groups(numbers)

    def sum_of_squares(self, step: StepScalars) -> float:
        return self._plan.sum_of_squares(step.inv_grad_scale)

    def update(self, step: StepScalars) -> None:
        self._plan.update(step.inv_grad_scale, step.clip_coef, step.rounding_keys, step.next_seeds)


class CppBackend:
    name = "cpp"
    device_type: str | None = "cpu"
    takes_units = True
    rounds_stochastically = True

    def unavailable_reason(self) -> str | None:
        return load_extension()[1]

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
        return rejection_of_memory(param, states, state_dtype, grad_dtype, "cpu", DTYPES, _state_dtypes)

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        return CppPlan(spec, entries, state)
