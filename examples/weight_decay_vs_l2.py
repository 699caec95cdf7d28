"""Adam with coupled decay, decoupled decay and proximal L2, on one problem: three paths, and two places to end.

The problem is least squares on two features of the diabetes data, of different scales. lambda is the same three times:

* *coupled*, ``FusedRegAdam(weight_decay=lambda)``, as in torch.optim.Adam: ``lambda * w`` is added to the gradient. It
  passes through the moments and is divided by ``d = sqrt(v_hat) + eps`` like the rest.
* *proximal*, ``FusedRegAdam(l2=lambda)``: Adam's step on the loss alone, then a division by ``1 + lr / d * lambda``.
* *decoupled*, ``FusedRegAdamW(weight_decay=lambda)``, as in torch.optim.AdamW: the weight shrinks by
  ``lr * lambda * w``, undivided.

Coupled and proximal are at rest where ``gradient + lambda * w = 0``: at Ridge's solution, which they reach by different
paths. Decoupled is not at rest there. Its pull has no ``1 / d``, and Adam's step is about ``lr`` long whichever way the
gradient points. While ``|w| < 1 / lambda`` the step wins, until the gradient is gone: full batch and with a falling
lr, AdamW tends to *least squares within the box* ``|w| <= 1 / lambda`` (Xie and Li, "Implicit Bias of AdamW",
https://arxiv.org/abs/2404.04454), whatever the scale of the loss. With minibatches d stays at the size of the
gradient's noise, and it ends where about ``gradient + lambda * d * w = 0``: an L2 that is stronger where the gradient
is noisier.

Run it with ``python examples/weight_decay_vs_l2.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    example_parser,
    make_console,
    make_table,
    parse,
    positive_int,
    print_plots,
    progress_bar,
    save,
    standardise,
)
from scipy.optimize import lsq_linear
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fusedreg import FusedRegAdam, FusedRegAdamW

LR = 0.01
START = (-0.1, 0.3)
LAMBDA = 1.0
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FEATURES = {"bmi": 1.0, "s5": 5.0}  # and their scale: the second is in units a fifth as large
COUPLED, PROXIMAL, DECOUPLED = "coupled", "proximal", "decoupled"
WAYS = (COUPLED, PROXIMAL, DECOUPLED)
COLOURS = {COUPLED: ORANGE, PROXIMAL: BLUE, DECOUPLED: GREEN}


@dataclass
class LeastSquares:
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def load(cls) -> LeastSquares:
        data = load_diabetes()
        columns = [data.feature_names.index(name) for name in FEATURES]
        return cls(standardise(data.data[:, columns]) * list(FEATURES.values()), standardise(data.target))

    def ridge(self, strength: float) -> np.ndarray:
        """The minimiser of ``1 / (2n) * |y - Xw|^2 + strength / 2 * |w|^2``."""
        return Ridge(alpha=strength * len(self.y), fit_intercept=False).fit(self.x, self.y).coef_

    def in_box(self, strength: float) -> np.ndarray:
        """The minimiser of the loss alone, among the weights of at most ``1 / strength``."""
        return lsq_linear(self.x, self.y, bounds=(-1 / strength, 1 / strength)).x

    def loss(self, w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
        residual = self.y - np.stack([w1, w2], axis=-1) @ self.x.T
        return np.square(residual).mean(axis=-1) / 2


def make_optimizer(way: str, w: nn.Parameter, strength: float) -> torch.optim.Optimizer:
    if way == COUPLED:
        return FusedRegAdam([w], lr=LR, weight_decay=strength)
    if way == PROXIMAL:
        return FusedRegAdam([w], lr=LR, l2=strength)
    return FusedRegAdamW([w], lr=LR, weight_decay=strength)


def train(
    problem: LeastSquares, way: str, strength: float, steps: int, batch_size: int | None = None, seed: int = 0
) -> np.ndarray:
    """The weights before the first step and after each, one row each; full batch unless told otherwise."""
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    w = nn.Parameter(torch.tensor(START, dtype=x.dtype))
    optimizer = make_optimizer(way, w, strength)
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    order = torch.Generator().manual_seed(seed)
    path = [w.detach().clone()]
    while len(path) <= steps:
        batches = torch.randperm(len(y), generator=order).split(batch_size) if batch_size else [slice(None)]
        for batch in batches[: steps + 1 - len(path)]:
            optimizer.zero_grad()
            ((y[batch] - x[batch] @ w).square().mean() / 2).backward()
            optimizer.step()
            schedule.step()
            path.append(w.detach().clone())
    return torch.stack(path).numpy()


Paths = dict[float, dict[str, np.ndarray]]  # lambda -> way -> path


def train_all(problem: LeastSquares, steps: int, on_run: Callable[[], None] = lambda: None) -> Paths:
    paths: Paths = {}
    for strength in SWEEP:
        paths[strength] = {}
        for way in WAYS:
            paths[strength][way] = train(problem, way, strength, steps)
            on_run()
    return paths


def check(problem: LeastSquares, paths: Paths) -> None:
    """Raises AssertionError unless coupled and proximal end at Ridge's solution, and decoupled elsewhere."""
    for strength, ways in paths.items():
        ridge = problem.ridge(strength)
        for way in (COUPLED, PROXIMAL):
            distance = np.abs(ways[way][-1] - ridge).max()
            assert distance < 1e-6, f"{way}, lambda = {strength:g}: {distance:.1e} from Ridge's solution"
        distance = np.abs(ways[DECOUPLED][-1] - ridge).max()
        assert distance > 0.01, f"decoupled, lambda = {strength:g}: only {distance:.1e} from Ridge's solution"


