"""Where the weights are that each way leaves: on inputs that say something, or on others."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .problems import PROBLEMS
from .runner import SEEDS
from .ways import WAYS, Run

RESULTS = Path(__file__).parent / "survivors.json"
CASES = (("digits", 0.9), ("digits", 0.98), ("wide", 0.9), ("wide", 0.98))
SHOWN = ("metric", "magnitude", "lamp", "l1")
PIXELS = 64


class Survivors(NamedTuple):
    """Numbers of weights that are not zero."""

    on_pixels: int
    on_blank_pixels: int
    """which are 0 in 98 of 100 images, or more"""
    on_noise: int
    into_unread_units: int
    in_last_layer: int


@torch.no_grad()
def count(model: nn.Sequential, x: torch.Tensor) -> Survivors:
    first, last = (param != 0 for param in model.parameters() if param.ndim == 2)
    is_blank = (x[:, :PIXELS] != 0).double().mean(dim=0) < 0.02
    is_read = last.any(dim=0)
    return Survivors(
        int(first[:, :PIXELS][:, ~is_blank].sum()),
        int(first[:, :PIXELS][:, is_blank].sum()),
        int(first[:, PIXELS:].sum()),
        int(first[~is_read].sum()),
        int(last.sum()),
    )


def run_all(path: Path = RESULTS, seeds: int = SEEDS) -> None:
    """Writes ``path``, where it is not there yet."""
    if path.exists():
        return
    rows = []
    for problem, share in CASES:
        for way in SHOWN:
            runs = [Run(PROBLEMS[problem], "Adam", seed, share) for seed in range(seeds)]
            counts = [count(WAYS[way].make(run), run.problem.data.train_x) for run in runs]
            rows.append((problem, share, way, [list(each) for each in counts]))
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def table(path: Path = RESULTS) -> str:
    lines = [
        "| problem, zeros | way | on pixels | on blank pixels | on noise | into unread units | last layer |",
        "| --- | --- |" + 5 * " ---: |",
    ]
    for problem, share, way, counts in json.loads(path.read_text()):
        medians = [statistics.median(column) for column in zip(*counts, strict=True)]
        if problem == "digits":
            medians[2] = ""
        lines.append(f"| {problem}, {share:.0%} | {WAYS[way].title} | {' | '.join(map(str, medians))} |")
    return "\n".join(lines).replace("%", " %")
