"""Digits by lambda: what the prox ends with beside the penalty in the loss, and beside "decoupled".

"Objective" is the training loss plus lambda times the sum of the absolute weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .problems import PROBLEMS, Problem
from .runner import SEEDS
from .ways import Run, magnitude, measure, weights_of, zero_smallest

RESULTS = Path(__file__).parent / "strengths.json"
DIGITS = PROBLEMS["digits"]
NO_NOISE = dataclasses.replace(DIGITS, batch_size=1347, epochs=1300)
"""The whole training set in each step, about as many steps."""
L1 = (1e-4, 3e-4, 1e-3, 3e-3)
RISE = 0.6  # the share of the steps over which a rising lambda rises
# "decoupled" is scale-free: its lambda is measured against Adam's normalised step, so it has lambdas of its own.
DECOUPLED_L1 = (0.03, 0.1, 0.3)

DENSE = "no penalty"
PROXIMAL = "`l1`, proximal"
RISING = "`l1`, proximal, lambda rising"
PENALTY = "penalty in the loss"
PENALTY_PRUNED = "penalty in the loss, then pruned"
DECOUPLED = '`l1`, `penalty_mode="decoupled"`'


class Result(NamedTuple):
    zeros: float
    """share of exact zeros in the weight matrices"""
    accuracy: float
    """on the test set"""
    loss: float
    """on the training set, without the penalty"""
    objective: float | None
    """the same with the penalty; None where nothing says what lambda's penalty would be"""


Row = tuple[float, str]  # lambda, way


def weights_in(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.ndim >= 2]


def absolute_sum(model: nn.Module) -> Tensor:
    return torch.stack([weight.abs().sum() for weight in weights_in(model)]).sum()


def proximal(run: Run, l1: float, mode: str = "proximal", rising: bool = False) -> nn.Module:
    model = run.model()
    optimizer = run.optimizer(model, l1=0.0 if rising else l1, penalty_mode=mode)

    def rise(step: int) -> None:
        optimizer.param_groups[0]["l1"] = l1 * min(1.0, step / (RISE * run.steps))

    return run.train(model, optimizer, rise if rising else None)


def in_the_loss(run: Run, l1: float) -> nn.Module:
    model = run.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=run.problem.lr["Adam"])
    return run.train(model, optimizer, penalty=(lambda: l1 * absolute_sum(model)) if l1 else None)


@torch.no_grad()
def result_of(run: Run, model: nn.Module, l1: float | None) -> Result:
    accuracy, zeros = measure(run, model)
    loss = cross_entropy(model(run.problem.data.train_x), run.problem.data.train_y).item()
    return Result(zeros, accuracy, loss, None if l1 is None else loss + l1 * absolute_sum(model).item())


def run_seed(
    problem: Problem, seed: int, strengths: Iterable[float], decoupled: Iterable[float] = DECOUPLED_L1
) -> Iterator[tuple[Row, Result]]:
    """Every way under every lambda; what is pruned is pruned to the zeros that the proximal run of this seed has."""
    run = Run(problem, "Adam", seed, share=0.0)
    yield (0.0, DENSE), result_of(run, in_the_loss(run, 0.0), 0.0)
    for l1 in strengths:
        sparse = result_of(run, proximal(run, l1), l1)
        yield (l1, PROXIMAL), sparse
        yield (l1, RISING), result_of(run, proximal(run, l1, rising=True), l1)
        model = in_the_loss(run, l1)
        yield (l1, PENALTY), result_of(run, model, l1)
        optimizer = run.optimizer(model)
        zero_smallest(weights_of(optimizer), magnitude(run, model, optimizer), sparse.zeros)
        yield (l1, PENALTY_PRUNED), result_of(run, model, l1)
        yield (l1, DECOUPLED), result_of(run, proximal(run, l1, "decoupled"), None)
    for l1 in decoupled:
        yield (l1, DECOUPLED), result_of(run, proximal(run, l1, "decoupled"), None)


def markdown(results: dict[Row, list[Result]]) -> str:
    lines = [
        "| lambda | way | exact zeros | test accuracy | worst to best seed | training loss | objective |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (l1, way), runs in results.items():
        zeros, accuracy, loss = (statistics.median(run[i] for run in runs) for i in range(3))
        worst, best = min(run.accuracy for run in runs), max(run.accuracy for run in runs)
        objectives = [math.nan if run.objective is None else run.objective for run in runs]
        objective = statistics.median(objectives)
        penalised = "" if math.isnan(objective) else f"{objective:.4f}"
        lines.append(
            f"| {l1:g} | {way} | {zeros:.1%} | {accuracy:.1%} | {worst:.1%} to {best:.1%} | {loss:.4f} | {penalised} |"
        )
    return "\n".join(lines).replace("%", " %")


def tables(path: Path = RESULTS) -> dict[str, str]:
    read = json.loads(path.read_text())
    return {
        name: markdown({(l1, way): [Result(*run) for run in runs] for l1, way, runs in rows})
        for name, rows in read.items()
    }


def run_all(path: Path = RESULTS, seeds: int = SEEDS) -> None:
    """Writes ``path``, where it is not there yet."""
    if path.exists():
        return
    cases = {
        "strengths": (DIGITS, L1, DECOUPLED_L1),
        "strengths-without-noise": (NO_NOISE, (1e-3,), (0.3,)),
    }
    written: dict[str, list[tuple[float, str, list[Result]]]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(
            "training", total=seeds * sum(1 + 5 * len(l1) + len(own) for _, l1, own in cases.values())
        )
        for name, (problem, l1, own) in cases.items():
            results: dict[Row, list[Result]] = {}
            for seed in range(seeds):
                for row, result in run_seed(problem, seed, l1, own):
                    results.setdefault(row, []).append(result)
                    progress.advance(task)
            written[name] = [(*row, runs) for row, runs in results.items()]
    lines = {name: ",\n".join(f"    {json.dumps(row)}" for row in rows) for name, rows in written.items()}
    path.write_text("{\n" + ",\n".join(f'  "{name}": [\n{rows}\n  ]' for name, rows in lines.items()) + "\n}\n")
