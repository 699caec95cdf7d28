"""What the wheel is made of: Python's limited API and torch's stable ABI, and nothing else of either."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import EXTENSION

ROOT = Path(__file__).parents[1]
INCLUDE = Path(torch.__file__).parent / "include"
# They have in them all headers that know Python or torch; a rule's kernels know neither.
SOURCES = ("bindings.cpp", "plan/parameters.cpp", "cpu/selection.cpp")
STABLE_TORCH = re.compile(r"(aoti_torch_\w+|torch_parallel_for|torch_get_num_threads)$")
UNSTABLE = re.compile(r"THP|pybind|_ZN?K?(2at|3c10|5torch|6caffe2)")

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("nm") is None, reason="needs a C++ compiler and nm"
)


def undefined(library: Path, *flags: str) -> set[str]:
    """What a library, or an object file, wants of others, without versions."""
    found = subprocess.run(["nm", "-u", *flags, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in found.splitlines()}


def assert_only_stable(symbols: set[str]) -> None:
    assert not sorted(filter(UNSTABLE.search, symbols))
    of_torch = {each for each in symbols if each.startswith(("aoti_", "torch_"))}
    assert all(map(STABLE_TORCH.match, of_torch)), of_torch


@needs_compiler
@pytest.mark.parametrize("source", SOURCES)
def test_the_stable_build_asks_torch_only_what_is_stable(source, tmp_path) -> None:
    """Python's own headers refuse what is not in the limited API, torch's what is newer than torch 2.10."""
    flags = ["-std=c++20", "-O0", "-DFUSEDREG_STABLE", "-DFUSEDREG_BASELINE_ONLY", "-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem{INCLUDE}", f"-isystem{sysconfig.get_paths()['include']}"]
    target = f"-DTORCH_TARGET_VERSION={2 << 56 | 10 << 48:#x}"
    built = tmp_path / "built.o"
    command = ["c++", *flags, target, *includes, "-c", str(ROOT / "csrc" / source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    symbols = undefined(built)
    assert_only_stable(symbols)
    assert any(each.startswith(("Py", "torch_")) for each in symbols)  # it was not the names that nm did not give


def test_the_check_of_symbols_sees_unstable_ones() -> None:
    cpp = ("_ZN2at6detail10noopDeleteEPv", "_ZNK3c1010TensorImpl7sym_numelEv")
    for symbol in (*cpp, "THPVariable_Wrap", "torch_from_blob"):
        with pytest.raises(AssertionError):
            assert_only_stable({symbol})


@pytest.mark.skipif(
    EXTENSION is None or ".abi3." not in str(EXTENSION.__file__) or shutil.which("nm") is None,
    reason="the extension here is not the wheel's",
)
def test_the_wheel_asks_torch_only_what_is_stable() -> None:
    assert EXTENSION is not None
    symbols = undefined(Path(str(EXTENSION.__file__)), "-D")
    assert_only_stable(symbols)
    assert "torch_parallel_for" in symbols
