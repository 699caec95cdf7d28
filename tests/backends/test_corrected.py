"""Division and square root on a GPU (csrc/maths/corrected.h), proved with corrected.cpp: from every approximation that
keeps to NVIDIA's bounds comes a result that is rounded to the nearest float, but for 2^-20 of half a place, and every
zero, infinity, NaN and sign that IEEE 754 demands.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_emulation import BACKENDS, CSRC

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def proof(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corrected") / "corrected"
    # Every operation is rounded as it stands there; a fused multiply-add is an instruction.
    options = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{CSRC}", f"-I{BACKENDS}"]
    if platform.machine() == "x86_64":
        options.append("-march=native")
    subprocess.run(["c++", *options, str(BACKENDS / "corrected.cpp"), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize(
    "checks",
    [
        "exponents",
        *(
            pytest.param(f"{operation} {step}", marks=[pytest.mark.slow] if step == 1 else [])
            for operation in ("quotients", "roots")
            for step in (101, 1)
        ),
    ],
)
def test_what_is_made_of_approximations_is_rounded(checks, proof) -> None:
    done = subprocess.run([proof, *checks.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
