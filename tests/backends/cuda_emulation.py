"""The CUDA backend on CPU tensors: csrc/cuda/block.h, compiled for the CPU, which emulates the GPU's threads."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

from fusedreg.backends.base import Entry, Plan
from fusedreg.backends.cpp import DTYPES
from fusedreg.backends.cuda import CudaKernels
from fusedreg.backends.device_plan import DevicePlan
from fusedreg.backends.memory import rejection_of_memory
from fusedreg.rules.spec import RuleSpec

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR = ROOT / "csrc", ROOT / "tests" / "backends"
# A GPU's reciprocals and roots, as far off as they may be.
APPROXIMATIONS = "'-DFUSEDREG_APPROXIMATIONS=\"approximations_model.h\"'"


@functools.cache
def module_in_csrc(name: str) -> ModuleType:
    """csrc/NAME.py, which setup.py imports."""
    spec = importlib.util.spec_from_file_location(name, CSRC / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def build() -> ModuleType:
    folder = ROOT / "build" / "cuda_emulation"
    units = module_in_csrc("rule_units").write("cuda", folder, kernels="emulator.h")
    return cpp_extension.load(
        "fusedreg_cuda_emulation",
        [str(CSRC / "cuda" / "bindings.cpp"), str(EMULATOR / "emulator.cpp"), *units],
        extra_include_paths=[str(CSRC), str(EMULATOR)],
        extra_cflags=["-O0", "-Wno-unknown-pragmas", APPROXIMATIONS],
        build_directory=str(folder),
    )


class EmulatedCudaBackend:
    """Stands in for CudaBackend, for CPU parameters; ``scalars_on_host`` as in fusedreg/backends/tables.py."""

    name = "cuda"
    device_type = "cpu"
    takes_units = True
    rounds_stochastically = False

    def __init__(self, scalars_on_host: bool) -> None:
        self.scalars_on_host = scalars_on_host

    def unavailable_reason(self) -> str | None:
        return None

    def rejection(
        self,
        spec: RuleSpec,
        param: torch.Tensor,
        states: list[torch.Tensor],
        state_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> str | None:
        if spec.name not in build().rules():
            return f"it has no kernel for the rule {spec.name!r}"
        return rejection_of_memory(param, states, state_dtype, grad_dtype, "cpu", DTYPES)

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        return DevicePlan(spec, entries, state, CudaKernels(build(), spec), self.scalars_on_host)
