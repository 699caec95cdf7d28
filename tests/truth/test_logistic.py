"""Proves that sparse logistic regression ends where scikit-learn's saga, celer and skglm end, and at the optimum.

Breast cancer: L1 and elastic net, coefficients, zeros and optimality conditions. Digits: multinomial, through a module
and ``param_groups`` with its bias exempt, by value of the objective and optimality conditions.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import sklearn
import torch
from figures import at_most
from helpers import one_thread
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from solvers import (
    SOLVERS,
    Solver,
    Strength,
    breast_cancer,
    kkt_violation,
    minimise,
    standardise,
    violations,
)
from torch.nn.functional import cross_entropy

from fusedreg import FusedRegAdagrad, FusedRegAdam, FusedRegRMSprop, FusedRegSGD, param_groups

# Shares of the l1 that leaves no coefficient. Between 0.55 and 0.3, and below 0.11, the support holds the radius and
# the perimeter or area, correlated by 0.98; the curvature is under 0.001 there, and every first-order method crawls.
SHARES = (0.9, 0.6, 0.25, 0.2, 0.15, 0.12)

BINARY_SOLVERS = {
    "adam": Solver(FusedRegAdam, {"lr": 0.5}, 5000, lr_decay=True),
    "amsgrad": Solver(FusedRegAdam, {"lr": 0.5, "amsgrad": True}, 4000),
    "sgd": Solver(FusedRegSGD, {"lr": 0.58}, 12000),
    "momentum": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9}, 4000),
    "dampening": Solver(FusedRegSGD, {"lr": 1.0, "momentum": 0.9, "dampening": 0.8}, 4000),
    "nesterov": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9, "nesterov": True}, 4000),
    "rmsprop-momentum": Solver(FusedRegRMSprop, {"lr": 0.1, "momentum": 0.9, "eps": 0.01}, 4000, falls_to=0.1),
    "rmsprop-centered": Solver(FusedRegRMSprop, {"lr": 0.03, "centered": True, "eps": 0.01}, 8000, falls_to=0.1),
    "adagrad": Solver(FusedRegAdagrad, {"lr": 6.0}, 12_000),
}


def saga(X: np.ndarray, y: np.ndarray, l1: float, l2: float, **options) -> LogisticRegression:
    # penalty="elasticnet" is what l1_ratio needs before 1.8, and is deprecated since.
    if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8):
        options["penalty"] = "elasticnet"
    C, l1_ratio = 1 / (len(y) * (l1 + l2)), l1 / (l1 + l2)
    model = LogisticRegression(C=C, l1_ratio=l1_ratio, solver="saga", max_iter=100_000, random_state=0, **options)
    return model.fit(X, y)


@cache
def strengths_of(family: str) -> list[Strength]:
    l1_max = breast_cancer().l1_max
    return [(s * l1_max, 0.0) if family == "l1" else (0.7 * s * l1_max, 0.3 * s) for s in SHARES]


@cache
def sagas(family: str) -> np.ndarray:
    problem = breast_cancer()
    coefficients = [
        saga(problem.X, problem.y, l1, l2, fit_intercept=False, tol=1e-11).coef_[0] for l1, l2 in strengths_of(family)
    ]
    truth = np.array(coefficients)
    assert violations(problem, truth, strengths_of(family)).max() < 1e-10
    return truth


@pytest.fixture(scope="module", params=["l1", "elastic-net"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=BINARY_SOLVERS)
def solver(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def fit(family, solver) -> np.ndarray:
    return minimise(breast_cancer(), strengths_of(family), BINARY_SOLVERS[solver])


def test_coefficients_and_support_are_sagas(fit, family) -> None:
    at_most(1e-8, np.abs(fit - sagas(family)).max(), f"logistic, {family}: coefficients beside saga's")
    np.testing.assert_array_equal(fit != 0, sagas(family) != 0)
    if family == "l1":
        assert set((fit != 0).sum(1)) >= {2, 4, 7}


def test_optimality_conditions_hold(fit, family) -> None:
    worst = violations(breast_cancer(), fit, strengths_of(family)).max()
    at_most(1e-10, worst, f"logistic, {family}: optimality conditions")


def test_l1_is_celers() -> None:
    """Newton steps on working sets with a duality gap: nothing in common with ours. Its gap allows it about 1e-7."""
    celer = pytest.importorskip("celer")
    problem, n = breast_cancer(), len(breast_cancer().y)
    fit = minimise(problem, strengths_of("l1"), BINARY_SOLVERS["momentum"])
    for w, (l1, _) in zip(fit, strengths_of("l1"), strict=True):
        model = celer.LogisticRegression(C=1 / (n * l1), fit_intercept=False, tol=1e-12, max_iter=500)
        truth = model.fit(problem.X, problem.y).coef_[0]
        at_most(5e-7, np.abs(w - truth).max(), "logistic, l1: coefficients beside celer's")
        np.testing.assert_array_equal(w != 0, truth != 0)


@pytest.mark.slow
def test_elastic_net_is_skglms() -> None:
    """Prox-Newton. numba compiles it, which takes most of the time."""
    pytest.importorskip("skglm")
    with warnings.catch_warnings():  # numba's, on how skglm is written
        warnings.simplefilter("ignore")
        from skglm import GeneralizedLinearEstimator
        from skglm.datafits import Logistic
        from skglm.penalties import L1_plus_L2
        from skglm.solvers import ProxNewton

        problem = breast_cancer()
        fit = minimise(problem, strengths_of("elastic-net"), BINARY_SOLVERS["adam"])
        for w, (l1, l2) in zip(fit, strengths_of("elastic-net"), strict=True):
            penalty = L1_plus_L2(l1 + l2, l1_ratio=l1 / (l1 + l2))
            prox_newton = ProxNewton(tol=1e-13, max_iter=200, fit_intercept=False)
            model = GeneralizedLinearEstimator(Logistic(), penalty, prox_newton)
            truth = model.fit(problem.X, problem.y).coef_.ravel()
            np.testing.assert_allclose(w, truth, rtol=0, atol=1e-10)
            np.testing.assert_array_equal(w != 0, truth != 0)


# -- multinomial

MULTINOMIAL_STRENGTHS = {"l1": (0.05, 0.0), "elastic-net": (0.005, 0.02)}
MULTINOMIAL_SOLVERS = {
    "adam": Solver(FusedRegAdam, {"lr": 0.3}, 2000, lr_decay=True),
    "amsgrad": Solver(FusedRegAdam, {"lr": 0.1, "amsgrad": True}, 2000),
    "momentum": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9}, 2000),
    "nesterov": Solver(FusedRegSGD, {"lr": 0.1, "momentum": 0.95, "nesterov": True}, 2000),
    "rmsprop-momentum": Solver(FusedRegRMSprop, {"lr": 0.1, "momentum": 0.9, "eps": 0.01}, 2000, falls_to=0.03),
}


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The first 600 images, without the pixels that are empty in all of them."""
    X, y = load_digits(return_X_y=True)
    X, y = X[:600], y[:600]
    return standardise(X[:, X.std(0) > 0]), y


