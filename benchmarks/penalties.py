"""What each penalty and constraint costs over L1 alone, in the same rounds.

    python benchmarks/penalties.py [--elements 50_000_000 65_536] [--threads 2] [--seconds 10] [--instruction-sets ...]

Ratios to L1 alone; in nanoseconds an element, and in a processor's cycles where a C compiler tells how long one is, for
L1 alone and for torch's fused step, which has its decay alone. With more threads than one, the cycles of all of them.

Bars where memory bounds the step: 3 % for a penalty on elements, 15 % for `group_l1` by rows."""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import torch
from cases import Problem
from measure import Step, clock_hz, stamp, time_in_rounds, wall_time
from peers import DECAY, L1, LR
from report import Grid
from rich.console import Console

import fusedreg
from fusedreg import _C

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
TORCH = "torch, fused"


def hot(step: Step) -> float:
    """Of steps that follow each other, whose states are still in the cache."""
    step()
    return wall_time(lambda: [step() for _ in range(10)]) / 10


def time_settings(elements: int, name: str, seconds: float) -> dict[str, float]:
    """Nanoseconds an element of torch's step and of ours with L1 alone; of the other settings the ratio to L1 alone.
    Medians. Four settings at a time, as each has states of its own; L1 alone and torch are in each."""
    cls, options = OPTIMIZERS[name]
    is_large = elements > 1_000_000
    problem = Problem.random([(elements // 40_960, 4096)] * 10 if is_large else [(elements // 256, 256)])
    others = [each for each in SETTINGS if each != ALONE]
    found: dict[str, float] = {}
    assert cls.spec.twin is not None
    for begin in range(0, len(others), 4):
        some = [ALONE, *others[begin : begin + 4]]
        # So small an lr that no weight goes far from where it is, however many steps are taken.
        steps = {
            each: cls(problem.params, lr=LR * 1e-3, backend="cpp", **options, **SETTINGS[each]).step for each in some
        }
        steps[TORCH] = cls.spec.twin(problem.params, lr=LR * 1e-3, fused=True, **options).step
        taken = time_in_rounds(steps, seconds / 2, None if is_large else hot)
        medians = {each: statistics.median(times) for each, times in taken.items()}
        found |= {each: medians[each] / medians[ALONE] for each in some}
        found |= {each: medians[each] / problem.numel * 1e9 for each in (ALONE, TORCH)}
        del steps
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[50_000_000, 65_536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each column")
    parser.add_argument("--instruction-sets", nargs="+", choices=_C.instruction_sets(), default=[_C.instruction_set()])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    hertz = clock_hz()
    units = {"ns": 1.0} | ({} if hertz is None else {"cycles": hertz * 1e-9 * arguments.threads})
    for instruction_set in arguments.instruction_sets:
        _C.use_instruction_set(instruction_set)
        columns = {
            f"{name}, {elements:,}": time_settings(elements, name, arguments.seconds)
            for name in OPTIMIZERS
            for elements in arguments.elements
        }
        rows = []
        for unit, in_units in units.items():
            rows += [
                [f"{each}, {unit} an element", *(f"{column[each] * in_units:.3f}" for column in columns.values())]
                for each in (TORCH, ALONE)
            ]
        rows += [
            [setting, *(f"{column[setting]:.2f}" for column in columns.values())]
            for setting in SETTINGS
            if setting != ALONE
        ]
        title = f"A step, over one with L1 alone; {instruction_set}"
        Grid(title, ["setting", *columns], rows, "Medians, in alternation.").show(console)


if __name__ == "__main__":
    main()
