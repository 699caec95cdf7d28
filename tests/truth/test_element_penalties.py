"""Proves where full-batch descents end with a box, the minimax concave penalty and the L0 penalty.

Convex problems against scikit-learn (``positive=True``) and scipy (``lsq_linear``). The minimax concave penalty against
skglm where that is installed, and always against the conditions for a stationary point.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from figures import at_most
from helpers import FusedRegAdagrad, FusedRegAdam, FusedRegRMSprop, FusedRegSGD
from scipy.integrate import quad
from scipy.optimize import lsq_linear
from sklearn.linear_model import ElasticNet
from solvers import SOLVERS, Array, LeastSquares, Solver, Strength, diabetes, minimise, violations

import fusedreg
from fusedreg.backends import reference
from fusedreg.penalties import OPTIONS, PENALTIES
from fusedreg.penalties.spec import distance_to_subdifferential

STRENGTHS: list[Strength] = [(10.0, 0.0), (5.0, 0.0), (1.0, 0.0), (5.0, 0.3), (0.5, 0.05)]


def distances(W: Array, strengths: list[Strength], **penalties: float) -> Array:
    """Of 0 to the subdifferential of the objective in each coefficient: the loss's gradient, and every penalty's."""
    gradients = diabetes().gradient(torch.from_numpy(W))
    found = []
    for w, gradient, (l1, l2) in zip(torch.from_numpy(W), gradients, strengths, strict=True):
        group = {**{option.name: option.default for option in OPTIONS}, "l1": l1, "l2": l2, **penalties}
        found.append(distance_to_subdifferential(PENALTIES, gradient, w, group).numpy())
    return np.array(found)


# -- the box


def nonnegative(strengths: list[Strength]) -> Array:
    X, y = diabetes().X, diabetes().y
    models = [
        ElasticNet(l1 + l2, l1_ratio=l1 / (l1 + l2), fit_intercept=False, positive=True, tol=1e-15, max_iter=10**6)
        for l1, l2 in strengths
    ]
    return np.array([model.fit(X, y).coef_ for model in models])


@pytest.mark.parametrize("solver", SOLVERS)
def test_nonnegative_lasso_is_scikit_learns(solver) -> None:
    truth = nonnegative(STRENGTHS)
    assert distances(truth, STRENGTHS, lower=0.0).max() < 1e-11
    assert violations(diabetes(), truth, STRENGTHS).min() > 1  # another problem than without the box
    fit = minimise(diabetes(), STRENGTHS, SOLVERS[solver], lower=0.0)
    at_most(1e-8, np.abs(fit - truth).max(), "nonnegative Lasso and elastic net: coefficients beside scikit-learn's")
    np.testing.assert_array_equal(fit != 0, truth != 0)
    at_most(1e-8, distances(fit, STRENGTHS, lower=0.0).max(), "nonnegative: optimality conditions")


def in_a_box(problem: LeastSquares, l2: float, lower: float, upper: float) -> Array:
    n, columns = problem.X.shape
    A = np.vstack([problem.X / np.sqrt(n), np.sqrt(l2) * np.eye(columns)])
    b = np.concatenate([problem.y / np.sqrt(n), np.zeros(columns)])
    return lsq_linear(A, b, (lower, upper), method="bvls", tol=1e-15).x


SOON = ("adam", "amsgrad", "sgd", "momentum", "nesterov", "adagrad")


@pytest.mark.parametrize("solver", SOON)
def test_least_squares_in_a_box_are_scipys(solver, backend) -> None:
    """Ridge in a box that holds most coefficients."""
    strengths = [(0.0, 0.3), (0.0, 0.05)]
    box = {"lower": -3.0, "upper": 11.0}
    truth = np.array([in_a_box(diabetes(), l2, **box) for _, l2 in strengths])
    assert np.isclose(truth, -3).any()
    assert np.isclose(truth, 11).any()
    fit = minimise(diabetes(), strengths, SOLVERS[solver], steps=1500, backend=backend, **box)
    np.testing.assert_allclose(fit, truth, rtol=0, atol=1e-8)
    assert ((fit >= -3) & (fit <= 11)).all()
    assert distances(fit, strengths, **box).max() < 1e-8


def test_a_box_without_zero() -> None:
    """As for a scale: the Lasso's minimiser is clamped, though nothing is zero."""
    fit = minimise(diabetes(), [(5.0, 0.0)], SOLVERS["amsgrad"], lower=0.25, upper=20.0)
    assert distances(fit, [(5.0, 0.0)], lower=0.25, upper=20.0).max() < 1e-8
    assert (fit == 0.25).sum() > 2


