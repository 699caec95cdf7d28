"""The CUDA backend on CPU tensors: the kernels of csrc/cuda, compiled for the CPU, which emulates the GPU's threads."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

from fusedreg.backends.base import Entry, Plan
from fusedreg.backends.cpp import DTYPES
from fusedreg.backends.cuda import CudaKernels
from fusedreg.backends.device_plan import DevicePlan
from fusedreg.memory import rejection_of_memory
from fusedreg.rules.spec import RuleSpec

ROOT = Path(__file__).parents[2]
CSRC, BACKENDS = ROOT / "csrc", ROOT / "tests" / "backends"
EMULATOR = BACKENDS / "emulator"
# A GPU's reciprocals and roots, as far off as they may be.
APPROXIMATIONS = "'-DFUSEDREG_APPROXIMATIONS=\"approximations_model.h\"'"

# What is no C++ in csrc/cuda, and what stands in for it.
TRANSLATIONS = {
    r"#if defined\(__CUDA_ARCH__\)": "#if true  // on a GPU",
    r"__shared__ (.+) (\w+);": r"\1& \2 = emulator::shared<\1>();",
    r"\b(\w+)(<.+>)<<<(\w+), (\w+), 0, [^;]+>>>\((\w+)\);": r'emulator::launch("\1", \3, \4, [&] { \1\2(\5); });',
    r'asm volatile\("mov\.s32 %0, %1;" : "=r"\((\w+)\) : "r"\((.+)\)\);': r"\1 = \2;",
    r'asm volatile\("trap;"\);': "__builtin_trap();",
    r'asm volatile\("prefetch\.global\.L2 \[%0\];" ::.+\);': "(void)i;",
}
NO_CPP = re.compile(r"__CUDA_ARCH__|__shared__ |<<<|asm[^;]*%\d")


@functools.cache
def module_in_csrc(name: str, csrc: Path = CSRC) -> ModuleType:
    """csrc/NAME.py, which setup.py imports."""
    spec = importlib.util.spec_from_file_location(name, csrc / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_where_changed(path: Path, text: str) -> None:
    """So that nothing is compiled again without need."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def copy_csrc(folder: Path, edits: dict[str, Iterable[tuple[str, str]]]) -> Path:
    """As C++ that a CPU's compiler takes, in FOLDER/csrc.

    Args:
        edits: of each file, regular expressions that match once, and what is to stand there.
    """
    copy = folder / "csrc"
    for source in (path for part in ("cuda", "maths", "plan", "rules", ".") for path in (CSRC / part).glob("*.*")):
        name = source.relative_to(CSRC).as_posix()
        text = source.read_text()
        for pattern, replacement in edits.get(name, ()):
            text, matches = re.subn(pattern, replacement, text, flags=re.DOTALL)
            assert matches == 1, (name, pattern)
        if name.startswith("cuda/"):
            for pattern, translation in TRANSLATIONS.items():
                text = re.sub(pattern, translation, text)
            assert not NO_CPP.search(text), (name, NO_CPP.search(text))
        write_where_changed(copy / name, text)
    return copy


def build_emulation(
    name: str, emulator: list[str], flags: list[str], edits: dict[str, Iterable[tuple[str, str]]]
) -> ModuleType:
    """An extension as setup.py makes of csrc/cuda, whose kernels are run by those sources in emulator/."""
    folder = ROOT / "build" / name
    csrc = copy_csrc(folder, edits)
    units = module_in_csrc("rule_units", csrc).write("cuda", folder)
    squares = folder / "squares.cpp"  # by its suffix a compiler knows a language
    write_where_changed(squares, '#include "cuda/squares.cu"\n')
    return cpp_extension.load(
        f"fusedreg_{name}",
        [str(csrc / "cuda" / "bindings.cpp"), str(squares), *units, *(str(EMULATOR / each) for each in emulator)],
        extra_include_paths=[str(csrc), str(EMULATOR), str(BACKENDS)],
        extra_cflags=["-Wno-unknown-pragmas", APPROXIMATIONS, *flags],
        extra_ldflags=[flag for flag in flags if flag.startswith("-fsanitize")],
        build_directory=str(folder),
    )


# Small blocks and chunks, of two rules and two dtypes: there are as many threads, and they share a few processors.
SMALL = {
    "cuda/args.h": [(r"kThreads = 256", "kThreads = 64"), (r"kChunkElements = 16 \* 1024", "kChunkElements = 512")],
    "maths/storage.h": [(r"case DType::kBFloat16:.+?default:", "default:")],
    "rules/registry.h": [
        (r"#define FUSEDREG_RULES\(RULE\).+", "#define FUSEDREG_RULES(RULE) RULE(adam, Adam) RULE(sgd, Sgd)\n")
    ],
}


@functools.cache
def build_for_thread_sanitizer() -> ModuleType:
    """Where a block's threads are threads. The process has ThreadSanitizer already: see test_cuda_threads.py."""
    return build_emulation("cuda_threads", ["at_once.cpp", "errors.cpp"], ["-O0", "-fsanitize=thread"], SMALL)


@functools.cache
def build() -> ModuleType:
    """Where a block's threads go one after the other."""
    its_block = {"cuda/device.h": [(r".+", '#include "in_turn.h"\n')]}
    return build_emulation("cuda_emulation", ["in_turn.cpp", "errors.cpp"], ["-O0"], its_block)


class EmulatedCudaBackend:
    """Stands in for CudaBackend, for CPU parameters; ``scalars_on_host`` as in fusedreg/backends/tables.py."""

    name = "cuda"
    device_type = "cpu"
    takes_units = True
    rounds_stochastically = False

    def __init__(self, scalars_on_host: bool, build: Callable[[], ModuleType] = build) -> None:
        self.scalars_on_host = scalars_on_host
        self._build = build

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
        if spec.name not in self._build().rules():
            return f"it has no kernel for the rule {spec.name!r}"
        return rejection_of_memory(param, states, state_dtype, grad_dtype, "cpu", DTYPES)

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        return DevicePlan(spec, entries, state, CudaKernels(self._build(), spec), self.scalars_on_host)
