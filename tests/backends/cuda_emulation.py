"""The CUDA backend with a host that plays device: csrc/cuda/plan.cpp and block.h as they are, on CPU tensors."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.utils import cpp_extension

from fusedreg.backends.base import Entry, Plan, rejection_of_memory
from fusedreg.backends.cpp import DTYPES
from fusedreg.backends.cuda import CudaPlan

ROOT = Path(__file__).parents[2]


@functools.cache
def build():
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "fusedreg_cuda_emulation",
        [str(ROOT / path) for path in SOURCES],
        extra_cflags=["-O1", "-Wno-unknown-pragmas"],
        build_directory=str(folder),
    )


SOURCES = ("csrc/cuda/bindings.cpp", "csrc/cuda/plan.cpp", "csrc/plan/parameters.cpp", "tests/backends/emulator.cpp")


class EmulatedCudaBackend:
    """Stands in for CudaBackend, for CPU parameters; ``host_clocks`` as in csrc/cuda/plan.h."""

    name = "cuda"
    device_type = "cpu"

    def __init__(self, host_clocks: bool) -> None:
        self.host_clocks = host_clocks

    def unavailable_reason(self) -> str | None:
        return None

    def rejection(self, param: torch.Tensor, states: list[torch.Tensor]) -> str | None:
        return rejection_of_memory(param, states, "cpu", DTYPES)

    def make_plan(self, rule: str, entries: list[Entry], differentiable: bool, state: dict) -> Plan:
        return CudaPlan(build(), rule, entries, state, self.host_clocks)
