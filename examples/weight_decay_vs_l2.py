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

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from _common import descend, endless_batches, half_mean_square, parse_arguments, print_table, standardise, track
from _plots import plot_weight_decay
from scipy.optimize import lsq_linear
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from fusedreg import FusedRegAdam, FusedRegAdamW

LR = 0.01
START = (-0.1, 0.3)
LAMBDA = 1.0
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FEATURES = {"bmi": 1.0, "s5": 5.0}  # and their scale: the second is in units a fifth as large
WAYS = COUPLED, PROXIMAL, DECOUPLED = "coupled", "proximal", "decoupled"


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
    batches = endless_batches(len(y), batch_size, seed) if batch_size else itertools.repeat(slice(None))
    path = [w.detach().clone()]

    def loss() -> Tensor:
        batch = next(batches)
        return half_mean_square(x[batch] @ w, y[batch])

    descend(make_optimizer(way, w, strength), loss, steps, after_step=lambda: path.append(w.detach().clone()))
    return torch.stack(path).numpy()


def check(problem: LeastSquares, paths: dict[float, dict[str, np.ndarray]]) -> None:
    """Raises AssertionError unless coupled and proximal end at Ridge's solution, and decoupled elsewhere."""
    for strength, ways in paths.items():
        off = {way: np.abs(path[-1] - problem.ridge(strength)).max() for way, path in ways.items()}
        for way in (COUPLED, PROXIMAL):
            assert off[way] < 1e-6, f"{way}, lambda = {strength:g}: {off[way]:.1e} from Ridge's solution"
        distance = off[DECOUPLED]
        assert distance > 0.01, f"decoupled, lambda = {strength:g}: only {distance:.1e} from Ridge's solution"


def main() -> None:
    arguments = parse_arguments(__doc__, steps=(1500, "of each training"))
    problem, steps = LeastSquares.load(), arguments.steps
    paths = {s: {way: train(problem, way, s, steps) for way in WAYS} for s in track(SWEEP, "full batch")}
    check(problem, paths)
    noisy = {way: train(problem, way, LAMBDA, steps, 32, arguments.seed) for way in track(WAYS, "minibatches")}

    goals = problem.ridge(LAMBDA), problem.in_box(LAMBDA)

    def row(name: str, w: np.ndarray) -> list[str]:
        distances = (f"{np.abs(w - goal).max():.0e}" if w is not goal else "" for goal in goals)
        return [name, *(f"{value:.4f}" for value in w), *distances]

    print_table(
        f"Where each ends, lambda = {LAMBDA:g}",
        ["", *FEATURES, "off Ridge", "off least squares"],
        [row("Ridge", goals[0]), row(f"least squares, |w| <= {1 / LAMBDA:g}", goals[1])],
        [row(f"{way}, full batch", path[-1]) for way, path in paths[LAMBDA].items()],
        [row(f"{way}, batches of 32", path[-1]) for way, path in noisy.items()],
    )
    plot_weight_decay(problem, paths, LAMBDA, arguments.output / "weight-decay-vs-l2.png")


if __name__ == "__main__":
    main()