# -- the minimax concave penalty

# With the first the objective has more stationary points than one; the second is above the inverse of the least
# curvature, 13, and it is convex.
GAMMAS = (3.0, 150.0)
# A metric must come to hold the penalty's concavity, and a momentum must not overshoot what it makes of a step: an lr
# that falls.
MCP_SOLVERS = {
    **{name: SOLVERS[name] for name in ("adam", "sgd", "adagrad", "rmsprop-centered")},
    "amsgrad": Solver(FusedRegAdam, {"lr": 2.0, "amsgrad": True}, 3000, falls_to=0.03),
    "momentum": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9}, 3000, falls_to=0.05),
    "nesterov": Solver(FusedRegSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3000, falls_to=0.05),
    "rmsprop-momentum": Solver(FusedRegRMSprop, {"lr": 5.0, "momentum": 0.9, "eps": 0.1}, 12_000, falls_to=1e-4),
}
MCP_STRENGTHS: list[Strength] = [(20.0, 0.0), (5.0, 0.0), (1.0, 0.0), (5.0, 0.3)]


@pytest.mark.parametrize("solver", MCP_SOLVERS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_minimax_concave_ends_at_a_stationary_point(solver, gamma) -> None:
    fit = minimise(diabetes(), MCP_STRENGTHS, MCP_SOLVERS[solver], mcp_gamma=gamma)
    worst = distances(fit, MCP_STRENGTHS, mcp_gamma=gamma).max()
    at_most(2e-8, worst, "minimax concave penalty: distance to a stationary point")
    assert violations(diabetes(), fit, MCP_STRENGTHS).min() > 0.1  # not the Lasso's
    assert (fit == 0).any()
    knee = gamma * np.array(MCP_STRENGTHS)[:, :1]
    assert ((fit != 0) & (np.abs(fit) < knee)).sum() > 4
    assert (np.abs(fit) > knee).any() == (gamma == 3)


def test_minimax_concave_needs_a_floor_that_fades_with_it(monkeypatch) -> None:
    """Where its slope is less than half of l1, a floor of l1 / 2 is above the metric at the solution."""

    def step_size(w_old, step, group):
        floor = (group["l1"] + group["l2"] * w_old.abs()) / 2
        return step.tau / torch.maximum(step.metric, floor)

    strengths, solver, options = [(5.0, 0.0)], SOLVERS["adam"], {"backend": "reference", "mcp_gamma": 3.0}
    right = minimise(diabetes(), strengths, solver, steps=3000, **options)
    assert distances(right, strengths, mcp_gamma=3.0).max() < 1e-8
    slope = 5 - np.abs(right) / 3
    assert ((slope > 0) & (slope < 2.5)).any()
    monkeypatch.setattr(reference, "step_size", step_size)
    wrong = minimise(diabetes(), strengths, solver, steps=3000, **options)
    assert distances(wrong, strengths, mcp_gamma=3.0).max() > 0.1


def test_minimax_concave_is_skglms() -> None:
    """Where the objective is convex, so that there is one minimiser."""
    skglm = pytest.importorskip("skglm")
    from skglm.penalties import MCPenalty

    for l1, _ in MCP_STRENGTHS[:3]:
        model = skglm.GeneralizedLinearEstimator(
            skglm.datafits.Quadratic(),
            MCPenalty(l1, GAMMAS[1]),
            skglm.solvers.AndersonCD(tol=1e-13, fit_intercept=False, max_iter=1000),
        )
        truth = model.fit(diabetes().X, diabetes().y).coef_
        fit = minimise(diabetes(), [(l1, 0.0)], MCP_SOLVERS["amsgrad"], mcp_gamma=GAMMAS[1])
        np.testing.assert_allclose(fit[0], truth, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(fit[0] != 0, truth != 0)


# -- the L0 penalty

# Without a metric, or with one that stays as a gradient has made it: the noise of small batches, which keeps one up, is
# missing here. A momentum remembers weights that are gone, and settles as the lr falls.
L0_SOLVERS = {
    "sgd": SOLVERS["sgd"],
    "momentum": Solver(FusedRegSGD, {"lr": 0.2, "momentum": 0.9}, 3000, falls_to=0.03),
    "nesterov": Solver(FusedRegSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3000, falls_to=0.03),
    "amsgrad": Solver(FusedRegAdam, {"lr": 2.0, "amsgrad": True}, 2000),
    "adagrad": Solver(FusedRegAdagrad, {"lr": 15.0}, 4000),
    "decoupled": Solver(FusedRegSGD, {"lr": 0.45, "penalty_mode": "decoupled"}, 2000),
}


@pytest.mark.parametrize("solver", L0_SOLVERS)
def test_l0_ends_at_the_least_squares_of_its_support(solver) -> None:
    """A local minimiser: no gradient on the support, which grows as l0 falls. What is left is not shrunk."""
    sizes = []
    for l0 in (300.0, 30.0, 3.0, 0.3, 0.0):
        fit = minimise(diabetes(), [(0.0, 0.0)], L0_SOLVERS[solver], l0=l0)
        at_most(1e-8, distances(fit, [(0.0, 0.0)], l0=l0).max(), "L0 penalty: gradient on the support")
        sizes.append(int((fit != 0).sum()))
    assert sizes == sorted(sizes)
    assert sizes[-1] == 9
    assert len({size for size in sizes if 0 < size < 9}) >= 2


def test_frozen_zeros_refit_on_a_support() -> None:
    """The Lasso selects; then l1 goes, the zeros stay, and what is left is the least squares of that support."""
    problem = diabetes()
    lasso = minimise(problem, [(5.0, 0.0)], SOLVERS["amsgrad"])
    support = lasso[0] != 0
    assert 2 < support.sum() < 9
    for solver in (SOLVERS["amsgrad"], dataclasses.replace(SOLVERS["sgd"], steps=4000)):
        refit = minimise(problem, [(0.0, 0.0)], solver, start=lasso, freeze_zeros=True)[0]
        expected = np.linalg.lstsq(problem.X[:, support], problem.y, rcond=None)[0]
        np.testing.assert_allclose(refit[support], expected, rtol=0, atol=1e-8)
        assert (refit[~support] == 0).all()


# -- the value


def test_penalty_is_the_value_of_all_of_it() -> None:
    w = torch.tensor([0.0, 0.5, -2.0, 10.0], dtype=torch.float64).requires_grad_()
    options = {"l1": 0.3, "mcp_gamma": 4.0, "l2": 0.1, "l0": 0.07, "lower": -3.0, "upper": 10.0}
    value = fusedreg.penalty(FusedRegSGD([w], **options)).item()
    minimax = [quad(lambda t: max(0.3 - t / 4, 0), 0, abs(x), points=[1.2])[0] for x in w.tolist()]
    assert value == pytest.approx(sum(minimax) + 0.05 * 104.25 + 0.07 * 3, rel=1e-9)
    assert fusedreg.penalty(FusedRegSGD([w], upper=9.0)).item() == float("inf")
