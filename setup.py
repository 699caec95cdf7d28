"""Builds the compiled backends: the CPU's, and CUDA's where that can be built. The metadata is in pyproject.toml.

With FUSEDREG_STABLE=1, as `make wheel` sets it, the CPU's alone, on Python's limited API and torch's stable ABI: one
file for many versions of both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
sys.dont_write_bytecode = True

import setuptools  # noqa: E402
from setuptools import setup  # noqa: E402


def stop(message: str) -> None:
    sys.exit("\n" + textwrap.fill("fusedreg: " + " ".join(message.split()), width=100) + "\n")


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(
        f"setuptools {setuptools.__version__} is too old to build it: `pip install 'setuptools>=77'`, then build again."
    )

# What pip makes on its way to a wheel is not left in the source folder.
OPTIONS: dict[str, dict[str, str]] = {}
BUILD = "build"
if {"bdist_wheel", "egg_info"} & set(sys.argv):
    temporary = tempfile.TemporaryDirectory(prefix="fusedreg-")
    BUILD = temporary.name
    OPTIONS = {"build": {"build_base": BUILD}, "egg_info": {"egg_base": BUILD}}

if os.environ.get("FUSEDREG_NO_EXTENSION"):
    setup(options=OPTIONS)
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

import cuda_architectures  # noqa: E402
import rule_units  # noqa: E402

CSRC = Path("csrc").resolve()
UNITS = Path(BUILD) / "rules"
HEADERS = [str(path) for path in Path("csrc").rglob("*.h")]
# C++20 with any torch: 2.11 would ask for C++17. Debug information, which Python's own flags ask for, would be ten
# times the code. math-errno and trapping-math stand in the way of vectorised square roots and selects. -fopenmp without
# linking it: at::parallel_for then runs on torch's own pool. Vectors are passed to functions that are always inlined,
# whose calling convention is nobody's.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
# Another torch is another command, so that everything is compiled again, however old its headers are.
TORCH = [f"-DFUSEDREG_TORCH={torch.__version__}"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

STABLE = bool(os.environ.get("FUSEDREG_STABLE"))
# The oldest that the stable build runs on, of torch as TORCH_TARGET_VERSION has it.
OLDEST_TORCH, OLDEST_PYTHON = (2, 10), "cp310"
if STABLE:
    target = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48
    TORCH = ["-DFUSEDREG_STABLE", f"-DTORCH_TARGET_VERSION={target:#x}", "-fvisibility=hidden"]
    OPENMP = []
    OPTIONS["bdist_wheel"] = {"py_limited_api": OLDEST_PYTHON}

# For tools/sanitize. After FLAGS, so that its -O1 counts; not recovering makes the first finding end the process.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# One instruction set: all are compiled from the same loops, and this takes minutes even so.
SLOW_BUT_CHECKED = [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer", "-DFUSEDREG_BASELINE_ONLY"]
SANITIZE = SLOW_BUT_CHECKED if os.environ.get("FUSEDREG_SANITIZE") else []

# Where no GPU is visible and TORCH_CUDA_ARCH_LIST is not set: A100, RTX 30 and 40, H100, and what comes next.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"

# Extensions that are left out, and why: what `python -m fusedreg info` says.
NOT_BUILT: dict[str, str] = {}


def no_cuda_reason() -> str | None:
    """Why the CUDA extension is left out, or None. A GPU need not be visible: one may build for another machine."""
    if STABLE:
        return "this is fusedreg's wheel, which is for CPUs: build it from source, where CUDA's compiler is"
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
    visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return cuda_architectures.reason_against(os.environ.get("TORCH_CUDA_ARCH_LIST"), visible)


class Build(BuildExtension):
    def build_extension(self, extension) -> None:
        print(
            f"fusedreg: compiling {len(extension.sources)} files for {extension.name}, which takes minutes", flush=True
        )
        try:
            super().build_extension(extension)
        except Exception as error:
            if extension.name != "fusedreg._cuda":
                stop(
                    f"""`{COMPILER}` is there and could not compile it ({error}); its own messages are above. It must
                    know C++20, as GCC 11 and Clang 14 do: install one that does, or name it in CXX, then build again.
                    {NO_EXTENSION}"""
                )
            NOT_BUILT["_cuda"] = (
                f"its kernels did not compile when fusedreg was built ({type(error).__name__}: {error})"
            )

    def run(self) -> None:
        begin = time.perf_counter()
        self.force = True  # ninja knows what is new; setuptools compares times with fusedreg's own headers alone
        super().run()
        seconds = time.perf_counter() - begin
        # Compared with the torch that is imported, before an extension is: see fusedreg/backends/cpp.py.
        folder = Path("fusedreg") if self.inplace else Path(self.build_lib) / "fusedreg"
        (folder / "_built_with.py").write_text(
            f'"""Written by setup.py."""\n\nTORCH_VERSION = {None if STABLE else str(torch.__version__)!r}\n'
            f"OLDEST_TORCH = {OLDEST_TORCH if STABLE else None}  # where any that is not older will do\n"
            f"NOT_BUILT = {NOT_BUILT!r}\n"
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
            "csrc/plan/watch.cpp",
            *sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            *rule_units.write("cpu", UNITS),
        ],
        include_dirs=[str(CSRC)],
        extra_compile_args=[*FLAGS, *WARNINGS, *TORCH, *OPENMP, *SANITIZE],
        extra_link_args=SANITIZERS if SANITIZE else [],
        depends=HEADERS,
        py_limited_api=STABLE,
    )
]
if STABLE:
    extensions[0].libraries = ["torch_cpu"]
    if sys.platform.startswith("linux"):
        extensions[0].sources.append("csrc/plan/older_systems.cpp")
        extensions[0].extra_link_args += ["-Wl,--wrap=pow", "-Wl,-s"]
reason = no_cuda_reason()
if reason is None:
    if not torch.cuda.is_available():  # torch would ask the GPU that is not there what it is
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    extensions.append(
        CUDAExtension(
            "fusedreg._cuda",
            ["csrc/cuda/bindings.cpp", "csrc/cuda/squares.cu", *rule_units.write("cuda", UNITS, "cu")],
            include_dirs=[str(CSRC)],
            extra_compile_args={"cxx": [*FLAGS, *WARNINGS, *TORCH], "nvcc": ["-O3", *TORCH]},
            depends=HEADERS,
            optional=True,
        )
    )
else:
    NOT_BUILT["_cuda"] = reason

setup(ext_modules=extensions, cmdclass={"build_ext": Build}, options=OPTIONS)