def plot(problem: LeastSquares, paths: Paths, path: Path) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.5, 5.6), layout="constrained")
    w1, w2 = np.meshgrid(np.linspace(-0.15, 0.5, 150), np.linspace(-0.05, 0.34, 150))
    levels = problem.loss(*problem.in_box(1e-6)) + np.array([0.002, 0.01, 0.03, 0.08, 0.2, 0.5, 1.0])
    left.contour(w1, w2, problem.loss(w1, w2), levels=levels, colors="#cccccc", linewidths=1)
    for way in WAYS:
        points = paths[LAMBDA][way]
        line = (0, (3, 2)) if way == PROXIMAL else "-"
        left.plot(*points.T, color=COLOURS[way], linestyle=line, label=way)
        left.plot(*points[-1], "o", color=COLOURS[way], markersize=8, zorder=4)
    marks = ((problem.ridge(LAMBDA), "Ridge", (-8, 12)), (problem.in_box(LAMBDA), "least squares", (-60, -24)))
    for point, name, offset in marks:
        left.plot(*point, "+", color="black", markersize=16, markeredgewidth=1.5, zorder=5)
        left.annotate(name, point, xytext=offset, textcoords="offset points")
    left.set(
        title=f"$\\lambda$ = {LAMBDA:g}: three paths, two places to end",
        xlabel="weight of bmi",
        ylabel="weight of s5 (feature scaled by 5)",
    )
    left.legend(title="decay", loc="upper right")

    strengths = np.logspace(np.log10(SWEEP[0]), np.log10(SWEEP[-1]), 200)
    boxed = [problem.in_box(s)[0] for s in strengths]
    right.plot(strengths, [problem.ridge(s)[0] for s in strengths], color=GREY, label="Ridge")
    right.plot(strengths, boxed, "--", color=GREY, label=r"least squares, $|w| \leq 1/\lambda$")
    markers = {COUPLED: ("o", 11), PROXIMAL: ("x", 8), DECOUPLED: ("s", 7)}
    for way, (marker, size) in markers.items():
        ends = [paths[strength][way][-1][0] for strength in SWEEP]
        right.plot(SWEEP, ends, marker, color=COLOURS[way], markersize=size, markeredgewidth=2, label=way)
    right.set(
        title=r"The same $\lambda$ is not the same strength",
        xlabel=r"$\lambda$",
        ylabel="weight of bmi after training",
        xscale="log",
        ylim=(0, None),
    )
    right.legend()
    return save(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=1500, help="of each training (default: %(default)s)")
    return parse(parser)


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    problem = LeastSquares.load()
    with progress_bar(console) as progress:
        task = progress.add_task("full batch", total=len(SWEEP) * len(WAYS))
        paths = train_all(problem, arguments.steps, partial(progress.advance, task))
        task = progress.add_task("minibatches", total=len(WAYS))
        noisy = {}
        for way in WAYS:
            noisy[way] = train(problem, way, LAMBDA, arguments.steps, batch_size=32, seed=arguments.seed)[-1]
            progress.advance(task)
    check(problem, paths)

    table = make_table(f"Where each ends, lambda = {LAMBDA:g}", ["", *FEATURES, "off Ridge", "off least squares"])
    ridge, least_squares = problem.ridge(LAMBDA), problem.in_box(LAMBDA)
    rows = {
        "Ridge": ridge,
        f"least squares, |w| <= {1 / LAMBDA:g}": least_squares,
        **{f"{way}, full batch": paths[LAMBDA][way][-1] for way in WAYS},
        **{f"{way}, batches of 32": noisy[way] for way in WAYS},
    }
    for i, (name, w) in enumerate(rows.items()):
        distances = (f"{np.abs(w - point).max():.0e}" if (w != point).any() else "" for point in (ridge, least_squares))
        table.add_row(name, *(f"{value:.4f}" for value in w), *distances, end_section=i in (1, 4))
    console.print(table)
    print_plots(console, [plot(problem, paths, arguments.output / "weight-decay-vs-l2.png")])


if __name__ == "__main__":
    main()