def objective(weight: torch.Tensor, bias: torch.Tensor, l1: float, l2: float) -> float:
    X, y = map(torch.from_numpy, digits())
    loss = cross_entropy(X @ weight.T + bias, y)
    return (loss + l1 * weight.abs().sum() + l2 / 2 * weight.square().sum()).item()


@cache
def sagas_multinomial(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = saga(*digits(), *MULTINOMIAL_STRENGTHS[family], tol=1e-7)
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


@pytest.mark.parametrize("solver", MULTINOMIAL_SOLVERS)
@pytest.mark.parametrize("family", MULTINOMIAL_STRENGTHS)
@one_thread()
def test_multinomial_on_digits(family, solver) -> None:
    l1, l2 = MULTINOMIAL_STRENGTHS[family]
    X, y = map(torch.from_numpy, digits())
    model = torch.nn.Linear(X.shape[1], 10, dtype=torch.float64)
    chosen = MULTINOMIAL_SOLVERS[solver]
    optimizer = chosen.make(param_groups(model, l1=l1, l2=l2))

    def backward() -> None:
        optimizer.zero_grad()
        cross_entropy(model(X), y).backward()

    for i in range(chosen.steps):
        for group in optimizer.param_groups:
            group["lr"] = chosen.lr(i, chosen.steps)
        backward()
        optimizer.step()
    backward()
    weight, bias = model.weight.detach(), model.bias.detach()
    worst = kkt_violation(weight.numpy(), model.weight.grad.numpy(), l1, l2)
    at_most(1e-8, max(worst, model.bias.grad.abs().max().item()), f"multinomial, {family}: optimality conditions")

    # saga's bias, like ours, is free of the penalty. It stops where it stops; no objective is below the minimum.
    truth_weight, truth_bias = sagas_multinomial(family)
    ours, truth = objective(weight, bias, l1, l2), objective(truth_weight, truth_bias, l1, l2)
    assert ours <= truth + 1e-14
    at_most(1e-9, truth - ours, f"multinomial, {family}: objective below saga's")
    np.testing.assert_array_equal((weight != 0).numpy(), (truth_weight != 0).numpy())
    assert 0.1 < (weight == 0).double().mean() < 0.95


def test_strengths_are_per_sample_means() -> None:
    """The lambda of a mean loss: with the data repeated, every step stays. So C is 1 / (n * l1)."""
    problem = breast_cancer()
    twice = type(problem)(np.tile(problem.X, (2, 1)), np.tile(problem.y, 2))
    once = minimise(problem, strengths_of("l1"), SOLVERS["sgd"], steps=50)
    np.testing.assert_allclose(minimise(twice, strengths_of("l1"), SOLVERS["sgd"], steps=50), once, rtol=1e-10)
