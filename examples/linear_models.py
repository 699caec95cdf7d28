# %% [markdown]
"""Lasso, Ridge, ElasticNet and sparse logistic regression by FusedRegAdam, beside scikit-learn.

The strengths are scikit-learn's, translated. ``Lasso(alpha)`` minimises ``1 / (2n) * |y - Xw|^2 + alpha * sum |w|``, so
``l1=alpha`` on half the mean square. ``Ridge`` does not divide by n: its alpha is ``n * l2``. ``ElasticNet`` splits one
alpha by its ``l1_ratio``. ``LogisticRegression`` adds up the losses and weighs them by C, so ``C = 1 / (n * l1)``.

That both end at the same coefficients, with the same zeros, is asserted. scikit-learn's solvers know that the model is
linear, and its least squares take milliseconds: use them for linear models. FusedRegAdam takes the same strengths to
models that they do not know.

Run it with ``python examples/linear_models.py``.
"""

# %%
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import (
    draw_coefficients,
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
from rich.progress import Progress
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import CosineAnnealingLR

from fusedreg import FusedRegAdam

# %% [markdown]
# ## The four models
# Each is a loss, two strengths, and the scikit-learn model that minimises the same objective.

# %%


@dataclass
class Problem:
    name: str
    x: np.ndarray
    y: np.ndarray
    features: list[str]
    loss: Callable[[Tensor, Tensor], Tensor]
    l1: float
    l2: float
    model: Any
    """scikit-learn's"""
    lr: float
    units: str


def half_mean_square(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction - y).square().mean() / 2


def make_problems() -> list[Problem]:
    diabetes, cancer = load_diabetes(), load_breast_cancer()
    x, y = standardise(diabetes.data), diabetes.target - diabetes.target.mean()
    n = len(y)
    exact = {"fit_intercept": False, "tol": 1e-14, "max_iter": 1_000_000}
    regressions = [
        ("Lasso", 3.0, 0.0, Lasso(alpha=3.0, **exact)),
        ("Ridge", 0.0, 0.25, Ridge(alpha=0.25 * n, fit_intercept=False)),
        ("ElasticNet", 3.0, 1 / 3, ElasticNet(alpha=3.0 + 1 / 3, l1_ratio=0.9, **exact)),
    ]
    units = "target per std of the feature"
    problems = [
        Problem(name, x, y, diabetes.feature_names, half_mean_square, l1, l2, model, lr=1.0, units=units)
        for name, l1, l2, model in regressions
    ]
    x, y, l1 = standardise(cancer.data), cancer.target.astype(float), 0.05
    logistic = LogisticRegression(
        C=1 / (len(y) * l1), l1_ratio=1.0, solver="saga", fit_intercept=False, tol=1e-10, max_iter=100_000
    )
    problems.append(
        Problem(
            "L1 logistic regression",
            x,
            y,
            list(cancer.feature_names),
            binary_cross_entropy_with_logits,
            l1,
            0.0,
            logistic,
            lr=0.5,
            units="log-odds per std of the feature",
        )
    )
    return problems


# %% [markdown]
# ## Full-batch FusedRegAdam
# The learning rate falls to zero as a cosine: Adam's steps have about the size of its lr, whatever the gradient, and so
# come to rest only where the lr does. Float64, because we want to see ten digits agree.

# %%


@dataclass
class Fit:
    ours: np.ndarray
    theirs: np.ndarray
    seconds: float
    their_seconds: float


def fit(problem: Problem, steps: int, on_step: Callable[[], None] = lambda: None) -> Fit:
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    start = time.perf_counter()
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    optimizer = FusedRegAdam([w], lr=problem.lr, l1=problem.l1, l2=problem.l2)
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(x @ w, y).backward()
        optimizer.step()
        schedule.step()
        on_step()
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = problem.model.fit(problem.x, problem.y).coef_.ravel()
    return Fit(w.detach().numpy(), theirs, seconds, time.perf_counter() - start)


def assert_same(problem: Problem, result: Fit) -> float:
    """Raises AssertionError unless coefficients and zeros agree; the largest difference."""
    difference = float(np.abs(result.ours - result.theirs).max())
    assert difference < 1e-6, f"{problem.name}: the coefficients differ by up to {difference:.1e}"
    assert ((result.ours == 0) == (result.theirs == 0)).all(), f"{problem.name}: the zeros differ"
    return difference


def fit_all(problems: list[Problem], steps: int, progress: Progress) -> list[Fit]:
    fits = []
    for problem in problems:
        task = progress.add_task(problem.name, total=steps)
        fits.append(fit(problem, steps, partial(progress.advance, task)))
    return fits


# %%


def plot(problems: list[Problem], fits: list[Fit], path: Path) -> Path:
    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for axes, problem, result in zip(panels.flat, problems, fits, strict=True):
        # Thirty names do not fit on an axis: those of zero coefficients go.
        many = len(problem.features) > 15
        names = ["" if many and w == 0 else name for name, w in zip(problem.features, result.theirs, strict=True)]
        draw_coefficients(axes, names, result.theirs, result.ours, "FusedRegAdam")
        if many:
            axes.tick_params(axis="x", labelrotation=40, labelsize=9, length=0)
            plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
        difference = np.abs(result.ours - result.theirs).max()
        axes.set(title=f"{problem.name}: agree to {difference:.0e}", ylabel=f"coefficient ({problem.units})")
        axes.title.set_fontsize(13)
        axes.yaxis.label.set_fontsize(10)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.4 * (high - low))  # headroom for the legend
        axes.legend(loc="upper right", fontsize=10)
    figure.suptitle("FusedRegAdam ends at scikit-learn's coefficients, zeros included", fontsize=16)
    return save(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=3000, help="of each fit (default: %(default)s)")
    return parse(parser)


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    problems = make_problems()
    with progress_bar(console) as progress:
        fits = fit_all(problems, arguments.steps, progress)
    table = make_table(
        f"{arguments.steps} full-batch steps of FusedRegAdam, fp64, beside scikit-learn",
        ["model", "features", "zeros", "agree to", "seconds", "scikit-learn's"],
    )
    for problem, result in zip(problems, fits, strict=True):
        difference = assert_same(problem, result)
        table.add_row(
            problem.name,
            str(len(result.ours)),
            str(int((result.ours == 0).sum())),
            f"{difference:.0e}",
            f"{result.seconds:.2f}",
            f"{result.their_seconds:.3f}",
        )
    console.print(table)
    print_plots(console, [plot(problems, fits, arguments.output / "linear-models.png")])


if __name__ == "__main__":
    main()
