"""Where the microseconds of a step go that no kernel takes: Python, the plan's check, the pass over small tensors.

    python benchmarks/plumbing.py

One thread. Hot: step after step. Swept: with 200 MB streamed through the caches before each, as a model's forward and
backward pass would; then the check waits for memory and for address translation. Other lr, and betas: where a scheduler
has changed those before the step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from cases import Problem, Shape
from measure import no_garbage_collection, stamp, wall_time
from peers import OURS, RULES, our_optimizer, twin
from report import Grid
from rich.console import Console

from fusedreg.backends import StepScalars

CASES: dict[str, list[Shape]] = {
    "1 of 4x4": [(4, 4)],
    "20 of 4x4": [(4, 4)] * 20,
    "1000 of 4x4": [(4, 4)] * 1000,
}
ROUNDS = 200
SWEEP_ELEMENTS = 25_000_000


def medians(parts: dict[str, Callable[[], object]], before: Callable[[], object]) -> dict[str, float]:
    """Microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    with no_garbage_collection():
        for name, part in parts.items():
            for _ in range(ROUNDS):
                before()
                taken[name].append(wall_time(part))
    return {name: statistics.median(times) * 1e6 for name, times in taken.items()}


def row(name: str, before: Callable[[], object]) -> list[str]:
    rule, problem = RULES["AdamW"], Problem.random(CASES[name])
    optimizer = our_optimizer(rule, problem.params, problem.max_norm, "cpp", **OURS["decay, l1, l2"])
    torchs = twin(rule, problem.params, fused=True)
    for either in (optimizer, torchs):
        either.step()
    assert optimizer._plans is not None
    (plan,) = optimizer._plans.plans  # the update below works on the gradients that it has read
    scalars = StepScalars()
    (group,) = optimizer.param_groups

    def step_with_other_lr() -> None:
        group["lr"] *= 0.999
        optimizer.step()

    def step_with_other_betas() -> None:
        group["betas"] = (0.999 * group["betas"][0], group["betas"][1])
        step_with_other_lr()

    parts = {
        "torch": torchs.step,
        "other lr": step_with_other_lr,
        "other betas": step_with_other_betas,
        "whole": optimizer.step,
        "check": plan.refresh,
        "pass": lambda: plan.update(scalars),
    }
    found = medians(parts, before)
    python = found["whole"] - found["check"] - found["pass"]
    of_whole = [found["torch"], found["whole"], python, found["check"], found["pass"]]
    return [f"{value:.1f}" for value in (*of_whole, found["other lr"], found["other betas"])]


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(stamp("cpu"))
    swept = torch.ones(SWEEP_ELEMENTS)
    states: dict[str, Callable[[], object]] = {"hot": lambda: None, "swept": lambda: swept.mul_(1.0)}
    rows = [[f"{name}, {state}", *row(name, before)] for state, before in states.items() for name in CASES]
    headers = ["microseconds", "torch, fused", "fusedreg", "of it: Python", "plan's check", "pass"]
    headers += ["other lr", "and betas"]
    Grid("One AdamW step with decay, l1, l2", headers, rows).show(console)


if __name__ == "__main__":
    main()
