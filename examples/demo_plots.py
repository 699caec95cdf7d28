"""The plots of demo.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np
from _plots import BLUE, GREEN, GREY, ORANGE, draw_coefficients, save
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


def accuracy_against_size(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """For each way, (numbers stored, accuracy in %), the first way being the dense net."""
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    looks = ((GREY, "D"), (GREEN, "o"), (BLUE, "s"), (ORANGE, "^"))
    dense = next(iter(points.values()))[0]
    axes.axhspan(dense[1] - 0.5, dense[1], color="#eef6f2", zorder=0)
    axes.annotate("within half a point of dense", (dense[0], dense[1] - 0.48), ha="right", va="bottom", fontsize=10)
    for (way, places), (colour, marker) in zip(points.items(), looks, strict=True):
        sizes, accuracies = zip(*sorted(places), strict=True)
        axes.plot(sizes, accuracies, marker=marker, markersize=9, color=colour, label=way)
    axes.set(
        title="Smaller at the same accuracy",
        xlabel="weights and biases that are stored",
        ylabel="correct (% of test images)",
        xscale="log",
    )
    axes.legend(loc="lower right")
    save(figure, path)


def before_and_after(trained: Sequence[np.ndarray], cut: Sequence[np.ndarray], path: Path) -> None:
    """Weight matrices as pictures, on one scale: what is zero is white, and what was cut out is not there."""
    widths = [matrix.shape[1] for matrix in trained]
    heights = [max(matrix.shape[0] for matrix in trained)] * 2
    figure, panels = plt.subplots(
        2,
        len(trained),
        figsize=(12.5, 9),
        layout="constrained",
        width_ratios=[width + 40 for width in widths],
        height_ratios=heights,
    )
    limit = float(np.quantile(np.abs(np.concatenate([matrix.ravel() for matrix in cut])), 0.98))
    for row, (matrices, name) in enumerate(((trained, "trained"), (cut, "compacted"))):
        for axes, matrix, whole in zip(panels[row], matrices, trained, strict=True):
            rows, columns = whole.shape
            axes.imshow(
                matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest",
                extent=(0, matrix.shape[1], matrix.shape[0], 0), aspect="equal",
            )  # fmt: skip
            axes.set(xlim=(-2, columns + 2), ylim=(heights[0] + 2, -2), xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.add_patch(plt.Rectangle((0, 0), columns, rows, fill=False, color="#cccccc", linewidth=0.8))
            zeros = 100 * float((matrix == 0).mean())
            axes.set_title(f"{matrix.shape[0]} x {matrix.shape[1]}: {zeros:.0f} % zeros", fontsize=12)
        panels[row, 0].set_ylabel(name, fontsize=14)
    figure.suptitle("The same function: rows of zeros, and what nothing reads, are cut out", fontsize=16)
    save(figure, path)
