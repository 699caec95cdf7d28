"""Tests the wheel where a user would install it: in fresh environments, each with another torch, and no compiler used.

    python tools/wheel_check.py dist/fusedreg-*.whl python3.10=2.10.0 python3.12=2.12.0 python3.13=newest

Each argument behind the wheel is a Python and the torch for it, from the package index: gigabytes each, where torch
there is built for GPUs. Tests are run from a copy of the sources without the package, so that nothing but the wheel
answers.
PYTEST in the environment has more arguments for pytest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Parity, the drop-in suite, and what asks the most of how tensors are read.
TESTS = [
    "tests/test_parity.py",
    "tests/dropin",
    "tests/test_registry.py",
    "tests/hostile/test_layouts.py",
    "tests/hostile/test_gradients_without_memory.py",
    "tests/hostile/test_lifetime.py",
    "tests/hostile/test_switches.py",
]
FROM_THE_WHEEL = """
import fusedreg, pathlib, sys
from fusedreg.backends.cpp import load_extension
module, reason = load_extension()
assert module is not None, reason
assert pathlib.Path(fusedreg.__file__).is_relative_to(sys.prefix), fusedreg.__file__
assert module.__file__.endswith("_C.abi3.so"), module.__file__
import torch
print(sys.version.split()[0], "torch", torch.__version__, module.__file__, module.instruction_sets(), flush=True)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([str(each) for each in command], cwd=cwd, env=environment, check=True)


def environment(folder: Path, python: str, torch: str, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel; one that is there keeps its torch."""
    its_python = folder / "bin" / "python"
    if not its_python.exists():
        run(python, "-m", "venv", folder)
    pip = (its_python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "torch" if torch == "newest" else f"torch=={torch}", "-r", ROOT / "requirements" / "test.txt")
    run(*pip, wheel)
    run(*pip, "--force-reinstall", "--no-deps", wheel)  # another build of the same version
    return its_python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("environments", nargs="+", metavar="PYTHON=TORCH")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "wheel", help="where environments are kept")
    options = parser.parse_args()
    failed = []
    for each in options.environments:
        python, _, torch = each.partition("=")
        its_python = environment(
            options.folder.resolve() / f"{Path(python).name}-{torch}", python, torch, options.wheel.resolve()
        )
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / "fusedreg-tests"
            skipped = shutil.ignore_patterns("fusedreg", ".*", "build", "dist", "__pycache__", "site", "*.so")
            shutil.copytree(ROOT, copy, ignore=skipped)
            try:
                run(its_python, "-c", FROM_THE_WHEEL, cwd=copy)
                run(its_python, "-m", "fusedreg", "parity", cwd=copy)
                extra = shlex.split(os.environ.get("PYTEST", ""))
                run(its_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *extra, cwd=copy)
            except subprocess.CalledProcessError as error:
                failed.append(f"{each}: {error}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
