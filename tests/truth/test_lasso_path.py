"""Proves that the Lasso's path is right where mathematics gives it without a solver.

Nothing is left from l1_max on, and one coefficient just below it; an orthonormal design is a soft-threshold; the
support changes exactly at the knots of least angle regression; a path walked with one optimizer equals cold starts.
"""

from __future__ import annotations

import numpy as np
import pytest
from figures import at_most
from sklearn.linear_model import lars_path
from solvers import SOLVERS, Descent, LeastSquares, Strength, all_of_diabetes, breast_cancer, diabetes, minimise

every_solver = pytest.mark.parametrize("solver", SOLVERS)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@every_solver
def test_l1_max(solver, rng) -> None:
    """From anywhere: no coefficient at 1.0001 |X'y|_inf / n, exactly one at 0.999 of it, whatever l2 is."""
    problem = diabetes()
    correlation = problem.correlation.numpy()
    strengths = [(factor * problem.l1_max, l2) for factor in (1.0001, 0.999) for l2 in (0.0, 0.5)]
    fit = minimise(problem, strengths, SOLVERS[solver], start=20 * rng.standard_normal((4, 9)))
    assert (fit[:2] == 0).all()
    first = np.abs(correlation).argmax()
    for w, (l1, l2) in zip(fit[2:], strengths[2:], strict=True):
        assert np.flatnonzero(w) == [first]
        # Alone, it is a one-dimensional problem; a standardised column has a curvature of 1.
        expected = np.sign(correlation[first]) * (np.abs(correlation[first]) - l1) / (1 + l2)
        at_most(1e-8, abs(w[first] - expected), "just below l1_max: the one coefficient")


@pytest.mark.parametrize("solver", ["amsgrad", "momentum"])
def test_l1_max_of_a_logistic_regression(solver, rng) -> None:
    problem = breast_cancer()
    strengths = [(factor * problem.l1_max, 0.0) for factor in (1.0001, 0.999)]
    fit = minimise(problem, strengths, SOLVERS[solver], start=0.1 * rng.standard_normal((2, 30)))
    assert (fit != 0).sum(1).tolist() == [0, 1]


@every_solver
def test_orthonormal_design(solver, rng) -> None:
    """X'X = n: soft(X'y / n, l1) / (1 + l2), coefficient by coefficient."""
    n = 40
    Q, _ = np.linalg.qr(rng.standard_normal((n, 8)))
    problem = LeastSquares(np.sqrt(n) * Q, 10 * rng.standard_normal(n))
    c = problem.correlation.numpy()
    strengths = [(l1 * problem.l1_max, l2) for l1 in (0.0, 0.05, 0.3, 0.8) for l2 in (0.0, 0.7)]
    fit = minimise(problem, strengths, SOLVERS[solver], steps=max(2000, SOLVERS[solver].steps))
    closed_form = np.array([np.sign(c) * np.maximum(np.abs(c) - l1, 0) / (1 + l2) for l1, l2 in strengths])
    assert 0.2 < (closed_form == 0).mean() < 0.8
    at_most(1e-10, np.abs(fit - closed_form).max(), "orthonormal design: coefficients")
    np.testing.assert_array_equal(fit == 0, closed_form == 0)


def knots(problem: LeastSquares) -> tuple[np.ndarray, np.ndarray]:
    """The l1 of each knot of a Lasso path, from l1_max to 0, and the coefficients there."""
    l1, _, coefficients = lars_path(problem.X, problem.y, method="lasso")
    return l1, coefficients.T


# FTRL weighs its first gradients as its last: so near to a knot, it needs a thousand times as many steps to forget.
@pytest.mark.parametrize(
    ("problem", "solver", "steps"),
    [
        *((diabetes, name, None) for name in SOLVERS if name != "ftrl"),
        *((all_of_diabetes, name, 4000) for name in ("amsgrad", "momentum")),
    ],
)
def test_support_changes_at_the_knots_of_lars(problem, solver, steps) -> None:
    """Just above and just below each knot: the supports differ in one feature, and the path is linear between knots."""
    l1, coefficients = knots(problem())
    margin = 1e-3
    assert (np.diff(l1) < -5 * margin * l1[1:]).all()
    strengths: list[Strength] = []
    expected, expected_support = [], []
    for k in range(1, len(l1) - 1):
        for value, segment in ((l1[k] * (1 + margin), k - 1), (l1[k] * (1 - margin), k)):
            share = (l1[segment] - value) / (l1[segment] - l1[segment + 1])
            strengths.append((value, 0.0))
            expected.append(coefficients[segment] + share * (coefficients[segment + 1] - coefficients[segment]))
            expected_support.append((coefficients[segment] != 0) | (coefficients[segment + 1] != 0))
    fit = minimise(problem(), strengths, SOLVERS[solver], steps=steps)
    np.testing.assert_array_equal(fit != 0, expected_support)
    above, below = (fit != 0)[::2], (fit != 0)[1::2]
    assert ((above != below).sum(1) == 1).all()
    # Of all of them, features do not only come: one leaves on the way.
    assert (above & ~below).any() == (problem is all_of_diabetes)
    at_most(1e-8, np.abs(fit - expected).max(), "beside the knots of lars_path: coefficients")


# A centered metric that has gone down with the lr does not come up again in time.
@pytest.mark.parametrize("solver", [n for n, solver in SOLVERS.items() if solver.forgets and n != "rmsprop-centered"])
def test_a_warm_started_path_equals_cold_starts(solver) -> None:
    """One optimizer, its group's l1 lowered from phase to phase and raised again at the end, its state kept."""
    problem = diabetes()
    down = [share * problem.l1_max for share in (0.8, 0.4, 0.2, 0.1, 0.03)]
    cold = minimise(problem, [(l1, 0.0) for l1 in down], SOLVERS[solver])
    walk = [*range(len(down)), 1]
    descent = Descent(problem, [(down[0], 0.0)], SOLVERS[solver])
    for phase in walk:
        descent.optimizer.param_groups[0]["l1"] = down[phase]
        warm = descent.run()[0]
        at_most(1e-8, np.abs(warm - cold[phase]).max(), "warm starts beside cold ones: coefficients")
        np.testing.assert_array_equal(warm != 0, cold[phase] != 0)
    assert len({int((w != 0).sum()) for w in cold}) == len(cold)
