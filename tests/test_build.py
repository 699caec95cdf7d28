"""The build: vectorised loops, clear words where the extension is missing or does not fit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import needs_cpp

import fusedreg

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=300
    )


X86_64_GCC = platform.machine() == "x86_64" and shutil.which("g++") is not None


VECTOR_BYTES = {"x86_64_v4": 64, "x86_64_v3": 32, "baseline": 16}
each_isa = pytest.mark.parametrize(
    ("isa", "register"), [("x86_64_v4", "zmm"), ("x86_64_v3", "ymm"), ("baseline", "xmm")]
)
needs_gcc = pytest.mark.skipif(not X86_64_GCC, reason="needs g++ on x86-64")


def compile_loops(isa: str, loops: str, folder: Path) -> str:
    """The assembly of some loops, as setup.py compiles them."""
    source = folder / "loop.cpp"
    target = "" if isa == "baseline" else f'__attribute__((target("arch={isa.replace("86_64_", "86-64-")}")))'
    source.write_text(f"""
#include <algorithm>
#include <limits>
#include <numeric>
#include "cpu/bfloat16.h"
#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "rules/adam.h"
#include "rules/sgd.h"
#define FUSEDREG_ISA {isa}
#define FUSEDREG_TARGET {target}
#define FUSEDREG_VECTOR_BYTES {VECTOR_BYTES[isa]}
{loops}
""")
    flags = re.search(r"FLAGS = \[([^\]]*)\]", (ROOT / "setup.py").read_text())[1].replace('"', "").split(", ")
    version = int(run("g++", "-dumpversion").stdout.split(".")[0])
    if version < 12 and isa != "baseline":
        pytest.skip(f"g++ {version} has no x86-64 levels for single functions; 12 has")
    built = run("g++", f"-I{ROOT}/csrc", *flags, "-S", str(source), "-o", str(folder / "loop.s"))
    assert built.returncode == 0, built.stderr
    return (folder / "loop.s").read_text()


def assert_packed(assembly: str, register: str, *instructions: str) -> None:
    """On registers of the full width."""
    for instruction in instructions:
        assert re.search(rf"v?{instruction}\s.*%{register}", assembly), f"no packed {instruction} on {register}"


@needs_gcc
@pytest.mark.parametrize("stages", ["kShrink", "kSelect", "kShrinkAndSelect", "kFade"])
@each_isa
def test_the_update_loop_is_vectorised(isa, register, stages, tmp_path) -> None:
    """The main loop of fp32 Adam with its prox has packed square roots and divisions of the full width."""
    assembly = compile_loops(
        isa,
        f"""
#include "cpu/update_loop.h"
using namespace fusedreg;
template void cpu::{isa}::update_chunk<Update<Adam, Adam::kAmsgrad, ProxStages::{stages}, true, true>, float>(
    const Pointers&, const cpu::DTypes&, std::int64_t, std::int64_t, const void*, void*, void*);
template void cpu::{isa}::update_chunk<Update<Sgd, Sgd::kMomentum, ProxStages::{stages}, false, true>, float>(
    const Pointers&, const cpu::DTypes&, std::int64_t, std::int64_t, const void*, void*, void*);
""",
        tmp_path,
    )
    assert_packed(assembly, register, "sqrtps", "divps")


@needs_gcc
@each_isa
def test_the_scores_are_vectorised(isa, register, tmp_path) -> None:
    assembly = compile_loops(
        isa,
        f"""
#include "cpu/update_loop.h"
#include "cpu/score_loop.h"
using namespace fusedreg;
template void cpu::{isa}::score_tile<Adam, Adam::kPlain, true, float>(
    const Pointers&, const cpu::DTypes&, std::int64_t, std::int64_t, const void*, void*);
""",
        tmp_path,
    )
    assert_packed(assembly, register, "sqrtps")


@needs_gcc
@each_isa
def test_the_loops_over_keys_are_vectorised(isa, register, tmp_path) -> None:
    """The search subtracts 1 from each key, and sums are in double."""
    assembly = compile_loops(
        isa,
        f"""
#include "cpu/update_loop.h"
#include "cpu/unit_loop.h"
#include "cpu/key_loop.h"
using namespace fusedreg;
template void cpu::{isa}::find_keys<float>(const void*, std::int64_t, std::uint64_t, std::int64_t,
                                                cpu::FoundKeys&);
template void cpu::{isa}::add_up_keys<float>(const void*, std::int64_t, bool, std::int64_t, std::int64_t, double*);
""",
        tmp_path,
    )
    assert_packed(assembly, register, "paddd", "cvtps2pd", "addpd")


@needs_gcc
@each_isa
def test_16_bit_tiles_are_converted_with_the_loops_instructions(isa, register, tmp_path) -> None:
    """A visitor of dtypes that is not inlined is compiled for the baseline."""
    assembly = compile_loops(
        isa,
        f"""
#include "cpu/update_loop.h"
using namespace fusedreg;
template void cpu::{isa}::load_tile<float>(float*, const void*, DType, std::int64_t, std::int64_t);
template void cpu::{isa}::store_tile<float>(void*, DType, const float*, std::int64_t, std::int64_t);
""",
        tmp_path,
    )
    assert_packed(assembly, register, "pslld")
    assert "visit_dtype" not in assembly


# An editable install's finder would answer for the modules that a copy of the package lacks.
TRAIN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, fusedreg
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
for _ in range(2):
    fusedreg.FusedRegAdam([p], l1=0.1, lr=0.1).step()
print(p.tolist())
"""


