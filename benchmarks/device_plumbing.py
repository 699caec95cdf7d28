"""Where the host's microseconds of a step of backend "triton" go, without a GPU: launches and copies are stubs.

    python benchmarks/device_plumbing.py

One thread, step after step. A real launch, a real copy and an event behind it take a few microseconds each, beside what
is here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from cases import Problem
from measure import stamp
from peers import OURS, RULES, our_optimizer
from plumbing import CASES, medians
from report import Grid
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "tests/backends"))

from unlaunched import Driver, UnlaunchedTritonBackend

from fusedreg import backends
from fusedreg.backends import device_plan
from fusedreg.backends.triton import compilation, tuning


def pretend_a_device() -> None:
    """What costs a copy's or a launch's time there costs next to nothing here; all that is Python is as it is there."""
    triton.runtime.driver._active = driver = Driver(module=object())
    driver.launcher_cls = lambda source, metadata: lambda *args: None  # type: ignore[method-assign]
    backends.BACKENDS["triton"] = UnlaunchedTritonBackend()
    tuning.INTERPRETED = tuning.DEFAULT  # there is no search
    device_plan.is_gpu = lambda device: True
    device_plan.pinned = lambda numel: torch.empty(numel, dtype=torch.int64)
    device_plan.upload = lambda numbers, device: numbers.clone()
    device_plan.new_event = lambda: SimpleNamespace(record=lambda: None, query=lambda: True)
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False


def by_tritons_jit(launcher: compilation.Launcher, programs: int, arguments: tuple[Any, ...], stream: int) -> None:
    """A launch as Triton has it."""
    launcher.kernel[(programs,)](*arguments, **launcher.constants, **launcher._options)


def row(name: str, options: str) -> list[str]:
    rule, problem = RULES["AdamW"], Problem.random(CASES[name])
    optimizer = our_optimizer(rule, problem.params, problem.max_norm, "triton", **OURS[options])
    for _ in range(2):
        optimizer.step()
    assert optimizer._plans is not None
    (plan,) = optimizer._plans.plans
    tables: Any = plan._made_by  # type: ignore[attr-defined]
    parts: dict[str, Callable[[], object]] = {
        "whole": optimizer.step,
        "check": plan.refresh,
        "tables": tables.tables,
        "states": lambda: (tables.move_scalar_states(), tables.finish_update()),
    }
    found = medians(parts, lambda: None)
    launch = compilation.Launcher.__call__
    compilation.Launcher.__call__ = by_tritons_jit  # type: ignore[method-assign]
    found |= medians({"jit": optimizer.step}, lambda: None)
    compilation.Launcher.__call__ = launch  # type: ignore[method-assign]
    rest = found["whole"] - found["check"] - found["tables"] - found["states"]
    numbers = (found["whole"], found["check"], found["tables"], found["states"], rest, found["jit"])
    return [f"{number:.1f}" for number in numbers]


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(stamp("cpu"))
    pretend_a_device()
    rows = [
        [f"{name}{', clip' if 'clip' in options else ''}", *row(name, options)]
        for name in CASES
        for options in ("decay, l1, l2", "decay, l1, l2, clip")
    ]
    headers = ["microseconds", "whole", "of it: plan's check", "tables", "scalar states, versions", "the rest"]
    Grid("One AdamW step of the Triton backend, on the host", [*headers, "by Triton's JIT"], rows).show(console)


if __name__ == "__main__":
    main()
