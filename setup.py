"""Builds the compiled CPU backend. The metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import setup


def stop(message: str) -> None:
    sys.exit("\n" + textwrap.fill("fusedreg: " + " ".join(message.split()), width=100) + "\n")


if os.environ.get("FUSEDREG_NO_EXTENSION"):
    setup()
    sys.exit()

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    stop(
        f"""torch cannot be imported where the build runs ({error}). The compiled extension must be built with the very
        torch that it will run with, so install that first, then build without pip's isolation, which hides it:
        `pip install torch ninja setuptools`, then `pip install --no-build-isolation .`"""
    )

NO_EXTENSION = "To install without the compiled backend (slow, pure PyTorch), set FUSEDREG_NO_EXTENSION=1."
COMPILER = os.environ.get("CXX", "c++").split()[0]
if shutil.which(COMPILER) is None:
    stop(
        f"""there is no C++ compiler: `{COMPILER}` is not on the PATH. Install one (`apt-get install g++`, or Xcode's
        command line tools) or name one in CXX, then build again. {NO_EXTENSION}"""
    )
if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
    stop(
        f"""Python's headers are missing: there is no Python.h in {sysconfig.get_paths()["include"]}. Install them
        (`apt-get install python3-dev`), then build again. {NO_EXTENSION}"""
    )

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
# math-errno and trapping-math stand in the way of vectorised square roots and selects. -fopenmp without linking it:
# at::parallel_for then runs on torch's own pool.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []


class Build(BuildExtension):
    def run(self) -> None:
        super().run()
        # Compared with the torch that is imported, before the extension is: see fusedreg/backends/cpp.py.
        folder = Path("fusedreg") if self.inplace else Path(self.build_lib) / "fusedreg"
        (folder / "_built_with.py").write_text(
            f'"""Written by setup.py."""\n\nTORCH_VERSION = {str(torch.__version__)!r}\n'
        )


setup(
    ext_modules=[
        CppExtension(
            "fusedreg._C",
            SOURCES,
            extra_compile_args=[*FLAGS, *OPENMP],
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
        )
    ],
    cmdclass={"build_ext": Build},
)
