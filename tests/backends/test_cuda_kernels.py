"""The CUDA kernels compile for every architecture that we name: nothing spills, and memory moves 16 bytes at a time.

`pytest -s` prints each kernel's registers, shared memory, stack and spills.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bandwidth_model import H100, H200, share_of_bandwidth
from cuda_emulation import CSRC, module_in_csrc
from helpers import OPTIMIZER_VARIANTS, variant_of
from machine_code import (
    DOUBLE,
    LOAD,
    STORE,
    Loop,
    calls,
    cuobjdump,
    functions,
    innermost,
    instructions,
    loops_of,
    loops_over_packs,
)

DTYPES = ("float", "double", "BFloat16", "Float16")
UNITS = ("squares", *(header for header, _ in module_in_csrc("rule_units").rules()))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


class Kernel(NamedTuple):
    kind: str
    """prepare, squares, update or units."""
    states: int = 0
    """A mask."""
    dtype: str = ""

    def __str__(self) -> str:
        return " ".join((self.kind, *([f"{self.states:03b}"] if self.kind in ("update", "units") else []), self.dtype))


def kernel_of(mangled: str) -> Kernel:
    kind, states, dtype = re.search(
        r"(prepare|squares|update|units)_kernelI(?:NS_\d+\w+?E)??(?:Lj(\d+)E)?(f|d|NS_\d(?:BFloat16|Float16))?E",
        mangled,
    ).groups()
    return Kernel(kind, int(states or 0), {"f": "float", "d": "double", None: ""}.get(dtype, (dtype or "")[4:]))


class Compiled(NamedTuple):
    unit: str
    architecture: str
    folder: Path
    report: str
    """What ptxas says."""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def compile_unit(unit: str, architecture: str, folder: Path) -> Compiled:
    module_in_csrc("rule_units").write("cuda", folder, "cu")
    source = CSRC / "cuda" / "squares.cu" if unit == "squares" else folder / f"cuda_{unit}.cu"
    options = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", f"-arch={architecture}", "-Xptxas=-v")
    report = run(
        "nvcc", *options, "-cubin", str(source), "-o", str(folder / "cubin"), "--keep", "--keep-dir", str(folder)
    )
    return Compiled(unit, architecture, folder, report)


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory) -> Iterator[dict[str, Future[Compiled]]]:
    """Those that this run's tests ask for, on all processors, in the order of the tests."""
    items = [item for item in request.session.items if item.path == request.path]
    names = dict.fromkeys(item.callspec.params["compiled"] for item in items)
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {
        name: pool.submit(compile_unit, *name.split("-"), tmp_path_factory.mktemp(name, numbered=False))
        for name in names
    }
    pool.shutdown(cancel_futures=True)


# Each rule for one architecture, and a few for each; all of all is minutes more.
TARGETS = [
    pytest.param(
        f"{unit}-sm_{number}", marks=() if number == 90 or unit in ("squares", "adam", "sgd") else pytest.mark.slow
    )
    for number in (80, 90, 100)
    for unit in UNITS
]


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, compilations) -> Compiled:
    return compilations[request.param].result()


@functools.cache
def expected_kernels(unit: str) -> set[Kernel]:
    """Those that the variants of a rule's optimizers need."""
    if unit == "squares":
        return {Kernel("squares", dtype=dtype) for dtype in DTYPES}
    found = {Kernel("prepare")}
    for cls, variant in OPTIMIZER_VARIANTS:
        if cls.spec.name == unit:
            group = cls([torch.zeros(1)], **variant_of(cls, variant)).param_groups[0]
            states = sum(1 << i for i, state in enumerate(cls.spec.states) if state.needed(group))
            found.update(Kernel("update", states, dtype) for dtype in DTYPES)
            of_metric = 0 if cls.spec.metric is None else states
            found.update(Kernel("units", of_metric, dtype) for dtype in DTYPES)
    return found


RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
)


def one_line(report: str) -> str:
    return report.replace("\n", " ")


def test_nothing_spills(compiled: Compiled) -> None:
    kernels = {kernel_of(found["name"]): found for found in RESOURCES.finditer(one_line(compiled.report))}
    assert set(kernels) == expected_kernels(compiled.unit)
    print(f"\n{compiled.unit + ' ' + compiled.architecture:24}registers  shared  stack  spilled (bytes)")
    for kernel, found in kernels.items():
        spilled = int(found["stores"]) + int(found["loads"])
        print(f"{kernel!s:24}{found['registers']:>9}{found['shared'] or 0:>8}{found['stack']:>7}{spilled:>9}")
    # With 256 threads a block, 128 registers still let two blocks share a multiprocessor, 80 three, 64 four.
    for kernel, found in kernels.items():
        is_small = kernel.kind == "update" and kernel.dtype != "double" and kernel.states.bit_count() <= 2
        assert int(found["registers"]) <= (128 if not is_small else 64 if kernel.dtype == "float" else 80), kernel
    # ptxas reports device functions that it did not inline (pow) too
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.report)
    assert set(spills) == {("0", "0", "0")}


def machine_code(compiled: Compiled) -> dict[Kernel, str]:
    return {kernel_of(name): body for name, body in functions(compiled.folder / "cubin").items()}


