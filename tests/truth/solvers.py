"""What the suites on truth from outside share: problems, full-batch descents, and the conditions of optimality.

Every problem here is  loss(w) + l1 * sum |w| + l2 / 2 * sum w^2  with a smooth convex loss, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from helpers import FusedRegAdam, FusedRegAdamW, FusedRegSGD
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet, Ridge
from torch import Tensor

from fusedreg import reference

Array = np.ndarray
Strength = tuple[float, float]  # l1, l2


def standardise(X: Array) -> Array:
    return (X - X.mean(0)) / X.std(0)


# -- losses: each gives its gradient for many weight vectors at once, one to a row


@dataclass(frozen=True)
class LeastSquares:
    """1 / (2n) * |y - Xw|^2"""

    X: Array
    y: Array
    gram: Tensor = field(init=False)
    correlation: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gram", torch.from_numpy(self.X.T @ self.X / len(self.y)))
        object.__setattr__(self, "correlation", torch.from_numpy(self.X.T @ self.y / len(self.y)))

    @property
    def l1_max(self) -> float:
        """The smallest l1 with which every coefficient is zero."""
        return self.correlation.abs().max().item()

    def gradient(self, W: Tensor) -> Tensor:
        return W @ self.gram.to(W.device) - self.correlation.to(W.device)


@dataclass(frozen=True)
class Logistic:
    """Mean of log(1 + exp(-y * Xw)), y in {-1, 1}, without an intercept."""

    X: Array
    y: Array

    @property
    def l1_max(self) -> float:
        return float(np.abs(self.X.T @ self.y).max() / (2 * len(self.y)))

    def gradient(self, W: Tensor) -> Tensor:
        X, y = (torch.from_numpy(part).to(W.device) for part in (self.X, self.y))
        return -(torch.sigmoid(-y * (W @ X.T)) * y) @ X / len(y)


@cache
def diabetes() -> LeastSquares:
    X, y = load_diabetes(return_X_y=True)
    return LeastSquares(standardise(X), y - y.mean())


@cache
def breast_cancer() -> Logistic:
    X, y = load_breast_cancer(return_X_y=True)
    return Logistic(standardise(X), 2.0 * y - 1.0)


@contextmanager
def one_thread() -> Iterator[None]:
    """The matrices are tiny; threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- optimizers, as they are run to the end of a full-batch problem


@dataclass(frozen=True)
class Solver:
    cls: type
    options: dict[str, Any]
    steps: int
    lr_decay: bool = False
    """Adam's normalised steps come to rest only where its lr does; amsgrad's metric settles, and SGD has none."""

    def make(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return self.cls(groups, **{**self.options, **options})


# The least squares problems here have curvatures between 0.0086 and 4.
SOLVERS = {
    "adam": Solver(FusedRegAdam, {"lr": 2.0}, 6000, lr_decay=True),
    # An eps that is a fair part of the metric: the prox must have it too.
    "adam-eps": Solver(FusedRegAdam, {"lr": 2.0, "eps": 0.1}, 6000, lr_decay=True),
    "amsgrad": Solver(FusedRegAdam, {"lr": 2.0, "amsgrad": True}, 4000),
    "adamw-no-decay": Solver(FusedRegAdamW, {"lr": 2.0, "weight_decay": 0.0}, 6000, lr_decay=True),
    "sgd": Solver(FusedRegSGD, {"lr": 0.45}, 8000),
    "momentum": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9}, 3000),
    "dampening": Solver(FusedRegSGD, {"lr": 0.45, "momentum": 0.9, "dampening": 0.5}, 3000),
    "nesterov": Solver(FusedRegSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3000),
}


