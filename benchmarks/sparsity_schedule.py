"""Times SparsitySchedule beside the ten steps that stand between two of its renewals.

    python benchmarks/sparsity_schedule.py [--elements 25_000_000] [--threads N]

On the way to 90 % zeros in 4000 steps: where the schedule begins, at half of its span, and at its last renewals, of
which the very last is exact."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from cases import Problem
from measure import no_garbage_collection, stamp, wall_time
from report import Grid
from rich.console import Console

from fusedreg import FusedRegAdamW, FusedRegSGD, SparsitySchedule

TARGET, EVERY, STEPS, BEGIN, END = 0.9, 10, 4000, 0.1, 0.75
# A place in the schedule, and how many renewals are timed there.
PLACES = {"begin": (BEGIN, 6), "half": ((BEGIN + END) / 2, 6), "end": (END - 0.015, 6)}
CASES: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "AdamW, float32": (FusedRegAdamW, torch.float32, {}),
    "AdamW, bfloat16": (FusedRegAdamW, torch.bfloat16, {}),
    "SGD with momentum, float32": (FusedRegSGD, torch.float32, {"momentum": 0.9}),
    "AdamW, float32, rows": (FusedRegAdamW, torch.float32, {"sparsity_unit": "rows"}),
}


def time_case(elements: int, cls: type, dtype: torch.dtype, options: dict[str, Any]) -> list[float]:
    """Seconds: a step, a renewal at each of the places, the last renewal. Medians."""
    rows = max(elements // 10 // 2500, 1)
    params = Problem.random([(rows, 2500)] * 10, dtype).params
    optimizer = cls(params, lr=1e-5, sparsity=TARGET, **options)
    schedule = SparsitySchedule(optimizer, STEPS, BEGIN, END, EVERY)
    optimizer.step()
    steps: list[float] = []
    found = []
    last = 0.0
    with no_garbage_collection():
        for place, count in PLACES.values():
            schedule.last_step = int(place * STEPS) // EVERY * EVERY - 1
            schedule.step()  # brings the zeros to where they are there
            renewals = []
            for _ in range(count):
                for _ in range(EVERY):
                    steps.append(wall_time(optimizer.step))
                    taken = wall_time(schedule.step)
                    if schedule.last_step == int(END * STEPS):
                        last = taken
                renewals.append(taken)
            found.append(statistics.median(renewals[2:] if place < END - 0.02 else renewals[1:-1]))
    zeros = sum(int((param == 0).sum()) for param in params)
    assert abs(zeros / sum(param.numel() for param in params) - TARGET) < 0.001
    return [statistics.median(steps), *found, last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    rows = []
    for name, case in CASES.items():
        step, *renewals = time_case(arguments.elements, *case)
        cells = [f"{1e3 * each:.1f} ({each / step / EVERY:.1%})" for each in renewals]
        rows.append([name, f"{1e3 * step:.1f}", *cells])
    headers = ["milliseconds", "a step", *(f"a renewal, {place}" for place in PLACES), "the last"]
    caption = "In brackets: of the ten steps between two renewals."
    Grid(f"{arguments.elements:,} weights, every {EVERY} steps, to {TARGET:.0%} zeros", headers, rows, caption).show(
        console
    )


if __name__ == "__main__":
    main()
