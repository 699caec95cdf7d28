"""How long an optimizer step takes on a GPU, beside torch's own, by hand, and what else is installed.

    python benchmarks/gpu_step.py [--output benchmarks/results] [--smoke]

Medians of CUDA events around a step, or around a row of steps where one is short, in one process and in alternation,
after a check against the reference; and the time that the host takes to hand a step over. From HUGE parameters on, one
after the other, as the states of all do not fit. Written to OUTPUT after each case, as JSON and Markdown, under the
GPU's name, beside the cases that earlier runs have written there. `--smoke` runs tiny sizes, on the CPU too, to see
that all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Problem, Shape
from gate import failures
from measure import GpuClock, Seconds, copy_bandwidth, host_time, stamp, stream_step, time_in_rounds, wall_time
from peers import PLAIN, RULES, Contender, all_peers, others, our_contenders
from report import Row, grid_of, rows_of, write
from rich.console import Console

from fusedreg import backends

RULE = "AdamW"
GPU_CASES: dict[str, list[Shape]] = {
    "1B in 20 tensors": [(50_000_000,)] * 20,
    "GPT-2, 125M": CASES["GPT-2, 125M"],
    "300 tensors, 125M": [(417_000,)] * 300,
    "1000 of 64x64": CASES["1000 of 64x64"],
    "20 tiny": CASES["20 tiny"],
}
SMOKE_CASES: dict[str, list[Shape]] = {"smoke": [(1000, 33), (7,)] * 4}
COMPILED_CASES = ("1B in 20 tensors", "20 tiny", "smoke")
"""Inductor takes minutes to compile a step over hundreds of tensors."""
HUGE = 500_000_000
"""From this many parameters on, not every contender's state fits on one GPU."""
LONG = 50_000_000
"""From this many parameters on, one step is long enough to be timed alone."""


def usable_backends(device: str) -> list[str]:
    param = torch.zeros(2, device=device, requires_grad=True)
    return [
        name
        for name, backend in backends.BACKENDS.items()
        if name != "reference"
        and not (backend.unavailable_reason() or backend.rejection(RULES[RULE].ours.spec, param, []))
    ]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_all(contenders: list[Contender], device: str, budget: float, repeats: int) -> tuple[Seconds, Seconds]:
    """The device's and the host's seconds of each; none where there is no GPU."""
    steps = {contender.name: contender.step for contender in contenders}
    seconds = time_in_rounds(steps, budget, GpuClock(repeats) if device == "cuda" else wall_time)
    return seconds, time_in_rounds(steps, budget / 4, host_time) if device == "cuda" else {}


def time_in_turn(contenders: list[Contender], device: str, budget: float) -> tuple[Seconds, Seconds]:
    """As ``time_all``, with one optimizer's state at a time. Empties the list."""
    seconds: Seconds = {}
    host: Seconds = {}
    share = budget / len(contenders)
    while contenders:
        its_seconds, its_host = time_all([contenders.pop(0)], device, share, 1)
        seconds |= its_seconds
        host |= its_host
        free()
    return seconds, host


def run_case(name: str, shapes: list[Shape], device: str, budget: float, other_libraries: list[str]) -> list[Row]:
    problem = Problem.random(shapes, device=device)
    contenders = all_peers(RULES[RULE], problem, other_libraries, compile=name in COMPILED_CASES)
    for backend in usable_backends(device):
        contenders += our_contenders(RULES[RULE], problem, backend)
    timed = [dataclasses.replace(contender, step=free) for contender in contenders]  # holds no state
    if problem.numel >= HUGE:
        seconds, host = time_in_turn(contenders, device, budget)
    else:
        seconds, host = time_all(contenders, device, budget, 1 if problem.numel >= LONG else 50)
    rows = rows_of(timed, seconds, PLAIN, RULES[RULE], torch.float32, problem.numel)
    for row in rows:
        if row.contender in host:
            row.extra["host us"] = statistics.median(host[row.contender]) * 1e6
    return rows


def written_before(path: Path, about: dict[str, Any]) -> dict[str, list[Row]]:
    """The cases that an earlier run has written, of the same versions on the same machine."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    volatile = ("stream, GB/s", "not compared with")
    same = all(found["about"].get(key) == value for key, value in about.items() if key not in volatile)
    return {name: [Row(**row) for row in rows] for name, rows in found["cases"].items()} if same else {}


def bandwidth(device: str) -> float:
    """Bytes a second that no step can outrun."""
    if device == "cuda":
        return copy_bandwidth(1_000_000_000)
    step, size = stream_step()
    return size / statistics.median(time_in_rounds({"stream": step}, 0.5)["stream"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--cases", nargs="*", help=f"any of: {', '.join(GPU_CASES)}")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("there is no CUDA device; --smoke runs tiny sizes on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(width=max(Console().width, 110))

    wrong = [
        failure
        for backend in usable_backends(device)
        for failure in failures(RULE, RULES[RULE], torch.float32, backend, device)
    ]
    if wrong:
        raise SystemExit("\n".join([*wrong, "nothing was timed"]))
    about, working, missing = stamp(device), *others(device)
    about["not compared with"] = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
    limit = bandwidth(device)
    about["stream, GB/s"] = round(limit / 1e9)
    console.print(about)

    stem = "smoke" if options.smoke else re.sub(r"\W+", "-", about["gpu"].lower())
    cases = written_before(options.output / f"{stem}.json", about)
    for name, shapes in (SMOKE_CASES if options.smoke else GPU_CASES).items():
        if options.cases and name not in options.cases:
            continue
        cases[name] = run_case(name, shapes, device, 0.5 if options.smoke else 15, working)
        grids = [grid_of(each, rows, limit / 1e9) for each, rows in cases.items()]
        grids[list(cases).index(name)].show(console)
        results = {each: [vars(row) for row in rows] for each, rows in cases.items()}
        write(options.output, stem, about.get("gpu", "CPU"), about, grids, {"cases": results})
        free()
    console.print(f"Written to {options.output / stem}.json and .md")


if __name__ == "__main__":
    main()
