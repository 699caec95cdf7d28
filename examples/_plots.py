"""The examples' plots: one look for all, and a function for each example."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: the examples must run where there is no display

import matplotlib.pyplot as plt
import numpy as np
from _common import CONSOLE, EFFECTS, IN_NOTEBOOK, NOISE, Run, percent
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart for colour-blind eyes.
GREY, ORANGE, BLUE, GREEN, PURPLE, SKY, YELLOW = (
    "#9a9a9a",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)

plt.rcParams.update(
    {
        "font.size": 12,
        "axes.titlesize": 14,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "lines.linewidth": 2.2,
        "savefig.dpi": 130,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Writes the file and says so; in a notebook, shows it too."""
    figure.savefig(path)
    plt.close(figure)
    CONSOLE.print(f"plot: {path}", soft_wrap=True)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(filename=path))


def draw_coefficients(axes: Axes, names: Sequence[str], theirs: np.ndarray, ours: np.ndarray, headroom: float) -> None:
    """Bars for what scikit-learn found, dots for FusedRegAdam's, hollow where they are exactly zero.

    ``headroom`` is the legend's, which would otherwise lie on a bar, as a share of the axis.
    """
    places = np.arange(len(names))
    is_zero = ours == 0
    dots: dict[str, Any] = {"color": BLUE, "markersize": 9, "linestyle": "none", "marker": "o"}
    axes.bar(places, theirs, width=0.72, color="#F0C9A6", label="scikit-learn")
    axes.plot(places[~is_zero], ours[~is_zero], **dots, label="FusedRegAdam")
    if is_zero.any():
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 2}
        axes.plot(places[is_zero], ours[is_zero], **dots, **hollow, label="FusedRegAdam, exactly 0")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, names)
    axes.grid(visible=False, axis="x")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + headroom * (high - low))


def plot_linear_models(problems: Sequence[Any], fits: Sequence[Any], file: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for axes, problem, fit in zip(panels.flat, problems, fits, strict=True):
        # Thirty names do not fit on an axis: those of zero coefficients go.
        many = len(problem.features) > 15
        names = ["" if many and w == 0 else name for name, w in zip(problem.features, fit.theirs, strict=True)]
        draw_coefficients(axes, names, fit.theirs, fit.ours, headroom=0.4)
        if many:
            axes.tick_params(axis="x", labelrotation=40, labelsize=9, length=0)
            plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
        difference = np.abs(fit.ours - fit.theirs).max()
        axes.set_title(f"{problem.name}: agree to {difference:.0e}")
        axes.set_ylabel(f"coefficient ({problem.unit} per std of the feature)", fontsize=10)
        axes.legend(loc="upper right", fontsize=10)
    figure.suptitle("FusedRegAdam ends at scikit-learn's coefficients, zeros included", fontsize=16)
    save(figure, file)


def plot_l1_path(
    strengths: np.ndarray,
    path: np.ndarray,
    theirs: np.ndarray,
    order: Sequence[str],
    rmse: np.ndarray,
    good: int,
    file: Path,
) -> None:
    """``order`` is that of entering; ``rmse`` the error at each strength; ``good`` the strength that was chosen."""
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(10, 8), layout="constrained", sharex=True, height_ratios=(2.2, 1)
    )
    colours = dict(zip(EFFECTS, (BLUE, GREEN, PURPLE, ORANGE, SKY, GREY, YELLOW), strict=True))
    for name in order:
        i = list(EFFECTS).index(name)
        useless = " (useless)" if EFFECTS[name] == 0 else ""
        upper.plot(strengths, path[:, i], color=colours[name], label=f"{name}{useless}")
        upper.plot(strengths[::3], theirs[::3, i], "o", color=colours[name], markersize=5, markerfacecolor="white")
    upper.plot([], [], "o", color="black", markersize=5, markerfacecolor="white", label="lasso_path")
    useless_last = all(EFFECTS[name] == 0 for name in order[-2:])
    upper.set(
        title="The L1 path: useless features enter last" if useless_last else "The L1 path",
        ylabel="coefficient (points per std of the feature)",
        xscale="log",
    )
    upper.legend(title="in order of entering", loc="center left", bbox_to_anchor=(1.0, 0.5))
    lower.plot(strengths, rmse, color="black")
    for i, colour, text, above, side in (
        (int(rmse.argmin()), BLUE, "best", 10, "right"),
        (good, ORANGE, "within one standard error", 28, "left"),
    ):
        lower.plot(strengths[i], rmse[i], "o", color=colour, markersize=9)
        text = f"{text}: {int((path[i] != 0).sum())} of {len(order)} features"
        place = {"xytext": (0, above), "textcoords": "offset points", "ha": side}
        lower.annotate(text, (strengths[i], rmse[i]), color=colour, **place)
    lower.axhline(NOISE, color=GREY, linestyle="--", linewidth=1.5)
    lower.annotate("the noise in the ratings", (strengths[0], NOISE), xytext=(0, -16), textcoords="offset points")
    lower.set(
        title="Error on films not trained on",
        xlabel="strength l1, falling: each starts at the weights of the one before",
        ylabel="RMSE (points)",
        xlim=(strengths[0] * 1.1, strengths[-1] * 0.95),
        ylim=(0.8 * min(NOISE, rmse.min()), None),
    )
    save(figure, file)