class Descent:
    """Minimises one loss under many strengths at once: one parameter per strength, each in a group of its own."""

    def __init__(
        self,
        loss: LeastSquares | Logistic,
        strengths: list[Strength],
        solver: Solver,
        dtype: torch.dtype = torch.float64,
        start: Array | None = None,
        **options: Any,
    ) -> None:
        if start is None:
            start = np.zeros((len(strengths), loss.X.shape[1]))
        self.loss, self.solver = loss, solver
        self.weights = torch.tensor(start, dtype=dtype, device=torch.get_default_device())
        self.gradients = torch.empty_like(self.weights)
        groups = []
        for row, gradient, (l1, l2) in zip(self.weights, self.gradients, strengths, strict=True):
            param = torch.nn.Parameter(row)  # shares the row's memory
            param.grad = gradient
            groups.append({"params": [param], "l1": l1, "l2": l2})
        self.optimizer = solver.make(groups, **options)

    @one_thread()
    def run(self, steps: int | None = None) -> Array:
        """Takes the solver's steps, the lr falling anew, and returns the weights."""
        steps = self.solver.steps if steps is None else steps
        lr = self.solver.options["lr"]
        for i in range(steps):
            if self.solver.lr_decay and i % 10 == 0:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * (0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3)
            # In float64 for float32 weights too, and rounded once: what is tested is the step.
            self.gradients.copy_(self.loss.gradient(self.weights.double()))
            self.optimizer.step()
        return self.result()

    def result(self) -> Array:
        return self.weights.double().cpu().numpy().copy()


def minimise(
    loss: LeastSquares | Logistic, strengths: list[Strength], solver: Solver, steps: int | None = None, **options: Any
) -> Array:
    return Descent(loss, strengths, solver, **options).run(steps)


# -- optimality, and the truth


def kkt_violation(W: Array, gradient: Array, l1: Array | float, l2: Array | float) -> float:
    """How far 0 is from the subdifferential: gradient + l2 w = -l1 sign(w) on the support, |gradient| <= l1 off it."""
    on = W != 0
    smooth = gradient + l2 * W
    violation = np.where(on, np.abs(smooth + l1 * np.sign(W)), np.maximum(np.abs(smooth) - l1, 0))
    return float(violation.max())


def violations(loss: LeastSquares | Logistic, W: Array, strengths: list[Strength]) -> Array:
    """kkt_violation under each strength; a NaN in the weights is one here."""
    gradients = loss.gradient(torch.from_numpy(W)).numpy()
    return np.array([kkt_violation(w, g, l1, l2) for w, g, (l1, l2) in zip(W, gradients, strengths, strict=True)])


def scikit_learns(problem: LeastSquares, strengths: list[Strength]) -> Array:
    """Lasso, ElasticNet or Ridge, by the strength, down to rounding: the more exact side, and that is checked."""
    X, y = problem.X, problem.y
    coefficients = []
    for l1, l2 in strengths:
        if l1 == 0:
            model = Ridge(alpha=l2 * len(y), fit_intercept=False, solver="cholesky")
        else:
            share = l1 / (l1 + l2)
            model = ElasticNet(alpha=l1 + l2, l1_ratio=share, fit_intercept=False, tol=1e-15, max_iter=1_000_000)
        coefficients.append(model.fit(X, y).coef_)
    truth = np.array(coefficients)
    assert violations(problem, truth, strengths).max() < 1e-11
    return truth


# -- wrong proxes, to see that the tests see them; for monkeypatch and backend="reference"


def prox_with_floor(factor: float) -> Callable[..., Tensor]:
    """reference.prox with `factor` where the safeguard has 1/2."""

    def prox(z: Tensor, w_old: Tensor, step: reference.Step, group: reference.Group) -> Tensor:
        l1, l2 = group["l1"], group["l2"]
        tau = step.tau / torch.maximum(step.metric, factor * (l1 + l2 * w_old.abs()))
        return reference.soft_threshold(z, tau * l1) / (1 + tau * l2)

    return prox


def prox_without_gain(z: Tensor, w_old: Tensor, step: reference.Step, group: reference.Group) -> Tensor:
    """reference.prox with the step size lr where SGD's momentum has a gain."""
    return reference.soft_threshold(z, group["lr"] * group["l1"]) / (1 + group["lr"] * group["l2"])
