"""What the suites on truth from outside share: problems, full-batch descents, and the conditions of optimality.

Every problem here is  loss(w) + l1 * sum |w| + l2 / 2 * sum w^2  with a smooth convex loss, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from helpers import one_thread
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet, Ridge
from torch import Tensor

from fusedreg import (
    FusedRegAdadelta,
    FusedRegAdagrad,
    FusedRegAdam,
    FusedRegAdamax,
    FusedRegAdamW,
    FusedRegASGD,
    FusedRegFTRL,
    FusedRegNAdam,
    FusedRegRAdam,
    FusedRegRMSprop,
    FusedRegSGD,
)
from fusedreg.backends import reference
from fusedreg.rules.spec import Step

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
def all_of_diabetes() -> LeastSquares:
    X, y = load_diabetes(return_X_y=True)
    return LeastSquares(standardise(X), y - y.mean())


@cache
def diabetes() -> LeastSquares:
    """Without s1, which s2 to s5 almost give: curvatures between 0.078 and 3.6, where with it they start at 0.0086. A
    descent is there in a quarter of the steps."""
    X, y = load_diabetes(return_X_y=True)
    return LeastSquares(standardise(np.delete(X, 4, axis=1)), y - y.mean())


@cache
def breast_cancer() -> Logistic:
    X, y = load_breast_cancer(return_X_y=True)
    return Logistic(standardise(X), 2.0 * y - 1.0)


# -- optimizers, as they are run to the end of a full-batch problem


@dataclass(frozen=True)
class Solver:
    cls: type
    options: dict[str, Any]
    steps: int
    lr_decay: bool = False
    """Adam's normalised steps come to rest only where its lr does; amsgrad's metric settles, and SGD has none."""
    falls_to: float = 1.0
    """The lr's share that is left at the end. It falls by the same factor, fifty times."""
    forgets: bool = True
    """Whether it comes to the end of one problem with the state of another. Adagrad's metric never gets smaller."""

    @property
    def lr_falls(self) -> bool:
        return self.lr_decay or self.falls_to != 1

    def make(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return self.cls(groups, **{**self.options, **options})

    def lr(self, i: int, steps: int) -> float:
        """The lr of step ``i`` of ``steps``."""
        cosine = 0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3 if self.lr_decay else 1.0
        return self.options["lr"] * cosine * self.falls_to ** (i / steps)


# Every rule that can be exact has a line here, or more: test_elastic_net.py says so. The least squares problems here
# have curvatures between 0.078 and 4. At a solution an adaptive rule's metric is about l1 + l2 |w|, which goes over
# three decades, and lr over the metric must be below 1/2: a falling lr comes by there, and an eps shortens the way. A
# centered metric goes down with the lr. With momentum it must settle, because the buffer adds up steps in the metrics
# of their days, and a variance is a difference that rounding leaves at 1e-16 of its terms, its root at 1e-8: a large
# eps.
SOLVERS = {
    "adam": Solver(FusedRegAdam, {"lr": 2.0}, 2000, lr_decay=True),
    # An eps that is a fair part of the metric: the prox must have it too.
    "adam-eps": Solver(FusedRegAdam, {"lr": 2.0, "eps": 0.1}, 2000, lr_decay=True),
    "amsgrad": Solver(FusedRegAdam, {"lr": 2.0, "amsgrad": True}, 1000),
    "adamw-no-decay": Solver(FusedRegAdamW, {"lr": 2.0, "weight_decay": 0.0}, 2000, lr_decay=True),
    "sgd": Solver(FusedRegSGD, {"lr": 0.45}, 1500),
    "momentum": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9}, 1000),
    "dampening": Solver(FusedRegSGD, {"lr": 0.45, "momentum": 0.9, "dampening": 0.5}, 1000),
    "nesterov": Solver(FusedRegSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 1000),
    "asgd": Solver(FusedRegASGD, {"lr": 0.45, "lambd": 0.0}, 1500),
    "rmsprop": Solver(FusedRegRMSprop, {"lr": 25.0, "eps": 10.0}, 4000, falls_to=0.12),
    "rmsprop-momentum": Solver(FusedRegRMSprop, {"lr": 5.0, "momentum": 0.95, "eps": 0.01}, 5000, falls_to=1e-4),
    "rmsprop-centered": Solver(FusedRegRMSprop, {"lr": 1.0, "centered": True, "eps": 0.01}, 3000, falls_to=1e-3),
    "rmsprop-centered-momentum": Solver(
        FusedRegRMSprop,
        {"lr": 500.0, "alpha": 0.95, "centered": True, "momentum": 0.9, "eps": 1000.0},
        8000,
        falls_to=1e-3,
    ),
    "adagrad": Solver(FusedRegAdagrad, {"lr": 15.0}, 4000, forgets=False),
    "adagrad-lr_decay": Solver(
        FusedRegAdagrad, {"lr": 20.0, "lr_decay": 1e-4, "initial_accumulator_value": 0.3}, 4000, forgets=False
    ),
    "ftrl": Solver(FusedRegFTRL, {"lr": 15.0, "beta": 0.1}, 4000, forgets=False),
    "nadam": Solver(FusedRegNAdam, {"lr": 2.0}, 3000, lr_decay=True),
    "nadamw-no-decay": Solver(
        FusedRegNAdam, {"lr": 2.0, "momentum_decay": 0.1, "decoupled_weight_decay": True}, 3000, lr_decay=True
    ),
    # Its steps are rectified for as long as the second moment remembers.
    "radam": Solver(FusedRegRAdam, {"lr": 2.0, "betas": (0.9, 0.99)}, 2500, lr_decay=True),
    "adamax": Solver(FusedRegAdamax, {"lr": 2.0, "eps": 0.1}, 3000, lr_decay=True),
    # Its steps grow while the gradients stand still: by what eps and rho make of that, over the run five times.
    "adadelta": Solver(FusedRegAdadelta, {"lr": 2.5, "rho": 0.999, "eps": 100.0}, 4000, falls_to=0.024, forgets=False),
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
        # Seldom: for an optimizer, to read a group anew is as much as forty steps.
        every = max(10, steps // 50)
        for i in range(steps):
            if i % every == 0 and self.solver.lr_falls:
                lr = self.solver.lr(i, steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
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

_right_prox = reference.prox


def prox_with_floor(factor: float) -> Callable[..., Tensor]:
    """reference.prox with `factor` where the safeguard has 1/2, and the metric itself decides whether it acts."""

    def prox(z: Tensor, w_old: Tensor, step: Step, group: dict[str, Any]) -> Tensor:
        l1, l2 = group["l1"], group["l2"]
        kappa = step.tau / torch.maximum(step.metric, factor * (l1 + l2 * w_old.abs()))
        return z.sign() * (z.abs() - kappa * l1).clamp(min=0) / (1 + kappa * l2)

    return prox


def prox_with_bare_floor(z: Tensor, w_old: Tensor, step: Step, group: dict[str, Any]) -> Tensor:
    """reference.prox with the floor in the metric's place where it acts, without its ratio to the safeguard."""
    l1, l2 = group["l1"], group["l2"]
    floor = (l1 + l2 * w_old.abs()) / 2
    kappa = step.tau / torch.where(step.safeguard > floor, step.metric, torch.maximum(step.metric, floor))
    return z.sign() * (z.abs() - kappa * l1).clamp(min=0) / (1 + kappa * l2)


def prox_without_gain(z: Tensor, w_old: Tensor, step: Step, group: dict[str, Any]) -> Tensor:
    """reference.prox with lr where a momentum's gain belongs too."""
    return _right_prox(z, w_old, step._replace(tau=group["lr"]), group)


def prox_without_eps(z: Tensor, w_old: Tensor, step: Step, group: dict[str, Any]) -> Tensor:
    """reference.prox in the metric without the step's eps."""
    return _right_prox(z, w_old, step._replace(metric=step.metric - group["eps"]), group)
