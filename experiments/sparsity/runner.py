"""What is run, and its results: one row of results.json for each problem, optimizer, way and share, with all seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from .problems import PROBLEMS, UNSEEN
from .ways import DENSE, UNIT_WAYS, WAYS, Run, Way, run_way

RESULTS = Path(__file__).parent / "results.json"
SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    problem: str
    optimizer: str
    shares: tuple[float, ...]
    units: bool = False
    ways: tuple[str, ...] | None = None
    """None: all of them."""

    @property
    def all_ways(self) -> dict[str, Way]:
        ways = UNIT_WAYS if self.units else WAYS
        if self.ways is not None:
            ways = {name: ways[name] for name in self.ways}
        return {name: way for name, way in ways.items() if self.optimizer != "SGD" or not way.adaptive_only}

    @property
    def name(self) -> str:
        return f"{self.problem}-{self.optimizer}{'-units' if self.units else ''}"


SHARES, UNIT_SHARES = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98), (0.5, 0.75, 0.9)
COMPARISONS = (
    *(Comparison(problem, "Adam", SHARES) for problem in ("digits", "wide")),
    Comparison("conv", "Adam", (0.5, 0.8, 0.9, 0.95, 0.98)),
    *(Comparison(problem, "SGD", (0.9, 0.98)) for problem in ("digits", "wide")),
    Comparison("conv", "SGD", (0.9,)),
    # AdamW differs from Adam by its decay of 1 %: fewer problems and ways.
    *(
        Comparison(problem, "AdamW", (0.9, 0.98), ways=("metric", "magnitude", "lamp", "l1"))
        for problem in ("digits", "wide")
    ),
    *(Comparison(problem, "Adam", UNIT_SHARES, units=True) for problem in ("deep", "conv")),
)
SANITY = (
    *(Comparison(name, "Adam", (0.9, 0.97), ways=("metric", "magnitude", "lamp")) for name in UNSEEN),
    *(Comparison(name, "Adam", (0.75,), units=True, ways=("metric", "magnitude", "uniform")) for name in UNSEEN),
)


@dataclass(frozen=True)
class Row:
    problem: str
    optimizer: str
    units: bool
    way: str
    share: float
    accuracies: list[float] = field(compare=False)
    """on the test set, one a seed"""
    zeros: list[float] = field(compare=False)
    """the shares that they ended with"""


def rows_of(comparison: Comparison) -> Iterator[tuple[Row, Way]]:
    def row(way: str, share: float) -> Row:
        return Row(comparison.problem, comparison.optimizer, comparison.units, way, share, [], [])

    yield row("dense", 0.0), DENSE
    for name, way in comparison.all_ways.items():
        for share in comparison.shares:
            yield row(name, share), way


def read(path: Path = RESULTS) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def write(rows: list[Row], path: Path = RESULTS) -> None:
    """One row a line; a run that is cut off leaves the file whole."""
    new = path.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    os.replace(new, path)


def run_all(comparisons: tuple[Comparison, ...], path: Path = RESULTS, seeds: int = SEEDS) -> list[Row]:
    """Runs what ``path`` has no results of yet."""
    problems = PROBLEMS | UNSEEN
    rows = read(path)
    left = [each for comparison in comparisons for each in rows_of(comparison) if each[0] not in rows]
    with Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task("training", total=len(left))
        for row, way in left:
            progress.update(task, description=f"{row.problem} {row.optimizer} {row.way} {row.share:.0%}")
            for seed in range(seeds):
                run = Run(problems[row.problem], row.optimizer, seed, row.share, row.units)
                accuracy, zeros = run_way(way, run)
                row.accuracies.append(round(accuracy, 6))
                row.zeros.append(round(zeros, 6))
            rows.append(row)
            write(rows, path)
            progress.advance(task)
    return rows
