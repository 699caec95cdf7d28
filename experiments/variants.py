"""What was tried to make a CPU step faster, measured: kept where it won, dropped where it did not.

    python experiments/variants.py [--quick] [--elements 50000000] [--output FILE]

Builds the kernels of csrc/ once for each variant, by replacing a line, without torch around them, and times all of them
in alternation. Then huge pages, non-temporal stores and the cost of a step's scalars.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from cases import GRADIENT_SCALE, WEIGHT_SCALE
from measure import Step, stamp, time_in_rounds
from report import Grid

from fusedreg import _C

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
LEVELS = {"x86-64-v4": ("arch=x86-64-v4", 64), "x86-64-v3": ("arch=x86-64-v3", 32), "baseline": ("arch=x86-64", 16)}
CHUNK = 32 * 1024
MADV_HUGEPAGE = 14


@dataclass(frozen=True)
class Variant:
    """A line of csrc/ and what stands there instead, or another chunk, or another kind of memory."""

    replace: tuple[tuple[str, str, str], ...] = ()
    chunk: int = CHUNK


NO_PREFETCH = (("cpu/prefetch.h", 'is_amd = __builtin_cpu_is("amd")', "is_amd = true"),)
PREFETCH = (("cpu/prefetch.h", 'is_amd = __builtin_cpu_is("amd")', "is_amd = false"),)


def ahead(step: int) -> tuple[tuple[str, str, str], ...]:
    return (*PREFETCH, ("cpu/prefetch.h", "kAheadBytes = 2048", f"kAheadBytes = {step}"))


STEP_VARIANTS = {
    "as shipped": Variant(),
    "no prefetch": Variant(NO_PREFETCH),
    "prefetch 2 KiB ahead": Variant(PREFETCH),
    "prefetch 512 bytes ahead": Variant(ahead(512)),
    "prefetch 1 KiB ahead": Variant(ahead(1024)),
    "prefetch 4 KiB ahead": Variant(ahead(4096)),
    "blocks of 1 KiB": Variant((("cpu/prefetch.h", "kBlockBytes = 256", "kBlockBytes = 1024"),)),
    "chunks of 8 Ki": Variant(chunk=8 * 1024),
    "chunks of 128 Ki": Variant(chunk=128 * 1024),
    "chunks of 1 Mi": Variant(chunk=1024 * 1024),
}


def norm_ahead(step: int) -> tuple[tuple[str, str, str], ...]:
    return (*PREFETCH, ("cpu/prefetch.h", "kNormAheadBytes = 1024", f"kNormAheadBytes = {step}"))


NORM_VARIANTS = {
    "as shipped": Variant(),
    "no prefetch": Variant(NO_PREFETCH),
    "prefetch 1 KiB ahead": Variant(PREFETCH),
    "chunks of 256 Ki": Variant(chunk=256 * 1024),
    "prefetch 2 KiB ahead": Variant(norm_ahead(2048)),
    "prefetch 4 KiB ahead": Variant(norm_ahead(4096)),
    "prefetch 8 KiB ahead": Variant(norm_ahead(8192)),
}


class Passes:
    """The library of a variant."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.chunk = variant.chunk
        tree = Path(tempfile.mkdtemp(dir=folder))
        shutil.copytree(CSRC, tree / "csrc")
        for name, old, new in variant.replace:
            path = tree / "csrc" / name
            text = path.read_text()
            assert old in text, f"{name} has no {old!r} any more"
            path.write_text(text.replace(old, new))
        target, width = LEVELS[_C.instruction_set()]
        library = tree / "passes.so"
        command = [
            "c++",
            "-std=c++20",
            "-O3",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-w",
            "-shared",
            "-fPIC",
            "-pthread",
        ]
        command += [f'-DLEVEL="{target}"', f"-DVECTOR_BYTES={width}", f"-I{tree / 'csrc'}", str(HERE / "passes.cpp")]
        command += [str(tree / "csrc" / "cpu" / name) for name in ("codes.cpp", "rounding.cpp")]
        subprocess.run([*command, "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        for function in (self.library.squares, self.library.fillings):
            function.restype = ctypes.c_double

    def adamw(self, w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> None:
        self.library.adamw(*map(_pointer, (w, g, m, v)), *self._work(w))

    def squares(self, g: torch.Tensor) -> None:
        self.library.squares(_pointer(g), *self._work(g))

    def stream(self, x: torch.Tensor, non_temporal: bool) -> None:
        self.library.stream(_pointer(x), *self._work(x), ctypes.c_bool(non_temporal))

    def _work(self, x: torch.Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, int]:
        return ctypes.c_int64(x.numel()), ctypes.c_int64(self.chunk), torch.get_num_threads()


def _pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def memory(numel: int, huge: bool) -> torch.Tensor:
    """float32 in pages of its own, huge ones if asked for."""
    block = mmap.mmap(-1, (numel * 4 + 2**21 - 1) // 2**21 * 2**21)
    block.madvise(MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(block, dtype=torch.float32, count=numel)


def adam_tensors(numel: int, make: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    w, g, m, v = (make(numel) for _ in range(4))
    w.normal_(std=WEIGHT_SCALE)
    g.normal_(std=GRADIENT_SCALE)
    m.copy_(g)
    v.copy_(g).square_()
    return [w, g, m, v]


@dataclass
class Bench:
    console: Console
    budget: float
    grids: list[Grid] = field(default_factory=list)

    def compare(self, title: str, steps: dict[str, Step], caption: str = "") -> dict[str, float]:
        """Prints medians and their ratio to the first; returns the medians in seconds."""
        seconds = time_in_rounds(steps, self.budget)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows = [[name, f"{median * 1e3:.2f} ms", f"{median / first:.3f}"] for name, median in medians.items()]
        self.grids.append(Grid(title, ["variant", "median", "ratio"], rows, caption))
        self.grids[-1].show(self.console)
        return medians


def kernels(bench: Bench, numel: int, folder: Path) -> Passes:
    tensors = adam_tensors(numel, torch.empty)
    steps = {name: Passes(variant, folder) for name, variant in STEP_VARIANTS.items()}
    shipped = steps["as shipped"]
    size = f"{numel / 1e6:.0f}M elements"
    bench.compare(
        f"AdamW pass, {size}", {name: lambda passes=passes: passes.adamw(*tensors) for name, passes in steps.items()}
    )
    norms = {name: Passes(variant, folder) for name, variant in NORM_VARIANTS.items()}
    bench.compare(
        f"Norm pass, {size}", {name: lambda passes=passes: passes.squares(tensors[1]) for name, passes in norms.items()}
    )
    return shipped


def pages_and_stores(bench: Bench, numel: int, shipped: Passes) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    small, huge = (adam_tensors(numel, lambda n, huge=huge: memory(n, huge)) for huge in (False, True))
    steps = {"pages of 4 KiB": lambda: shipped.adamw(*small), "huge pages": lambda: shipped.adamw(*huge)}
    bench.compare("Huge pages", steps, f"the kernel's setting: {setting}")
    x = memory(numel * 2 // CHUNK * CHUNK, huge=False)
    x.fill_(1)
    stores = {"ordinary": lambda: shipped.stream(x, False), "non-temporal": lambda: shipped.stream(x, True)}
    bench.compare("Stores of an in-place stream", stores)


def scalars(bench: Bench, shipped: Passes) -> None:
    times = 100_000
    seconds = time_in_rounds(
        {
            "a group, a step: doubles from lr, betas, step count": lambda: shipped.library.fillings(
                ctypes.c_int64(times)
            ),
        },
        bench.budget / 4,
    )
    rows = [[name, f"{statistics.median(taken) / times * 1e9:.0f} ns"] for name, taken in seconds.items()]
    bench.grids.append(Grid("Scalars of a step", ["once for", "median"], rows))
    bench.grids[-1].show(bench.console)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="write the tables to this file, as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(Console(width=100), 3 if options.quick else 15)
    about = ", ".join(f"{key} {value}" for key, value in stamp("cpu").items())
    bench.console.print(about)
    with tempfile.TemporaryDirectory() as folder:
        shipped = kernels(bench, options.elements, Path(folder))
        pages_and_stores(bench, options.elements, shipped)
        scalars(bench, shipped)
    if options.output is not None:
        tables = [f"# What was tried on a CPU\n\n{about}", *(grid.markdown() for grid in bench.grids)]
        options.output.write_text("\n\n".join(tables))


if __name__ == "__main__":
    main()
