"""Every rule beside torch's best implementation of it, and beside other libraries'.

    python benchmarks/rules_step.py [--threads 2] [--seconds 4]

torch's best is its fused step where there is one, else the faster of foreach and for-loop. Ratios are to it, with
nothing on but its own decay; for a rule that torch does not have, to our own step with nothing on."""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import statistics
from collections.abc import Callable
from typing import Any

import torch
from cases import Problem, Shape
from measure import stamp, time_in_rounds
from peers import L1, L2, LR
from report import Grid
from rich.console import Console

from fusedreg import FusedRegOptimizer
from fusedreg.parity import known
from fusedreg.rules.registry import OPTIMIZERS

SHAPES: dict[str, list[Shape]] = {"25M": [(1000, 2500)] * 10, "1000 of 64x64": [(64, 64)] * 1000}
MOMENTUM: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
"""SGD without momentum has no state: the case that people train with is timed."""
OTHER_LIBRARIES = {"optimi": "optimi", "pytorch_optimizer": "pytorch_optimizer"}
COLUMNS = ("torch", "optimi", "pytorch_optimizer", "nothing on", "everything on", "everything on, clip")
Step = Callable[[], Any]


def torch_steps(cls: type[FusedRegOptimizer], problem: Problem, options: dict[str, Any]) -> dict[str, Step]:
    twin = cls.spec.twin
    if twin is None:
        return {}
    is_fused = "fused" in inspect.signature(twin).parameters
    ways = [{"fused": True}] if is_fused else [{"foreach": True}, {"foreach": False}]
    return {
        f"torch, {next(iter(way))}={next(iter(way.values()))}": twin(problem.params, lr=LR, **options, **way).step
        for way in ways
    }


def other_steps(name: str, problem: Problem, options: dict[str, Any]) -> dict[str, Step]:
    """Those that have an optimizer of this name, are installed and take a step of these gradients."""
    found = {}
    for library, module_name in OTHER_LIBRARIES.items():
        try:
            module = importlib.import_module(module_name)
            cls = next(getattr(module, each) for each in dir(module) if each.lower() == name.lower())
            optimizer = cls(
                problem.params,
                lr=LR,
                **{key: each for key, each in options.items() if key in inspect.signature(cls).parameters},
            )
            optimizer.step()
        except Exception:
            continue
        found[library] = optimizer.step
    return found


def our_steps(cls: type[FusedRegOptimizer], problem: Problem, options: dict[str, Any]) -> dict[str, Step]:
    on = known(cls, weight_decay=0.01, l1=L1, l2=L2)
    settings = {
        "nothing on": {},
        "everything on": on,
        "everything on, clip": {**on, "max_grad_norm": problem.max_norm},
    }
    return {
        name: cls(problem.params, lr=LR, backend="cpp", **{**options, **setting}).step
        for name, setting in settings.items()
    }


def ratios(cls: type[FusedRegOptimizer], shapes: list[Shape], seconds: float) -> dict[str, str]:
    problem = Problem.random(shapes)
    name = cls.__name__.removeprefix("FusedReg")
    options = MOMENTUM.get(name, {})
    steps = {
        **torch_steps(cls, problem, options),
        **other_steps(name, problem, options),
        **our_steps(cls, problem, options),
    }
    medians = {name: statistics.median(times) for name, times in time_in_rounds(steps, seconds).items()}
    del steps
    gc.collect()
    torchs = [taken for name, taken in medians.items() if name.startswith("torch")]
    unit = min(torchs) if torchs else medians["nothing on"]
    found = {name: f"{taken / unit:.2f}" for name, taken in medians.items()}
    if torchs:
        best = min((name for name in medians if name.startswith("torch")), key=lambda name: medians[name])
        way = best.removeprefix("torch, ").replace("foreach=False", "for-loop").removesuffix("=True")
        found["torch"] = f"{unit * 1e3:.1f} ms, {way}"
    else:
        found["torch"] = "none"
        found["nothing on"] = f"1 = {unit * 1e3:.1f} ms"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each rule and size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    for size, shapes in SHAPES.items():
        rows = []
        for cls in OPTIMIZERS:
            found = ratios(cls, shapes, arguments.seconds)
            rows.append([cls.__name__.removeprefix("FusedReg"), *(found.get(column, "") for column in COLUMNS)])
            console.print(rows[-1])
        Grid(f"One step, {size}", ["rule", *COLUMNS], rows, "Ratios of medians, in alternation.").show(console)


if __name__ == "__main__":
    main()
