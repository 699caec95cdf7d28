"""What each penalty and constraint costs over L1 alone, in the same rounds.

    python benchmarks/penalties.py [--elements 50_000_000 65_536] [--threads 2] [--seconds 10]

Bars where memory bounds the step: 3 % for a penalty on elements, 15 % for `group_l1` by rows."""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import torch
from cases import Problem
from measure import stamp, time_in_rounds
from peers import DECAY, L1, LR
from report import Grid
from rich.console import Console

import fusedreg

ALONE = "l1 alone"
# Each beside l1 and at a strength that leaves most weights alive, as in training.
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    ALONE: {"l1": L1},
    "l1, l2": {"l1": L1, "l2": 1e-4},
    "freeze_zeros": {"l1": L1, "freeze_zeros": True},
    "l0": {"l1": L1, "l0": 1e-9},
    "mcp_gamma": {"l1": L1, "mcp_gamma": 3.0},
    "lower, upper": {"l1": L1, "lower": -0.1, "upper": 0.1},
    "group_l1, rows": {"l1": L1, "group_l1": 1e-6, "unit": "rows"},
    "max_unit_norm, rows": {"l1": L1, "max_unit_norm": 2.0, "unit": "rows"},
}
OPTIMIZERS: dict[str, tuple[type[fusedreg.FusedRegOptimizer], dict[str, Any]]] = {
    "AdamW": (fusedreg.FusedRegAdamW, {"weight_decay": DECAY}),
    "SGD with momentum": (fusedreg.FusedRegSGD, {"weight_decay": DECAY, "momentum": 0.9}),
}


def time_settings(elements: int, name: str, seconds: float) -> dict[str, float]:
    """The median of a step with each setting. Four at a time, as each has states of its own; l1 alone is in each."""
    cls, options = OPTIMIZERS[name]
    problem = Problem.random(
        [(max(elements // 10 // 4096, 1), 4096)] * 10 if elements > 10**6 else [(elements // 256, 256)]
    )
    others = [each for each in SETTINGS if each != ALONE]
    found = {ALONE: 1.0}
    for begin in range(0, len(others), 4):
        some = [ALONE, *others[begin : begin + 4]]
        steps = {
            each: cls(problem.params, lr=LR * 1e-3, backend="cpp", **options, **SETTINGS[each]).step for each in some
        }
        taken = time_in_rounds(steps, seconds / 2)
        medians = {each: statistics.median(times) for each, times in taken.items()}
        found |= {each: medians[each] / medians[ALONE] for each in some}
        found["ns"] = medians[ALONE] / problem.numel * 1e9
        del steps
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[50_000_000, 65_536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each column")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    columns = {
        f"{name}, {elements:,}": time_settings(elements, name, arguments.seconds)
        for name in OPTIMIZERS
        for elements in arguments.elements
    }
    rows = [
        ["l1 alone, ns an element", *(f"{column['ns']:.3f}" for column in columns.values())],
        *([setting, *(f"{column[setting]:.2f}" for column in columns.values())] for setting in SETTINGS),
    ]
    Grid("A step, over one with l1 alone", ["setting", *columns], rows, "Medians, in alternation.").show(console)


if __name__ == "__main__":
    main()