def plot_overfitting(recipes: Sequence[Any], runs: Sequence[Run], zeros: Mapping[str, float], file: Path) -> None:
    """``zeros`` has the share of exact zeros for those recipes that aim at some."""
    figure, panels = plt.subplots(2, 5, figsize=(17, 7), layout="constrained", sharex=True, sharey=True)
    for axes, recipe, run in zip(panels.flat, recipes, runs, strict=True):
        axes.plot(run.train_loss, color=ORANGE, label="200 training images")
        axes.plot(run.test_loss, color=BLUE, label="test images")
        note = f"test {percent(run.accuracy[run.stop])} correct"
        if recipe.name in zeros:
            note += f"\n{percent(zeros[recipe.name], 0)} exact zeros"
        if recipe.stops_early:
            axes.axvline(run.stop, color="black", linestyle=":", linewidth=1.5)
            note += f"\nstops at epoch {run.stop}"
        axes.annotate(note, (0.97, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=11)
        axes.axhline(math.log(10), color=GREY, linestyle="--", linewidth=1)
        axes.set_title(recipe.name, fontsize=13)
        axes.set(ylim=(0, 3.4))
    for axes in panels[-1]:
        axes.set_xlabel("epochs")
    for axes in panels[:, 0]:
        axes.set_ylabel("cross-entropy (nats)")
    panels[0, 0].annotate("guessing", (len(runs[0].test_loss) - 1, 2.32), ha="right", va="bottom", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("A net that learns wrong labels by heart, and what keeps it from that", fontsize=16)
    save(figure, file)


def plot_softmax_sparsity(
    norm_1: Mapping[float, tuple[Any, Any]],
    norm_2: Mapping[float, tuple[float, float, float | None]],
    empties_at: float,
    file: Path,
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    fractions = np.logspace(-6, 0, 200)
    for (c, (loop, fused)), line in zip(norm_1.items(), (":", "--", "-"), strict=True):
        for fit, colour, name in ((loop, ORANGE, "norm(W, 1) in the loss"), (fused, BLUE, "FusedRegAdam, l1=c")):
            shares = [100 * fit.share_below(fraction) for fraction in fractions]
            left.plot(fractions, shares, color=colour, linestyle=line, label=f"{name}, c = {c:g}")
    left.set(
        title="p = 1: true zeros need no threshold",
        xlabel="threshold, as a fraction of the largest weight",
        ylabel="weights that count as zero (%)",
        xscale="log",
        ylim=(-2, 102),
    )
    left.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, 0.62))
    strengths = list(norm_2)
    grouped, plain, matched = zip(*norm_2.values(), strict=True)
    right.plot(strengths, grouped, "o-", color=ORANGE, label="c * norm(W, 2) in the loss")
    right.plot(strengths, plain, "s-", color=BLUE, label="FusedRegAdam, l2=c")
    same = [(c, size) for c, size in zip(strengths, matched, strict=True) if size is not None]
    crosses: dict[str, Any] = {"color": "black", "markersize": 10, "markeredgewidth": 2, "zorder": 3}
    right.plot(*zip(*same, strict=True), "x", **crosses, label="FusedRegAdam, l2 = c / norm(W, 2)")
    right.axvline(empties_at, ymax=0.75, color="black", linewidth=1, linestyle=":")
    right.annotate(
        "the group penalty\nempties W here", (empties_at, 3), xytext=(-8, 0), textcoords="offset points", ha="right"
    )
    right.set(
        title="p = 2: a norm is not L2",
        xlabel="c",
        ylabel="norm(W, 2) of the trained weights",
        ylim=(0, None),
    )
    right.legend(fontsize=10)
    save(figure, file)


def plot_tutorial(runs: Mapping[tuple[str, str], Mapping[str, Any]], strength: float, file: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True)
    styles = {"in the loss": (GREY, "-", 6.0), "subgradient": (ORANGE, "-", 2.2), "proximal": (BLUE, (0, (2, 2)), 2.2)}
    formulas = {"l1": r"$\lambda \sum |w|$", "l2": r"$\lambda \sum w^2$"}
    for axes, ((data, kind), ways) in zip(panels.flat, runs.items(), strict=True):
        for way, run in ways.items():
            colour, line, width = styles[way]
            label = f"{way}: {percent(run.zeros, 0)} exact zeros"
            axes.plot(run.objective, color=colour, linestyle=line, linewidth=width, label=label)
        axes.set_title(f"{data}, loss + {formulas[kind]}")
        axes.legend(title="trained with")
    for axes in panels[-1]:
        axes.set_xlabel("epochs")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss + penalty (nats)")
    figure.suptitle(
        rf"One objective, three ways to it, the same curves: only proximal L1 has zeros ($\lambda$ = {strength:g})",
        fontsize=15,
    )
    save(figure, file)


def plot_weight_decay(
    problem: Any, paths: Mapping[float, Mapping[str, np.ndarray]], strength: float, file: Path
) -> None:
    """The paths of one strength, and where those of every strength end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.5, 5.6), layout="constrained")
    colours = {"coupled": ORANGE, "proximal": BLUE, "decoupled": GREEN}
    draw_contours(left, lambda w: np.square(problem.y - w @ problem.x.T).mean(axis=-1) / 2, problem.in_box(1e-6))
    for way, points in paths[strength].items():
        line = (0, (3, 2)) if way == "proximal" else "-"
        left.plot(*points.T, color=colours[way], linestyle=line, label=way)
        left.plot(*points[-1], "o", color=colours[way], markersize=8, zorder=4)
    marks = ((problem.ridge(strength), "Ridge", (-8, 12)), (problem.in_box(strength), "least squares", (-60, -24)))
    for point, name, offset in marks:
        left.plot(*point, "+", color="black", markersize=16, markeredgewidth=1.5, zorder=5)
        left.annotate(name, point, xytext=offset, textcoords="offset points")
    left.set(
        title=f"$\\lambda$ = {strength:g}: three paths, two places to end",
        xlabel="weight of bmi",
        ylabel="weight of s5 (feature scaled by 5)",
    )
    left.legend(title="decay", loc="upper right")

    sweep = list(paths)
    between = np.logspace(np.log10(sweep[0]), np.log10(sweep[-1]), 200)
    right.plot(between, [problem.ridge(s)[0] for s in between], color=GREY, label="Ridge")
    boxed = [problem.in_box(s)[0] for s in between]
    right.plot(between, boxed, "--", color=GREY, label=r"least squares, $|w| \leq 1/\lambda$")
    for way, marker, size in (("coupled", "o", 11), ("proximal", "x", 8), ("decoupled", "s", 7)):
        ends = [ways[way][-1][0] for ways in paths.values()]
        right.plot(sweep, ends, marker, color=colours[way], markersize=size, markeredgewidth=2, label=way)
    right.set(
        title=r"The same $\lambda$ is not the same strength",
        xlabel=r"$\lambda$",
        ylabel="weight of bmi after training",
        xscale="log",
        ylim=(0, None),
    )
    right.legend()
    save(figure, file)


def draw_contours(axes: Axes, loss: Callable[[np.ndarray], np.ndarray], minimiser: np.ndarray) -> None:
    w1, w2 = np.meshgrid(np.linspace(-0.15, 0.5, 150), np.linspace(-0.05, 0.34, 150))
    levels = loss(minimiser) + np.array([0.002, 0.01, 0.03, 0.08, 0.2, 0.5, 1.0])
    axes.contour(w1, w2, loss(np.stack([w1, w2], axis=-1)), levels=levels, colors="#cccccc", linewidths=1)
