"""How long an optimizer step takes on a CPU, beside what else could take it.

    python benchmarks/cpu_step.py [--threads 2] [--quick] [--output FOLDER] [--only steps variants sweeps training]

Ratios are to torch's plain fused step, which does no regularization but its decay: medians, taken in one process, in
alternation. Nothing is timed before it has been checked against the reference. Writes a report, numbers and pictures.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from pathlib import Path
from typing import Any

import plots
import torch
import training_step
from cases import CASES, Problem, Shape, numel_of
from gate import failures
from measure import peak_extra_mib, stamp, stream_step, time_in_rounds
from peers import PLAIN, RULES, all_peers, others, our_contenders, the_best_two
from report import Grid, Row, grid_of, rows_of, write
from rich.console import Console

BACKEND = "cpp"
PARTS = ("steps", "variants", "sweeps", "training")
MEMORY_BOUND = 20_000_000
"""From this many parameters on, no cache holds them: GB/s and the extra memory say something."""
COMPILED_CASES = ("50M in 10 tensors", "20 tiny")
"""Inductor takes minutes to compile a step over hundreds of tensors."""
SWEPT = ["torch, for-loop", "torch, foreach", PLAIN, "by hand: clip, fused, shrink"]
SWEPT += [f"fusedreg {BACKEND}: decay, l1, l2", f"fusedreg {BACKEND}: decay, l1, l2, clip"]


class Bench:
    """What is found is kept for the report as it is shown."""

    def __init__(self, quick: bool, console: Console, other_libraries: list[str]) -> None:
        self.quick, self.console, self.other_libraries = quick, console, other_libraries
        self.grids: list[Grid] = []
        self.results: dict[str, Any] = {}

    def show(self, grid: Grid) -> None:
        self.grids.append(grid)
        grid.show(self.console)

    def budget(self, seconds: float) -> float:
        return seconds / 12 if self.quick else seconds

    def rows(
        self, shapes: list[Shape], rule_name: str, dtype: torch.dtype, budget: float, which: str
    ) -> tuple[list[Row], float | None]:
        """A row for each contender, and the stream's GB/s in the same rounds where the case is bound by memory."""
        rule, problem = RULES[rule_name], Problem.random(shapes, dtype)
        if which == "few":
            peers = the_best_two(rule, problem)
        else:
            peers = all_peers(rule, problem, self.other_libraries, compile=which == "compiled")
        contenders = [*peers, *our_contenders(rule, problem, BACKEND)]
        if which == "swept":
            contenders = [contender for contender in contenders if contender.name in SWEPT]
        steps = {contender.name: contender.step for contender in contenders}
        is_memory_bound = problem.numel >= MEMORY_BOUND
        stream, stream_bytes = stream_step() if is_memory_bound else (None, 0)
        if stream is not None:
            steps["stream"] = stream  # in the same rounds: the bandwidth of a shared machine drifts
        seconds = time_in_rounds(steps, self.budget(budget))
        rows = rows_of(contenders, seconds, PLAIN, rule, dtype, problem.numel)
        if which != "few" and is_memory_bound:
            for row, contender in zip(rows, contenders, strict=True):
                extra = peak_extra_mib(contender.step)
                row.extra["extra MiB"] = "not known" if extra is None else extra
        del contenders, peers, steps, problem
        gc.collect()
        return rows, stream_bytes / statistics.median(seconds["stream"]) / 1e9 if is_memory_bound else None

    def steps(self) -> None:
        """Real shape lists, every peer."""
        found = {}
        for name, shapes in CASES.items():
            if self.quick and numel_of(shapes) > MEMORY_BOUND * 3:
                continue
            compiled = name in COMPILED_CASES and not self.quick
            rows, stream = self.rows(shapes, "AdamW", torch.float32, 12, "compiled" if compiled else "all")
            caption = f"{len(shapes)} tensors, {numel_of(shapes):,} parameters, AdamW, float32"
            if stream is not None:
                caption += (
                    f"; x.mul_() streams {stream:.1f} GB/s; GB/s are of the bytes that the job takes at the least; "
                    "extra: peak memory of a step above what it started with"
                )
            self.show(grid_of(name, rows, stream, caption))
            found[name] = {"stream_gb_per_s": stream, "rows": [vars(row) for row in rows]}
        self.results["steps"] = found

    def variants(self) -> None:
        """Dtypes and threads, of the rules that torch has a fused step of; rules_step.py times every rule."""
        shapes, cells, found = CASES["ResNet-50"], [], []
        threads = torch.get_num_threads()
        names: list[str] = []
        for rule_name in (name for name, rule in RULES.items() if "fused" in rule.best):
            for dtype in (torch.float32, torch.bfloat16):
                for count in [threads] if self.quick else sorted({1, threads}):
                    torch.set_num_threads(count)
                    rows, _ = self.rows(shapes, rule_name, dtype, 2, "few")
                    names = [row.contender for row in rows]
                    short = str(dtype).removeprefix("torch.")
                    cells.append([f"{rule_name}, {short}, {count} threads", *(f"{row.ratio:.2f}" for row in rows)])
                    found.append(
                        {"rule": rule_name, "dtype": short, "threads": count, "rows": [vars(row) for row in rows]}
                    )
        torch.set_num_threads(threads)
        caption = "ResNet-50's shapes; ratio to torch's fused step of the same rule, dtype and threads"
        self.show(Grid("Rules, dtypes, threads", ["ratio", *names], cells, caption))
        self.results["variants"] = found

    def sweep(self, what: str, sizes: list[int], shapes_of: Any) -> tuple[dict[str, list[float]], list[float]]:
        lines: dict[str, list[float]] = {name: [] for name in SWEPT}
        ratios: list[list[str]] = []
        for size in sizes:
            rows, _ = self.rows(shapes_of(size), "AdamW", torch.float32, 3, "swept")
            by_name = {row.contender: row for row in rows}
            for name in SWEPT:
                lines[name].append(by_name[name].milliseconds)
            ratios.append([f"{size:,}", *(f"{by_name[name].ratio:.2f}" for name in SWEPT)])
        self.show(Grid(f"Ratios by number of {what}", [what, *SWEPT], ratios))
        self.results[f"by {what}"] = {"sizes": sizes, "milliseconds": lines}
        return lines, [numel_of(shapes_of(size)) for size in sizes]

    def sweeps(self, folder: Path) -> None:
        stream, stream_bytes = stream_step()
        taken = time_in_rounds({"stream": stream}, self.budget(1.0))["stream"]
        bandwidth = stream_bytes / statistics.median(taken)
        del stream
        per_element = RULES["AdamW"].bytes_per_element(torch.float32, clip=True)
        for what, sizes, shapes_of in (
            ("parameters", [10**k for k in range(2, 7 if self.quick else 9)], lambda size: [(size,)]),
            (
                "tensors",
                [1, 10, 100, 1000] if self.quick else [1, 10, 100, 1000, 10_000],
                lambda size: [(32, 32)] * size,
            ),
        ):
            lines, numels = self.sweep(what, sizes, shapes_of)
            detail = "in one tensor" if what == "parameters" else "of 32x32"
            floor = [numel * per_element / bandwidth * 1e3 for numel in numels]
            title = f"One AdamW step by number of {what} ({detail}), {torch.get_num_threads()} threads"
            plots.sweep(folder / f"cpu-by-{what}.png", title, what, sizes, lines, floor)

    def training(self, folder: Path) -> None:
        """Whole training steps: what share the optimizer has."""
        found = {name: training_step.measure(name, self.budget(10)) for name in training_step.MODELS}
        for name, taken in found.items():
            cells = [
                [contender, f"{passes:.2f}", f"{step:.3f}", f"{step / (passes + step):.1%}", f"{passes + step:.2f}"]
                for contender, (passes, step) in taken.items()
            ]
            headers = ["training with", "forward, backward", "step", "share", "both, ms"]
            self.show(Grid(f"Training step: {name}", headers, cells))
        self.results["training"] = found
        plots.shares(folder / "cpu-training.png", "What a training step spends on its optimizer", found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads for every contender (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a minute, to see it work; the times mean less")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), help="a folder for the report")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts of it")
    return parser.parse_args()


def wrong_results(console: Console) -> bool:
    try:
        wrong = [
            failure
            for name, rule in RULES.items()
            for dtype in (torch.float32, torch.bfloat16)
            for failure in failures(name, rule, dtype, BACKEND, "cpu")
        ]
    except RuntimeError as error:  # the backend does not run here
        wrong = [str(error)]
    for failure in wrong:
        console.print(f"Wrong: {failure}", style="bold red", markup=False)
    return bool(wrong)


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console(width=max(Console().width, 110))
    if wrong_results(console):
        console.print("Nothing was timed.")
        return 1
    about = stamp("cpu")
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    console.print(f"{BACKEND} agrees with the reference: {len(RULES)} rules, 2 dtypes, every setting that is timed")
    working, missing = others("cpu")
    for name, reason in missing.items():
        console.print(f"Not compared with {name}: {reason}", markup=False, highlight=False)

    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.quick, console, working)
    if "steps" in options.only:
        bench.steps()
        cases = {
            name: {row["contender"]: row["ratio"] for row in found["rows"]}
            for name, found in bench.results["steps"].items()
        }
        plots.ratios(options.output / "cpu-steps.png", f"One AdamW step, {options.threads} threads", cases)
    if "variants" in options.only:
        bench.variants()
    if "sweeps" in options.only:
        bench.sweeps(options.output)
    if "training" in options.only:
        bench.training(options.output)
    about |= (
        {"not compared with": "; ".join(f"{name} ({reason})" for name, reason in missing.items())} if missing else {}
    )
    write(options.output, "cpu", "One optimizer step on a CPU", about, bench.grids, bench.results)
    console.print(f"Written to {options.output}/cpu.md, cpu.json and cpu-*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
