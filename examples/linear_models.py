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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import descend, half_mean_square, parse_arguments, print_table, seconds, standardise, track
from _plots import plot_linear_models
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fusedreg import FusedRegAdam

# %% [markdown]
# ## The four models
# Each is a loss, two strengths, and the scikit-learn model that minimises the same objective.


# %%
@dataclass
class Problem:
    name: str
    l1: float
    l2: float
    model: Any  # scikit-learn's
    x: np.ndarray
    y: np.ndarray
    features: list[str]
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    unit: str


def make_problems() -> list[Problem]:
    data, exact = load_diabetes(), {"fit_intercept": False, "tol": 1e-14, "max_iter": 1_000_000}
    x, y = standardise(data.data), data.target - data.target.mean()
    regression = partial(Problem, x=x, y=y, features=data.feature_names, loss=half_mean_square, lr=1.0, unit="target")
    ridge = Ridge(alpha=0.25 * len(y), fit_intercept=False)
    net = ElasticNet(alpha=3.0 + 1 / 3, l1_ratio=0.9, **exact)

    data, l1 = load_breast_cancer(), 0.05
    x, y = standardise(data.data), data.target.astype(float)
    saga = {"l1_ratio": 1.0, "solver": "saga", "fit_intercept": False, "tol": 1e-10, "max_iter": 100_000}
    model, loss = LogisticRegression(C=1 / (len(y) * l1), **saga), binary_cross_entropy_with_logits
    return [
        regression("Lasso", 3.0, 0.0, Lasso(alpha=3.0, **exact)),
        regression("Ridge", 0.0, 0.25, ridge),
        regression("ElasticNet", 3.0, 1 / 3, net),
        Problem("L1 logistic regression", l1, 0.0, model, x, y, list(data.feature_names), loss, 0.5, "log-odds"),
    ]


# %% [markdown]
# ## Full-batch FusedRegAdam
# The learning rate falls to zero, as Adam comes to rest only where it does. Float64, because we want to see ten digits
# agree.


# %%
@dataclass
class Fit:
    ours: np.ndarray
    theirs: np.ndarray
    seconds: float
    their_seconds: float


def fit(problem: Problem, steps: int) -> Fit:
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    optimizer = FusedRegAdam([w], lr=problem.lr, l1=problem.l1, l2=problem.l2)
    our_seconds = seconds(lambda: descend(optimizer, lambda: problem.loss(x @ w, y), steps))
    their_seconds = seconds(lambda: problem.model.fit(problem.x, problem.y))
    return Fit(w.detach().numpy(), problem.model.coef_.ravel(), our_seconds, their_seconds)


def assert_same(problem: Problem, result: Fit) -> float:
    """Raises AssertionError unless coefficients and zeros agree; the largest difference."""
    difference = float(np.abs(result.ours - result.theirs).max())
    assert difference < 1e-6, f"{problem.name}: the coefficients differ by up to {difference:.1e}"
    assert ((result.ours == 0) == (result.theirs == 0)).all(), f"{problem.name}: the zeros differ"
    return difference


# %%
def main() -> None:
    arguments = parse_arguments(__doc__, steps=(3000, "of each fit"))
    problems = make_problems()
    fits = [fit(problem, arguments.steps) for problem in track(problems, "fits")]
    rows = []
    for problem, result in zip(problems, fits, strict=True):
        counts = f"{len(result.ours)}", f"{(result.ours == 0).sum()}", f"{assert_same(problem, result):.0e}"
        rows.append((problem.name, *counts, f"{result.seconds:.2f}", f"{result.their_seconds:.3f}"))
    title = f"{arguments.steps} full-batch steps of FusedRegAdam, fp64, beside scikit-learn"
    print_table(title, ["model", "features", "zeros", "agree to", "seconds", "scikit-learn's"], rows)
    plot_linear_models(problems, fits, arguments.output / "linear-models.png")


if __name__ == "__main__":
    main()
