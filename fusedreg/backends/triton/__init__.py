"""The Triton backend: kernels in Python, which Triton compiles on first use. Compiles, not yet run on a GPU.

With TRITON_INTERPRET=1 in the environment it takes CPU parameters instead, for whoever wants to step through a kernel.

The rest of this package is imported only where Triton is there: the maths (maths, rules/, kernels), what it reads
(scalars), how it is compiled and launched (compilation, tuning, launch), and Triton's interpreter (interpreter).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from typing import Any

import torch
from torch import Tensor

from ...memory import rejection_of_memory
from ...rules.spec import RuleSpec
from ..base import Entry, Plan
from ..cpp import DTYPES

# The first release whose JIT functions take and return the tuples that the kernels use. torch 2.8 brings it.
OLDEST = (3, 4)


@functools.cache
def why_not_triton() -> str | None:
    """Why the kernels cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:
        return f"Triton does not load ({type(error).__name__}: {error})"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, and this is {version}"
    try:
        importlib.import_module(f"{__name__}.launch")
    except Exception as error:
        return f"Triton {version} does not take the kernels ({type(error).__name__}: {error})"
    return None


def is_interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU parameters."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class TritonBackend:
    name = "triton"
    device_type: str | None = "cuda"
    """In the interpreter too, where it takes CPU parameters only if it is asked for by name."""
    takes_units = True
    rounds_stochastically = False

    def __init__(self, scalars_on_host: bool = True) -> None:
        """``scalars_on_host`` as in ``make_tables``."""
        self._scalars_on_host = scalars_on_host

    def unavailable_reason(self) -> str | None:
        if is_interpreting():
            reason = why_not_triton()
            if reason is None and not importlib.import_module(f"{__name__}.interpreter").has_the_kernels():
                reason = "TRITON_INTERPRET was set after the kernels were loaded (allowed: before Python starts)"
            return reason
        if not torch.cuda.is_available():
            return "there is no GPU that this torch can use (TRITON_INTERPRET=1 in the environment takes the CPU)"
        return why_not_triton()

    def rejection(
        self,
        spec: RuleSpec,
        param: Tensor,
        states: list[Tensor],
        state_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> str | None:
        device_type = "cpu" if is_interpreting() else "cuda"
        reason = rejection_of_rule(spec) or rejection_of_memory(
            param, states, state_dtype, grad_dtype, device_type, DTYPES
        )
        if reason is None and param.is_cuda and torch.version.cuda is not None and _capability(param.device) < (8, 0):
            return f"Triton needs an NVIDIA GPU of compute capability 8.0 or newer, and {param.device} is older"
        return reason

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        from ..device_plan import DevicePlan
        from .launch import TritonKernels

        if is_interpreting():
            from .. import log_once
            from .interpreter import correct_the_interpreter

            correct_the_interpreter()
            log_once(
                "TRITON_INTERPRET is set: backend 'triton' runs in Triton's interpreter, to be read and not to train"
            )
        return DevicePlan(spec, entries, state, TritonKernels(spec), self._scalars_on_host)


def rejection_of_rule(spec: RuleSpec) -> str | None:
    """Why the kernels cannot take a rule, or None."""
    from .rules import RULES

    return None if spec.name in RULES else f"it has no kernel for the rule {spec.name!r}"
