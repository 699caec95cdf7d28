"""Which features does a rating depend on? The L1 path says, and needs no threshold.

A viewer's ratings of 1000 films, made up: they depend on genre, director and cast, not on year and running time. Half
of the films are to learn from. All features are standardised. One ``FusedRegSGD`` walks down the strengths, from one
that leaves no feature to one that leaves almost all. Each strength starts at the weights of the one before: a warm
start is one assignment to the group's ``l1``. What enters earlier explains more of what is not yet explained.

scikit-learn's ``lasso_path`` walks the same strengths by coordinate descent. That the coefficients agree is asserted.

Run it with ``python examples/feature_selection.py``.
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
    PURPLE,
    SKY,
    YELLOW,
    example_parser,
    make_console,
    make_table,
    parse,
    positive_int,
    print_plots,
    progress_bar,
    save,
    show_number,
    standardise,
)
from sklearn.linear_model import lasso_path
from torch import nn

from fusedreg import FusedRegSGD

# What the rating depends on, in points per standard deviation of the feature. The last two are useless.
EFFECTS = {
    "director": 0.8,
    "cast": 0.5,
    "drama": 0.45,
    "horror": -0.35,
    "comedy": 0.3,
    "year": 0.0,
    "running time": 0.0,
}
COLOURS = dict(zip(EFFECTS, (BLUE, GREEN, PURPLE, ORANGE, SKY, GREY, YELLOW), strict=True))
NOISE = 0.8
STRENGTHS = 60
STEPS = 300  # for each strength


@dataclass
class Ratings:
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def make_ratings(seed: int, films: int = 1000) -> Ratings:
    rng = np.random.default_rng(seed)
    genre = rng.choice(4, size=films, p=(0.4, 0.15, 0.3, 0.15))  # drama, horror, comedy, anything else
    director, cast = rng.multivariate_normal((0, 0), ((1, 0.4), (0.4, 1)), size=films).T  # good ones find each other
    year = rng.uniform(1960, 2020, size=films)
    running_time = 105 + 0.3 * (year - 1990) + 8 * (genre == 0) + 10 * rng.standard_normal(films)
    columns = {
        "director": director,
        "cast": cast,
        "drama": genre == 0,
        "horror": genre == 1,
        "comedy": genre == 2,
        "year": year,
        "running time": running_time,
    }
    x = standardise(np.column_stack([columns[name] for name in EFFECTS]).astype(float))
    y = 6.0 + x @ np.array(list(EFFECTS.values())) + NOISE * rng.standard_normal(films)
    half = films // 2
    mean = y[:half].mean()  # instead of an intercept
    train_x = x[:half] - x[:half].mean(axis=0)
    return Ratings(train_x, y[:half] - mean, x[half:] - x[:half].mean(axis=0), y[half:] - mean)


def strongest(data: Ratings) -> float:
    """The smallest l1 that leaves no feature."""
    return float(np.abs(data.train_x.T @ data.train_y).max() / len(data.train_y))


def walk_path(
    data: Ratings, strengths: np.ndarray, steps: int = STEPS, on_strength: Callable[[], None] = lambda: None
) -> np.ndarray:
    """The coefficients at each strength, one row each, of ``1 / (2n) * |y - Xw|^2 + l1 * sum |w|``."""
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    optimizer = FusedRegSGD([w], lr=0.2, momentum=0.8)
    path = []
    for l1 in strengths:
        optimizer.param_groups[0]["l1"] = float(l1)  # all that a warm start takes: the weights are where they were
        for _ in range(steps):
            optimizer.zero_grad()
            ((y - x @ w).square().mean() / 2).backward()
            optimizer.step()
        path.append(w.detach().numpy().copy())
        on_strength()
    return np.array(path)


def scikit_learns(data: Ratings, strengths: np.ndarray) -> np.ndarray:
    _, coefficients, _ = lasso_path(data.train_x, data.train_y, alphas=strengths, tol=1e-14, max_iter=1_000_000)
    return coefficients.T


def entered_at(path: np.ndarray, strengths: np.ndarray) -> dict[str, float]:
    """The strength at which each feature is first nonzero, in the order of entering; 0 if it never is."""
    firsts = {
        name: float(strengths[np.flatnonzero(column)[0]]) if column.any() else 0.0
        for name, column in zip(EFFECTS, path.T, strict=True)
    }
    return dict(sorted(firsts.items(), key=lambda item: -item[1]))


def test_errors(data: Ratings, path: np.ndarray) -> np.ndarray:
    """Root mean square error on the films that were not trained on, at each strength."""
    return np.sqrt(np.square(data.test_y[:, None] - data.test_x @ path.T).mean(axis=0))


test_errors.__test__ = False  # type: ignore[attr-defined]  # pytest takes the name for a test's


def sparsest_good_one(data: Ratings, path: np.ndarray) -> int:
    """The strongest l1 within one standard error of the best: what predicts best keeps too many features."""
    squares = np.square(data.test_y[:, None] - data.test_x @ path.T)
    best = squares.mean(axis=0).argmin()
    standard_error = squares[:, best].std() / np.sqrt(len(squares))
    return int(np.flatnonzero(squares.mean(axis=0) <= squares[:, best].mean() + standard_error)[0])


def plot(data: Ratings, strengths: np.ndarray, path: np.ndarray, theirs: np.ndarray, file: Path) -> Path:
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(10, 8), layout="constrained", sharex=True, height_ratios=(2.2, 1)
    )
    order = list(entered_at(path, strengths))
    for name in order:
        i = list(EFFECTS).index(name)
        useless = " (useless)" if EFFECTS[name] == 0 else ""
        upper.plot(strengths, path[:, i], color=COLOURS[name], label=f"{name}{useless}")
        upper.plot(strengths[::3], theirs[::3, i], "o", color=COLOURS[name], markersize=5, markerfacecolor="white")
    upper.plot([], [], "o", color="black", markersize=5, markerfacecolor="white", label="lasso_path")
    enter_last = {name for name in order[-2:] if EFFECTS[name] == 0}
    upper.set(
        title="The L1 path: useless features enter last" if len(enter_last) == 2 else "The L1 path",
        ylabel="coefficient (points per std of the feature)",
        xscale="log",
    )
    upper.legend(title="in order of entering", loc="center left", bbox_to_anchor=(1.0, 0.5))
    errors = test_errors(data, path)
    lower.plot(strengths, errors, color="black")
    good = sparsest_good_one(data, path)
    for i, colour, text, above, side in (
        (int(errors.argmin()), BLUE, "best", 10, "right"),
        (good, ORANGE, "within one standard error", 28, "left"),
    ):
        lower.plot(strengths[i], errors[i], "o", color=colour, markersize=9)
        text = f"{text}: {int((path[i] != 0).sum())} of {len(EFFECTS)} features"
        place = {"xytext": (0, above), "textcoords": "offset points", "ha": side}
        lower.annotate(text, (strengths[i], errors[i]), color=colour, **place)
    lower.axhline(NOISE, color=GREY, linestyle="--", linewidth=1.5)
    lower.annotate("the noise in the ratings", (strengths[0], NOISE), xytext=(0, -16), textcoords="offset points")
    lower.set(
        title="Error on films not trained on",
        xlabel="strength l1, falling: each starts at the weights of the one before",
        ylabel="RMSE (points)",
        xlim=(strengths[0] * 1.1, strengths[-1] * 0.95),
        ylim=(0.8 * min(NOISE, errors.min()), None),
    )
    return save(figure, file)


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__)
    parser.add_argument("--strengths", type=positive_int, default=STRENGTHS, help="on the path (default: %(default)s)")
    return parse(parser)


def run(
    seed: int, count: int, on_strength: Callable[[], None] = lambda: None
) -> tuple[Ratings, np.ndarray, np.ndarray, np.ndarray]:
    """The data, the strengths, our path and lasso_path's; raises AssertionError where they differ."""
    data = make_ratings(seed)
    strengths = 1.001 * strongest(data) * np.logspace(0, -2.5, count)
    path = walk_path(data, strengths, on_strength=on_strength)
    theirs = scikit_learns(data, strengths)
    difference = np.abs(path - theirs).max()
    assert difference < 1e-8, f"the coefficients differ from lasso_path's by up to {difference:.1e}"
    return data, strengths, path, theirs


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    with progress_bar(console) as progress:
        task = progress.add_task("down the strengths", total=arguments.strengths)
        advance = partial(progress.advance, task)
        data, strengths, path, theirs = run(arguments.seed, arguments.strengths, advance)
    table = make_table(
        f"The L1 path, {len(data.train_y)} films, {len(strengths)} strengths",
        ["feature", "true effect", "enters at l1", "lasso_path's", "at the end"],
    )
    lasso_entries = entered_at(theirs, strengths)
    for name, l1 in entered_at(path, strengths).items():
        coefficient = show_number(path[-1, list(EFFECTS).index(name)])
        table.add_row(name, f"{EFFECTS[name]:.2f}", f"{l1:.4f}", f"{lasso_entries[name]:.4f}", coefficient)
    console.print(table)
    console.print(
        f"Largest difference of a coefficient from lasso_path's, on the whole path: {np.abs(path - theirs).max():.0e}.",
        style="dim",
    )
    good = sparsest_good_one(data, path)
    chosen = [name for name, w in zip(EFFECTS, path[good], strict=True) if w != 0]
    console.print(f"Chosen by the films not trained on, l1 = {strengths[good]:.3f}: [bold]{', '.join(chosen)}[/bold]")
    print_plots(console, [plot(data, strengths, path, theirs, arguments.output / "feature-selection.png")])


if __name__ == "__main__":
    main()
