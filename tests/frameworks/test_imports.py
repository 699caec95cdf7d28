"""No framework is imported that nobody asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

ALL = ["accelerate", "fastai", "ignite", "lightning", "opacus", "peft", "skorch", "timm", "transformers"]
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


def test_none_is_left_out() -> None:
    """Where one is missing, its tests skip; in their own environment, that is a mistake."""
    missing = [name for name in ALL if importlib.util.find_spec(name) is None]
    if missing == ALL:
        pytest.skip("no framework is there")
    assert not missing
