"""The CUDA kernels compile for every architecture that we name: nothing spills, and memory moves 16 bytes at a time.

`pytest -s` prints each kernel's registers, shared memory, stack and spills.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES, DTYPES = 2, 4

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def compiled(request, tmp_path_factory) -> tuple[str, Path, str]:
    """The architecture, the machine code, and what ptxas says of it."""
    cubin = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
    report = compile_kernels(f"-arch={request.param}", "-cubin", "-Xptxas=-v", output=cubin)
    return request.param, cubin, report


def compile_kernels(*options: str, output: Path) -> str:
    return run("nvcc", "-std=c++17", "-O3", *options, str(ROOT / "csrc/cuda/kernels.cu"), "-o", str(output))


@cache
def cuobjdump() -> str | None:
    """nvcc's, or the one that Triton's package brings."""
    triton = importlib.util.find_spec("triton")
    beside_triton = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(beside_triton) if beside_triton and beside_triton.exists() else None)


RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers.*?(?P<shared>\d+) bytes smem",
    re.DOTALL,
)


def short_name(mangled: str) -> str:
    kernel, rule, dtype = re.search(
        r"(squares|update)_kernelI(?:NS_\d(\w+?)HostE)?(f|d|NS_\d(?:BFloat16|Float16))", mangled
    ).groups()
    dtype = {"f": "float", "d": "double"}.get(dtype, dtype[4:])
    return " ".join(filter(None, (kernel, rule, dtype)))


def test_nothing_spills(compiled) -> None:
    architecture, _, report = compiled
    kernels = list(RESOURCES.finditer(report))
    assert len(kernels) == (RULES + 1) * DTYPES, "a kernel is missing"
    print(f"\n{architecture:24}registers  shared  stack  spilled (bytes)")
    for kernel in kernels:
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        numbers = f"{kernel['registers']:>9}{kernel['shared']:>8}{kernel['stack']:>7}{spilled:>9}"
        print(f"{short_name(kernel['name']):24}{numbers}")
    # With 256 threads a block, 128 registers still let two blocks share a multiprocessor.
    assert all(int(kernel["registers"]) <= 128 for kernel in kernels)
    # ptxas reports device functions that it did not inline (pow) too
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert set(spills) == {("0", "0", "0")}


def test_memory_moves_16_bytes_at_a_time(compiled, tmp_path) -> None:
    """In the machine code, or in PTX where there is no disassembler: each kernel has a load for each of its streams."""
    architecture, cubin, _ = compiled
    if cuobjdump() is not None:
        code = run(cuobjdump(), "-sass", str(cubin))
        split, load, store = r"Function : (\w+)", r"\bLDG\.E(?:\.\w+)*\.128\b", r"\bSTG\.E(?:\.\w+)*\.128\b"
    else:
        compile_kernels(f"-arch={architecture}", "-ptx", output=tmp_path / "kernels.ptx")
        code = (tmp_path / "kernels.ptx").read_text()
        split = r"\.entry (\w+)"
        load, store = (rf"{way}\.global\.(?:v4\.[bfu]32|v2\.[bfu]64)" for way in ("ld", "st"))
    names_and_bodies = re.split(split, code)[1:]
    kernels = dict(zip(map(short_name, names_and_bodies[::2]), names_and_bodies[1::2], strict=True))
    assert len(kernels) == (RULES + 1) * DTYPES
    states = {"update Adam": 3, "update Sgd": 1}
    for name, body in kernels.items():
        updates, of_rule = name.startswith("update"), states.get(name.rpartition(" ")[0], 0)
        assert len(re.findall(load, body)) >= (2 + of_rule if updates else 1), name
        assert len(re.findall(store, body)) >= (1 + of_rule if updates else 0), name