# Then the same by name, whose error goes to the output: a warning stands apart from it.
ASK_FOR_CPP = """
try:
    fusedreg.FusedRegAdam([p], l1=0.1, lr=0.1, backend="cpp").step()
except RuntimeError as error:
    print(f"RuntimeError: {error}")
"""


def trained() -> list[float]:
    """What TRAIN prints with the extension."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    for _ in range(2):
        fusedreg.FusedRegAdam([param], l1=0.1, lr=0.1).step()
    return param.tolist()


def copy_of_the_package(folder: Path, built_with: str | None) -> None:
    """fusedreg without its compiled module, and with another note of the torch that it was built with."""
    ignored = shutil.ignore_patterns("*.so", "_built_with.py", "__pycache__")
    shutil.copytree(ROOT / "fusedreg", folder / "fusedreg", ignore=ignored)
    if built_with is not None:
        (folder / "fusedreg" / "_built_with.py").write_text(f"TORCH_VERSION = {built_with!r}\nNOT_BUILT = {{}}\n")


@pytest.mark.parametrize(
    ("oldest", "words"),
    [
        ("(99, 1)", f"fusedreg's wheel is for torch 99.1 and later, and this is {torch.__version__}: rebuild it with"),
        ("(2, 10)", "the compiled extension does not load (it asks this torch in vain): rebuild it with"),
    ],
    ids=["older-torch", "another-answer"],
)
def test_the_wheel_on_a_torch_that_it_is_not_for_says_so_and_works(oldest, words, tmp_path) -> None:
    copy_of_the_package(tmp_path, None)
    note = f"TORCH_VERSION = None\nOLDEST_TORCH = {oldest}\nNOT_BUILT = {{}}\n"
    (tmp_path / "fusedreg" / "_built_with.py").write_text(note)
    (tmp_path / "fusedreg" / "_C.py").write_text("raise AttributeError('it asks this torch in vain')\n")
    fallen_back = run(sys.executable, "-c", TRAIN, cwd=tmp_path)
    assert fallen_back.returncode == 0, fallen_back.stderr
    assert fallen_back.stderr.count(words) == 1
    assert "Using backend 'reference'" in fallen_back.stderr


@pytest.mark.parametrize(
    ("built_with", "words"),
    [
        (None, "the compiled extension is not there: rebuild it with"),
        ("1.0.0", f"it was compiled for torch 1.0.0, and this is torch {torch.__version__}: rebuild it with"),
        (torch.__version__, "the compiled extension does not load"),
    ],
    ids=["missing", "another-torch", "broken"],
)
def test_without_a_fitting_extension_it_says_so_once_and_works(built_with, words, tmp_path) -> None:
    copy_of_the_package(tmp_path, built_with)
    fallen_back = run(sys.executable, "-c", TRAIN + ASK_FOR_CPP, cwd=tmp_path)
    assert fallen_back.returncode == 0, fallen_back.stderr
    assert fallen_back.stderr.count(words) == 1
    assert "Using backend 'reference'" in fallen_back.stderr
    printed, _, asked_for = fallen_back.stdout.partition("\n")
    assert [float(x) for x in printed.strip("[]").split(",")] == pytest.approx(trained(), rel=1e-6)
    assert "RuntimeError: backend 'cpp' cannot run: " in asked_for
    assert words in asked_for

    if built_with is None:
        (tmp_path / "setup.py").touch()
        assert "run Python in another folder" in run(sys.executable, "-c", TRAIN, cwd=tmp_path).stderr


def copy_of_the_sources(folder: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("requirements", "csrc", "fusedreg"):
        ignored = shutil.ignore_patterns("*.so", "_built_with.py", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def setup_py(tmp_path: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    copy_of_the_sources(tmp_path)
    command = command or ("build_ext", "--inplace")
    return run(sys.executable, "setup.py", *command, cwd=tmp_path, **environment)


def test_building_without_a_compiler_says_what_to_do(tmp_path) -> None:
    failed = setup_py(tmp_path, CXX="no-such-compiler")
    assert failed.returncode != 0
    assert "no C++ compiler: `no-such-compiler` is not on the PATH" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr


def test_building_without_torch_says_what_to_do(tmp_path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    failed = setup_py(tmp_path, PYTHONPATH=str(hidden))
    assert failed.returncode != 0
    assert "pip install --no-build-isolation ." in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr


def test_building_with_a_compiler_that_fails_says_what_to_do(tmp_path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-c*) echo "no such standard" >&2; exit 1;; *) exec c++ "$@";; esac\n')
    compiler.chmod(0o755)
    failed = setup_py(tmp_path, CXX=str(compiler), FUSEDREG_NO_CUDA="1")
    assert failed.returncode != 0
    assert "fusedreg: compiling" in failed.stdout
    assert "is there and could not compile it" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr


def test_a_wheel_leaves_nothing_in_the_source_folder(tmp_path) -> None:
    sources, wheels = tmp_path / "sources", tmp_path / "wheels"
    sources.mkdir()
    copy_of_the_sources(sources)
    before = sorted(sources.rglob("*"))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(sources))
    done = run(*pip, cwd=tmp_path, FUSEDREG_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    assert sorted(sources.rglob("*")) == before
    assert len(list(wheels.iterdir())) == 1


def test_a_source_distribution_holds_every_source(tmp_path) -> None:
    done = setup_py(tmp_path, "sdist", FUSEDREG_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(tmp_path)) for path in (tmp_path / "csrc").rglob("*") if path.is_file()}
    assert sources <= held
    assert any(path.endswith(".cu") for path in sources)


@needs_cpp
def test_the_extension_here_fits_this_torch() -> None:
    from fusedreg._built_with import TORCH_VERSION

    assert torch.__version__ == TORCH_VERSION
