"""The plots of demo.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np
from _plots import BLUE, GREY, ORANGE, draw_coefficients, save
from matplotlib.axes import Axes

# The dashes let a curve below them show.
STYLES: dict[str, tuple[str, str]] = {
    "plain Adam": (GREY, "-"),
    "L1 in the loss": (ORANGE, "--"),
    "FusedRegAdam": (BLUE, "-"),
}


class Curves(Protocol):
    """What the plots read of a training run: one value an epoch."""

    steps: list[int]
    train_loss: list[float]
    test_accuracy: list[float]
    zeros: list[float]


def draw(axes: Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    colour, line = STYLES[name]
    axes.plot(x, y, color=colour, linestyle=line, label=name, zorder=3 if line == "--" else 2)


def training_curves(histories: Mapping[str, Curves], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, history in histories.items():
        draw(left, name, history.steps, history.train_loss)
        draw(right, name, history.steps, history.test_accuracy)
    left.set(
        title="Training loss",
        xlabel="optimizer steps",
        ylabel="cross-entropy, without the penalty (nats)",
        yscale="log",
    )
    # The first epochs' climb would squeeze the differences that matter into a hair's breadth.
    right.set(title="Test accuracy", xlabel="optimizer steps", ylabel="correct (% of test images)", ylim=(90, 100))
    left.legend(title="trained with")
    right.legend(title="trained with", loc="lower right")
    save(figure, path)


def exact_zeros(histories: Mapping[str, Curves], l1: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for name, history in histories.items():
        draw(axes, name, history.steps, history.zeros)
    sparsest = max(histories, key=lambda name: histories[name].zeros[-1])
    axes.set(
        title=f"{sparsest} ends with {histories[sparsest].zeros[-1]:.0f} % exact zeros (digits, lambda = {l1:g})",
        xlabel="optimizer steps",
        ylabel="exact zeros (% of weights)",
        ylim=(-2, 100),
    )
    axes.legend(title="trained with", loc="upper left")
    save(figure, path)


def weight_histogram(weights: Mapping[str, np.ndarray], l1: float, path: Path) -> None:
    figure, panels = plt.subplots(
        len(weights), 1, figsize=(9, 2.7 * len(weights)), sharex=True, sharey=True, layout="constrained"
    )
    limit = max(0.1, max(float(np.quantile(np.abs(values), 0.999)) for values in weights.values()))
    # An even number of edges centres one bin on zero.
    edges = np.linspace(-limit, limit, 122)
    width = edges[1] - edges[0]
    for axes, (name, values) in zip(np.atleast_1d(panels), weights.items(), strict=True):
        colour, _ = STYLES[name]
        zeros = int((values == 0).sum())
        counts, _ = np.histogram(values[values != 0], bins=edges)
        # The exact zeros stand at the bottom of the middle bin, so that small nonzero weights show above them.
        bottoms = np.zeros_like(counts)
        bottoms[len(counts) // 2] = zeros
        axes.bar(edges[:-1], counts, bottom=bottoms, width=width, align="edge", color=colour)
        axes.bar(0, zeros, width=width, color="black")
        text = f"{zeros:,} of {values.size:,} weights are exactly 0"
        axes.annotate(
            text,
            xy=(0.02, 0.97),
            xycoords="axes fraction",
            va="top",
            fontweight="bold" if zeros else "normal",
            backgroundcolor="white",
        )
        axes.set(title=name, ylabel="weights per bin", yscale="log", ylim=(0.7, 10 ** np.ceil(np.log10(values.size))))
    axes.set(xlabel="value of the weight", xlim=(-limit, limit))
    figure.suptitle(f"Trained weights, digits, lambda = {l1:g} (bins {width:.3f} wide, exact zeros black)", fontsize=14)
    save(figure, path)


def lasso_comparison(
    features: Sequence[str],
    theirs: np.ndarray,
    ours: np.ndarray,
    distances: Mapping[str, Sequence[float]],
    every: int,
    alpha: float,
    path: Path,
) -> None:
    """The coefficients; then their distance from scikit-learn's, with a point for ``every`` so many steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained", width_ratios=(1.15, 1))
    draw_coefficients(left, features, theirs, ours, headroom=0.35)
    left.set(
        title=f"Coefficients, diabetes data, alpha = l1 = {alpha:g}",
        xlabel="feature (standardised)",
        ylabel="coefficient (units of the target per std)",
    )
    left.legend(loc="upper right")
    for name, values in distances.items():
        draw(right, name, range(0, len(values), every), values[::every])
    right.set(
        title="Distance from Lasso's solution",
        xlabel="full-batch steps (fp64, cosine learning rate)",
        ylabel="largest absolute difference",
        yscale="log",
    )
    right.legend(title="fitted with", loc="center right")
    save(figure, path)
