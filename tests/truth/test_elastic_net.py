"""Proves that a full-batch descent ends at scikit-learn's Lasso, ElasticNet and Ridge: coefficients, zeros, optimality.

Data: diabetes, standardised. Every solver minimises under ten strengths at once, from where all but a coefficient or
two are zero to where hardly any is.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from figures import at_most
from helpers import OPTIMIZERS, TWINS, FusedRegASGD, FusedRegRMSprop
from solvers import SOLVERS, Descent, Solver, Strength, diabetes, minimise, scikit_learns, violations

FAMILIES = ("lasso", "elastic-net", "ridge")
# Those that are there soon. RMSprop with an lr that does not fall as far as weaker strengths need it, and a variance
# that settles sooner.
CENTERED = SOLVERS["rmsprop-centered-momentum"].options
ON_EACH_BACKEND = {
    **{name: SOLVERS[name] for name in ("amsgrad", "momentum", "adagrad")},
    "rmsprop-centered-momentum": Solver(FusedRegRMSprop, CENTERED, 2500, falls_to=0.3),
}


@cache
def strengths_of(family: str, weakest: float = 3e-3) -> list[Strength]:
    """Ten strengths, from 0.9 of the one that leaves no coefficient down to `weakest` of it; ridge: 10 to `weakest`."""
    l1_max = diabetes().l1_max
    strongest_first = np.geomspace(0.9, weakest, 10)
    if family == "lasso":
        return [(s * l1_max, 0.0) for s in strongest_first]
    if family == "elastic-net":
        return [(0.7 * s * l1_max, 0.3 * s) for s in strongest_first]
    return [(0.0, s) for s in np.geomspace(10, weakest, 10)]


@cache
def truth_of(family: str, weakest: float = 3e-3) -> np.ndarray:
    return scikit_learns(diabetes(), strengths_of(family, weakest))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=SOLVERS)
def solver(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def fit(family, solver) -> np.ndarray:
    return minimise(diabetes(), strengths_of(family), SOLVERS[solver])


def test_the_strengths_are_worth_testing() -> None:
    """The supports grow from at most two coefficients to almost all, and differ along the way."""
    for family in ("lasso", "elastic-net"):
        sizes = (truth_of(family) != 0).sum(1)
        assert 0 < sizes[0] <= 2
        assert sizes[-1] >= 8
        assert len(set(sizes)) >= 6


def test_every_rule_that_can_be_exact_has_a_solver() -> None:
    solved = {solver.cls.spec.name for solver in SOLVERS.values()}
    for cls in OPTIMIZERS:
        rule = cls.spec.name
        assert rule in solved or "proximal" not in cls.spec.modes, (
            f"the rule {rule!r} says that it can be exact, and nothing proves it: give it a line in SOLVERS, in "
            "tests/truth/solvers.py, or take 'proximal' out of its spec's modes"
        )


def test_coefficients_are_scikit_learns(fit, family) -> None:
    at_most(1e-8, np.abs(fit - truth_of(family)).max(), f"{family}: coefficients beside scikit-learn's")


def test_support_is_scikit_learns(fit, family) -> None:
    np.testing.assert_array_equal(fit != 0, truth_of(family) != 0)
    assert not np.signbit(fit[fit == 0]).any()


def test_optimality_conditions_hold(fit, family) -> None:
    """Optimality itself, not agreement with another implementation."""
    worst = violations(diabetes(), fit, strengths_of(family)).max()
    at_most(1e-8, worst, f"{family}: optimality conditions")


def test_asgds_lambd_adds_to_l2() -> None:
    """Its decay is that of a ridge; and the average of weights that no longer move is where they are."""
    lambd, strengths = 0.05, [(20.0, 0.0), (5.0, 0.1)]
    solver = Solver(FusedRegASGD, {"lr": 0.45, "lambd": lambd, "alpha": 0.3, "t0": 1500.0}, 3000)
    descent = Descent(diabetes(), strengths, solver)
    fit = descent.run()
    truth = scikit_learns(diabetes(), [(l1, l2 + lambd) for l1, l2 in strengths])
    np.testing.assert_allclose(fit, truth, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(fit != 0, truth != 0)
    for weights, param in zip(fit, descent.optimizer.state.values(), strict=True):
        assert param["mu"] < 1 / 1400
        np.testing.assert_allclose(param["ax"], weights, rtol=0, atol=1e-8)
        assert (param["ax"].numpy()[weights == 0] == 0).all()


@pytest.mark.parametrize("family", ["elastic-net"])
def test_float32(family, solver) -> None:
    """Weights and state in float32 end within 1e-5 of the largest coefficient on the path, with the same support.

    Where they stop: a step no longer moves a weight once tau * |gradient of the objective| is below half an ulp of the
    weight, 2^-24 |w|. There the weight is off by 2^-24 |w| / (tau * curvature): in the slowest case, plain SGD's lr of
    0.45 on the curvature 0.0086 + 0.02, by 5e-6 |w|. It is the same |w| for every strength, because what a step
    subtracts from one another, tau * gradient and tau * l1, does not get smaller where the coefficients do.
    """
    weakest = 2e-2
    truth = truth_of(family, weakest)
    fit = minimise(diabetes(), strengths_of(family, weakest), SOLVERS[solver], dtype=torch.float32)
    error = np.abs(fit - truth).max() / np.abs(truth).max()
    at_most(1e-5, error, f"{family}, float32: coefficients, relative to the largest")
    np.testing.assert_array_equal(fit != 0, truth != 0)


@pytest.mark.parametrize("solver", ON_EACH_BACKEND)
def test_on_each_backend(solver, backend) -> None:
    """The other tests run whatever "auto" takes. Here three of the strengths, on each backend by name."""
    some = slice(1, 6, 2)
    strengths = strengths_of("elastic-net")[some]
    steps = min(ON_EACH_BACKEND[solver].steps, 2500)
    fit = minimise(diabetes(), strengths, ON_EACH_BACKEND[solver], steps=steps, backend=backend)
    np.testing.assert_allclose(fit, truth_of("elastic-net")[some], rtol=0, atol=1e-8)
    np.testing.assert_array_equal(fit != 0, truth_of("elastic-net")[some] != 0)
    assert violations(diabetes(), fit, strengths).max() < 1e-8


# "sgd" has no state that a checkpoint could bring.
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "sgd"])
def test_from_a_torch_checkpoint(solver) -> None:
    """Steps of torch's twin first, then ours with its state. Nobody counted the gain of that momentum buffer."""
    some = slice(2, 6)
    descent = Descent(diabetes(), strengths_of("lasso")[some], SOLVERS[solver])
    params = [group["params"][0] for group in descent.optimizer.param_groups]
    twin = TWINS[SOLVERS[solver].cls]([{"params": [param]} for param in params], **SOLVERS[solver].options)
    for _ in range(300):
        descent.gradients.copy_(diabetes().gradient(descent.weights))
        twin.step()
    assert (descent.weights != 0).all()
    descent.optimizer.load_state_dict(twin.state_dict())
    fit = descent.run()
    np.testing.assert_allclose(fit, truth_of("lasso")[some], rtol=0, atol=1e-8)
    np.testing.assert_array_equal(fit != 0, truth_of("lasso")[some] != 0)
