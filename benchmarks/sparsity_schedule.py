"""Times SparsitySchedule beside the steps that it stands between: all renewals of a schedule over all steps of its span.

    python benchmarks/sparsity_schedule.py [--elements 25_000_000] [--threads N]

Every ten steps, from no zeros to 90 %; the last renewal, which is exact, apart.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from cases import Problem
from measure import no_garbage_collection, stamp, wall_time
from report import Grid
from rich.console import Console

from fusedreg import FusedRegAdamW, FusedRegSGD, SparsitySchedule

TARGET, EVERY, STEPS, BEGIN, END = 0.9, 10, 150, 0.1, 0.9
CASES: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "AdamW, float32": (FusedRegAdamW, torch.float32, {}),
    "AdamW, bfloat16": (FusedRegAdamW, torch.bfloat16, {}),
    "SGD with momentum, float32": (FusedRegSGD, torch.float32, {"momentum": 0.9}),
    "AdamW, float32, rows": (FusedRegAdamW, torch.float32, {"sparsity_unit": "rows"}),
}


def time_case(elements: int, cls: type, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, float]:
    """Seconds: all steps of the span, all renewals but the last, the last."""
    rows = max(elements // 10 // 2500, 1)
    params = Problem.random([(rows, 2500)] * 10, dtype).params
    optimizer = cls(params, lr=1e-5, sparsity=TARGET, **options)
    schedule = SparsitySchedule(optimizer, STEPS, BEGIN, END, EVERY)
    steps, renewals, last = 0.0, 0.0, 0.0
    with no_garbage_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(1, int(END * STEPS) + 1):
            taken, renewed = wall_time(optimizer.step), wall_time(schedule.step)
            if t > BEGIN * STEPS:
                steps += taken
                if t == int(END * STEPS):
                    last = renewed
                else:
                    renewals += renewed
    zeros = sum(int((param == 0).sum()) for param in params)
    assert abs(zeros / sum(param.numel() for param in params) - TARGET) < 0.01
    return {"steps": steps, "renewals": renewals, "last": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    count = int(END * STEPS) - int(BEGIN * STEPS)
    rows = []
    for name, case in CASES.items():
        seconds = time_case(arguments.elements, *case)
        step = seconds["steps"] / count
        renewal = seconds["renewals"] / (count // EVERY - 1)
        share = (seconds["renewals"] + seconds["last"]) / seconds["steps"]
        cells = [f"{1e3 * step:.2f}", f"{1e3 * renewal:.2f}", f"{renewal / step:.2f}", f"{1e3 * seconds['last']:.2f}"]
        rows.append([name, *cells, f"{share:.1%}"])
    headers = ["", "a step, ms", "a renewal, ms", "in steps", "the last, ms", "all of it, of the steps"]
    Grid(f"{arguments.elements:,} weights, every {EVERY} steps, to {TARGET:.0%} zeros", headers, rows).show(console)


if __name__ == "__main__":
    main()