def test_memory_moves_16_bytes_at_a_time(compiled: Compiled) -> None:
    """In the machine code, or in PTX where there is no disassembler: every loop over packs loads all of its streams so,
    and stores all that it writes. Nothing of an update goes by a generic address."""
    if cuobjdump() is not None:
        kernels = machine_code(compiled)
        load, store, generic = rf"\b{LOAD}", rf"\b{STORE}", r"\b(?:LD|ST)\.E"
    else:
        names_and_bodies = re.split(r"\.entry (\w+)", next(compiled.folder.glob("*.ptx")).read_text())[1:]
        kernels = dict(zip(map(kernel_of, names_and_bodies[::2]), names_and_bodies[1::2], strict=True))
        load, store = (rf"{way}\.global\.(?:v4\.[bfu]32|v2\.[bfu]64)" for way in ("ld", "st"))
        generic = r"\b(?:ld|st)\.[bfsuv]\d"
    assert set(kernels) == expected_kernels(compiled.unit)
    for kernel, body in kernels.items():
        if kernel.kind == "prepare":
            continue
        loads, stores = (len(re.findall(way, body)) for way in (load, store))
        if kernel.kind == "squares":
            assert loads >= 4, kernel  # on their way at once
        elif kernel.kind == "units":  # element by element, as units lie in memory in any way
            assert not re.search(generic, body), kernel
        else:
            written = 1 + kernel.states.bit_count()
            loops = 4  # at the least: a prox or none, a penalty in the gradient or none
            assert loads * written == stores * (1 + written), kernel
            assert stores >= loops * written, kernel
            assert not re.search(generic, body), kernel


# Instructions for an element, in the longest loop of Adam without amsgrad, and in the longest of those with l1 and l2
# alone. They hold a second way to memory, for what is not aligned to 16 bytes, that is not taken beside the first.
LONGEST = {"float": 150, "BFloat16": 150, "Float16": 150}
LONGEST_WITH_L1_AND_L2 = {"float": 95, "BFloat16": 100, "Float16": 100}


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
def test_update_loops_are_short_and_call_nothing(compiled: Compiled) -> None:
    """Division and root have no slow path, and no loop is there twice, for either end of a lerp."""
    print()
    for kernel, body in machine_code(compiled).items():
        if kernel.kind != "update" or kernel.dtype == "double":
            continue
        assert not calls(instructions(body)), kernel
        elements = 4 if kernel.dtype == "float" else 8
        loops = loops_over_packs(body)
        print(f"{compiled.unit + ' ' + compiled.architecture + ' ' + str(kernel):40}", *map(Loop.count, loops))
        for loop in loops if (compiled.unit, kernel.states) == ("adam", 0b011) else ():
            # The further stages read more constants where they need them.
            is_short = loop.count("LDS$") <= 7 * elements
            longest = (LONGEST_WITH_L1_AND_L2 if is_short else LONGEST)[kernel.dtype]
            assert loop.count() <= longest * elements, kernel


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
def test_loops_over_a_units_weights_call_nothing(compiled: Compiled) -> None:
    """One adds up what roots want, one moves the weights, each with several loads on their way. What is left to call is
    for a unit: its root in double, and where its weights are."""
    if compiled.unit == "squares":
        pytest.skip("the norm knows no units")
    for kernel, body in machine_code(compiled).items():
        if kernel.kind != "units" or kernel.dtype == "double":
            continue
        loops = [loop for loop in innermost(loops_of(body)) if loop.count(r"LDG\b") >= 4]
        assert len(loops) >= 2, kernel
        assert not any(calls(loop) for loop in loops), kernel


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
def test_the_norm_goes_by_no_double(compiled: Compiled) -> None:
    """Of which most GPUs have a unit for 64 of fp32. The loop that has them is for what fp32 has no room for."""
    if compiled.unit != "squares":
        pytest.skip("the norm's test")
    for kernel, body in machine_code(compiled).items():
        doubles = [loop.count(DOUBLE) for loop in innermost(loops_over_packs(body)) if loop.count(LOAD) >= 4]
        assert len(doubles) == (1 if kernel.dtype == "double" else 2), kernel
        assert (min(doubles) == 0) == (kernel.dtype != "double"), kernel


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
def test_a_model_of_bandwidth(compiled: Compiled) -> None:
    """A prediction, which nothing has measured yet: Adam's steps with and without l1 and l2, and the norm, pass at the
    speed of memory. Together a step with a norm clip is at 93 % then."""
    if (compiled.unit, compiled.architecture) not in (("adam", "sm_90"), ("squares", "sm_90")):
        pytest.skip("H100 and H200 run sm_90; Adam and the norm stand for the others")
    registers = {
        kernel_of(found["name"]): int(found["registers"]) for found in RESOURCES.finditer(one_line(compiled.report))
    }
    print(f"\n{'% of a copy on':24}{'H100':>8}{'H200':>8}  instructions")
    for kernel, body in machine_code(compiled).items():
        if kernel.kind not in ("update", "squares") or kernel.dtype == "double":
            continue
        elements = 4 if kernel.dtype == "float" else 8
        for loop in loops_over_packs(body):
            if kernel.kind == "squares" and loop.count(LOAD) < 4:
                continue  # what is left of a parameter's last chunk
            shares = [share_of_bandwidth(loop, registers[kernel], gpu) for gpu in (H100, H200)]
            print(f"{kernel!s:24}" + "".join(f"{100 * share:8.1f}" for share in shares), loop.count(), sep="  ")
            # What reads more constants where it needs them has further stages.
            if loop.count("LDS$") <= 5 * elements:
                assert min(shares) >= (0.9 if (kernel.kind, elements) == ("update", 8) else 0.95), kernel
