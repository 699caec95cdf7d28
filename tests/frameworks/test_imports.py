"""No framework is imported that nobody asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

NAMES = ["accelerate", "lightning", "pytorch_lightning", "timm", "transformers"]
PROGRAM = f"""
import sys
import fusedreg
import fusedreg.__main__
import fusedreg.integrations
print(*sorted({set(NAMES)} & set(sys.modules)))
"""


def test_a_framework_is_imported_only_by_its_module() -> None:
    pytest.importorskip("timm")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
