"""Which features does a rating depend on? The L1 path says, and needs no threshold.

A viewer's ratings of 1000 films, made up: they depend on genre, director and cast, not on year and running time. Half
of the films are to learn from. All features are standardised. One ``FusedRegSGD`` walks down the strengths, from one
that leaves no feature to one that leaves almost all. Each strength starts at the weights of the one before: a warm
start is one assignment to the group's ``l1``. What enters earlier explains more of what is not yet explained.

scikit-learn's ``lasso_path`` walks the same strengths by coordinate descent. That the coefficients agree is asserted.

Run it with ``python examples/feature_selection.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from _common import (
    CONSOLE,
    EFFECTS,
    Split,
    descend,
    half_mean_square,
    make_ratings,
    parse_arguments,
    print_table,
    show_number,
    track,
)
from _plots import plot_l1_path
from sklearn.linear_model import lasso_path
from torch import nn

from fusedreg import FusedRegSGD

STEPS = 300  # for each strength


def walk_path(data: Split, strengths: np.ndarray) -> np.ndarray:
    """The coefficients at each strength, one row each, of ``1 / (2n) * |y - Xw|^2 + l1 * sum |w|``."""
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    optimizer = FusedRegSGD([w], lr=0.2, momentum=0.8)
    path = []
    for l1 in track(strengths, "down the strengths"):
        optimizer.param_groups[0]["l1"] = float(l1)  # all that a warm start takes: the weights are where they were
        descend(optimizer, lambda: half_mean_square(x @ w, y), STEPS, lr_falls=False)
        path.append(w.detach().numpy().copy())
    return np.array(path)


def run(seed: int, count: int) -> tuple[Split, np.ndarray, np.ndarray, np.ndarray]:
    """The data, the strengths, our path and lasso_path's; raises AssertionError where they differ."""
    data = make_ratings(seed)
    strongest = np.abs(data.train_x.T @ data.train_y).max() / len(data.train_y)  # no feature is left from here on
    strengths = 1.001 * strongest * np.logspace(0, -2.5, count)
    path = walk_path(data, strengths)
    theirs = lasso_path(data.train_x, data.train_y, alphas=strengths, tol=1e-14, max_iter=1_000_000)[1].T
    difference = np.abs(path - theirs).max()
    assert difference < 1e-8, f"the coefficients differ from lasso_path's by up to {difference:.1e}"
    return data, strengths, path, theirs


def entered_at(path: np.ndarray, strengths: np.ndarray) -> dict[str, float]:
    """The strength at which each feature is first nonzero, in the order of entering; 0 if it never is."""
    firsts = {
        name: float(strengths[np.flatnonzero(column)[0]]) if column.any() else 0.0
        for name, column in zip(EFFECTS, path.T, strict=True)
    }
    return dict(sorted(firsts.items(), key=lambda item: -item[1]))


def sparsest_good_one(squares: np.ndarray) -> int:
    """The strongest l1 within one standard error of the best: what predicts best keeps too many features."""
    best = squares[:, squares.mean(axis=0).argmin()]
    return int(np.flatnonzero(squares.mean(axis=0) <= best.mean() + best.std() / np.sqrt(len(best)))[0])


def main() -> None:
    arguments = parse_arguments(__doc__, strengths=(60, "on the path"))
    data, strengths, path, theirs = run(arguments.seed, arguments.strengths)
    entered, lasso_entered = entered_at(path, strengths), entered_at(theirs, strengths)
    rows = []
    for name, l1 in entered.items():
        at_end = show_number(path[-1, list(EFFECTS).index(name)])
        rows.append((name, f"{EFFECTS[name]:.2f}", f"{l1:.4f}", f"{lasso_entered[name]:.4f}", at_end))
    columns = ["feature", "true effect", "enters at l1", "lasso_path's", "at the end"]
    print_table(f"The L1 path, {len(data.train_y)} films, {len(strengths)} strengths", columns, rows)
    difference = np.abs(path - theirs).max()
    CONSOLE.print(f"Largest difference of a coefficient from lasso_path's, on the whole path: {difference:.0e}.")

    squares = np.square(data.test_y[:, None] - data.test_x @ path.T)  # film by film, on films not trained on
    good = sparsest_good_one(squares)
    chosen = ", ".join(name for name, w in zip(EFFECTS, path[good], strict=True) if w != 0)
    CONSOLE.print(f"Chosen by the films not trained on, l1 = {strengths[good]:.3f}: [bold]{chosen}[/bold]")
    rmse = np.sqrt(squares.mean(axis=0))
    plot_l1_path(strengths, path, theirs, list(entered), rmse, good, arguments.output / "feature-selection.png")


if __name__ == "__main__":
    main()
