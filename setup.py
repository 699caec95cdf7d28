"""Builds the compiled backends: the CPU's, and CUDA's where that can be built. The metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from setuptools import setup


def stop(message: str) -> None:
    sys.exit("\n" + textwrap.fill("fusedreg: " + " ".join(message.split()), width=100) + "\n")


if os.environ.get("FUSEDREG_NO_EXTENSION"):
    setup()
    sys.exit()

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
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

import rule_units  # noqa: E402

CSRC = Path("csrc").resolve()
UNITS = Path("build") / "rules"
HEADERS = [str(path) for path in Path("csrc").rglob("*.h")]
# Debug information, which Python's own flags ask for, would be ten times the code. math-errno and trapping-math stand
# in the way of vectorised square roots and selects. -fopenmp without linking it: at::parallel_for then runs on torch's
# own pool.
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

# For tools/sanitize. After FLAGS, so that its -O1 counts; not recovering makes the first finding end the process.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE = [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer"] if os.environ.get("FUSEDREG_SANITIZE") else []

# Extensions that are left out, and why: what `python -m fusedreg info` says.
NOT_BUILT: dict[str, str] = {}


def no_cuda_reason() -> str | None:
    """Why the CUDA extension is left out, or None. A GPU need not be visible: one may build for another machine."""
    if os.environ.get("FUSEDREG_NO_CUDA"):
        return "it was built with FUSEDREG_NO_CUDA set"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA when fusedreg was built"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if not nvcc.exists():
        return "there was no CUDA toolkit when fusedreg was built: CUDA_HOME names none, and nvcc is not on the PATH"
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        found = ".".join(version.groups()) if version else "a version that it does not tell"
        return (
            f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, and the toolkit in {CUDA_HOME} is "
            f"{found}: kernels need the same major version. Point CUDA_HOME to a CUDA "
            f"{torch.version.cuda.split('.')[0]} toolkit and install fusedreg again"
        )
    return None


class Build(BuildExtension):
    def build_extension(self, extension) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:
            if extension.name != "fusedreg._cuda":
                raise
            NOT_BUILT["_cuda"] = (
                f"its kernels did not compile when fusedreg was built ({type(error).__name__}: {error})"
            )

    def run(self) -> None:
        begin = time.perf_counter()
        super().run()
        seconds = time.perf_counter() - begin
        # Compared with the torch that is imported, before an extension is: see fusedreg/backends/cpp.py.
        folder = Path("fusedreg") if self.inplace else Path(self.build_lib) / "fusedreg"
        (folder / "_built_with.py").write_text(
            f'"""Written by setup.py."""\n\nTORCH_VERSION = {str(torch.__version__)!r}\nNOT_BUILT = {NOT_BUILT!r}\n'
            f"SECONDS = {seconds:.0f}  # of the last build: less, where not everything was compiled anew\n"
        )
        for reason in NOT_BUILT.values():
            print("\n" + textwrap.fill(f"fusedreg: the CUDA backend is left out: {reason}.", width=100) + "\n")


extensions = [
    CppExtension(
        "fusedreg._C",
        [
            "csrc/bindings.cpp",
            "csrc/plan/tables.cpp",
            "csrc/plan/parameters.cpp",
            *sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            *rule_units.write("cpu", UNITS),
        ],
        include_dirs=[str(CSRC)],
        extra_compile_args=[*FLAGS, *OPENMP, *SANITIZE],
        extra_link_args=SANITIZERS if SANITIZE else [],
        depends=HEADERS,
    )
]
reason = no_cuda_reason()
if reason is None:
    extensions.append(
        CUDAExtension(
            "fusedreg._cuda",
            ["csrc/cuda/bindings.cpp", "csrc/cuda/squares.cu", *rule_units.write("cuda", UNITS, "cu")],
            include_dirs=[str(CSRC)],
            extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3"]},
            depends=HEADERS,
            optional=True,
        )
    )
else:
    NOT_BUILT["_cuda"] = reason

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
