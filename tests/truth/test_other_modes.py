"""Proves what is not the elastic net: decoupled decay, decoupled L1, subgradients, a prox in the wrong metric.

So that nobody merges the modes by mistake, and to show that the comparison with scikit-learn tells them apart.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    TWINS,
    FusedRegAdagrad,
    FusedRegAdam,
    FusedRegRMSprop,
    variant_of,
)
from solvers import (
    SOLVERS,
    Solver,
    diabetes,
    minimise,
    prox_without_eps,
    prox_without_gain,
    scikit_learns,
    violations,
)

from fusedreg.backends import reference

LASSO = [(5.0, 0.0), (1.0, 0.0)]
ELASTIC_NET = [(5.0, 0.3), (1.0, 0.1)]


def distances(fit: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.abs(fit - truth).max(1)


def test_decoupled_decay_is_not_the_elastic_net() -> None:
    """AdamW's decay acts outside the metric: neither the elastic net of that l2, nor the Lasso without it."""
    fit = np.concatenate(
        [
            minimise(diabetes(), [(l1, 0.0)], SOLVERS["adamw-no-decay"], weight_decay=weight_decay)
            for l1, weight_decay in ELASTIC_NET
        ]
    )
    assert (distances(fit, scikit_learns(diabetes(), ELASTIC_NET)) > 1).all()
    assert (distances(fit, scikit_learns(diabetes(), LASSO)) > 1).all()


@pytest.mark.parametrize("solver", ["adam", "amsgrad", "momentum", "nesterov", "rmsprop-momentum", "adagrad"])
def test_coupled_decay_is_the_elastic_net(solver) -> None:
    """The contrast: decay through the gradient, as every twin but AdamW has it, is an l2 beside the l1."""
    strengths = ELASTIC_NET[:1]
    fit = minimise(diabetes(), [(5.0, 0.0)], SOLVERS[solver], weight_decay=0.3)
    np.testing.assert_allclose(fit, scikit_learns(diabetes(), strengths), rtol=0, atol=1e-8)
    assert violations(diabetes(), fit, strengths).max() < 1e-8


@pytest.mark.parametrize(
    "solver", ["adam", "amsgrad", "adamw-no-decay", "momentum", "nesterov", "rmsprop-momentum", "adagrad"]
)
def test_decoupled_l1_is_not_the_lasso(solver) -> None:
    """A shrink by lr, whatever the metric or the momentum's gain."""
    strengths = [*LASSO, (0.5, 0.0)]
    fit = minimise(diabetes(), strengths, SOLVERS[solver], penalty_mode="decoupled")
    assert (distances(fit, scikit_learns(diabetes(), strengths)) > 1).all()


def test_decoupled_l1_is_scale_free() -> None:
    """It is measured against Adam's normalised step, which is at most about lr: zeros below 1, nothing left above."""
    below, above = minimise(diabetes(), [(0.9, 0.0), (1.1, 0.0)], SOLVERS["adam"], penalty_mode="decoupled")
    truth = scikit_learns(diabetes(), [(0.9, 0.0), (1.1, 0.0)])
    assert 0 < (below == 0).sum() < 5
    assert (above == 0).all()
    assert ((truth != 0).sum(1) >= 7).all()


def test_decoupled_l1_is_the_lasso_for_plain_sgd() -> None:
    """Its metric is lr alone, so there the two modes are one."""
    fit = minimise(diabetes(), LASSO, SOLVERS["sgd"], penalty_mode="decoupled")
    np.testing.assert_allclose(fit, scikit_learns(diabetes(), LASSO), rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_subgradients_give_no_zero(solver) -> None:
    strengths = [*LASSO, (0.9 * diabetes().l1_max, 0.0)]
    truth = scikit_learns(diabetes(), strengths)
    assert (truth == 0).sum() > 10
    fit = minimise(diabetes(), strengths, SOLVERS[solver], penalty_mode="subgradient", start=np.full((3, 9), 0.1))
    assert (fit != 0).all()


def test_subgradients_still_come_near_the_lasso() -> None:
    """What they miss is the zeros: Adam's lr ends at 1e-3, and so close do the weights come."""
    fit = minimise(diabetes(), LASSO, SOLVERS["adam"], penalty_mode="subgradient")
    assert (distances(fit, scikit_learns(diabetes(), LASSO)) < 0.05).all()


@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
def test_subgradient_mode_is_the_tutorials_loop(cls, variant, backend) -> None:
    """loss += l1 * sum |w| + l2 / 2 * sum w^2, then torch's optimizer: the same weights step by step."""
    options = {"lr": 0.05, **variant_of(cls, variant)}
    # maximize turns the loss around, and what is added to it as well; a penalty of ours stays one.
    sign = -1 if options.get("maximize") else 1
    X, y = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    start = torch.randn(8, dtype=torch.float64)
    w, v = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = cls([w], **options, l1=0.1, l2=0.2, penalty_mode="subgradient", backend=backend)
    tutorials = TWINS[cls]([v], **options)
    for _ in range(50):
        optimizer.zero_grad()
        (sign * (X @ w - y).square().mean()).backward()
        optimizer.step()
        tutorials.zero_grad()
        (sign * ((X @ v - y).square().mean() + 0.1 * v.abs().sum() + 0.1 * v.square().sum())).backward()
        tutorials.step()
        torch.testing.assert_close(w, v, rtol=1e-11, atol=1e-12)


# At (5, 0) alone RMSprop is there soon, without an lr that falls, where its metric settles soon.
GAINS = {
    **{name: SOLVERS[name] for name in ("momentum", "nesterov", "dampening")},
    "rmsprop-momentum": Solver(FusedRegRMSprop, {"lr": 2.0, "momentum": 0.9, "alpha": 0.9}, 1000),
}


@pytest.mark.parametrize("solver", GAINS)
def test_without_the_momentums_gain_it_is_not_the_lasso(solver, monkeypatch) -> None:
    some = {"steps": 500, "backend": "reference"}
    truth = scikit_learns(diabetes(), LASSO[:1])
    assert distances(minimise(diabetes(), LASSO[:1], GAINS[solver], **some), truth) < 1e-8
    monkeypatch.setattr(reference, "prox", prox_without_gain)
    assert distances(minimise(diabetes(), LASSO[:1], GAINS[solver], **some), truth) > 1


LARGE_EPS = {
    "adam": Solver(FusedRegAdam, {"lr": 1.0, "eps": 5.0}, 1500, lr_decay=True),
    "rmsprop-momentum": Solver(FusedRegRMSprop, {"lr": 2.0, "momentum": 0.9, "eps": 5.0}, 2500),
    "rmsprop-centered": Solver(FusedRegRMSprop, {"lr": 2.0, "centered": True, "eps": 5.0}, 1500),
    "adagrad": Solver(FusedRegAdagrad, {"lr": 30.0, "eps": 50.0}, 1500),
}


@pytest.mark.parametrize("solver", LARGE_EPS)
def test_a_metric_without_eps_is_not_the_lasso(solver, monkeypatch) -> None:
    """The prox's d is the step's, eps included; without it the penalty weighs too much where eps counts."""
    truth = scikit_learns(diabetes(), LASSO[:1])
    assert distances(minimise(diabetes(), LASSO[:1], LARGE_EPS[solver], backend="reference"), truth) < 1e-8
    monkeypatch.setattr(reference, "prox", prox_without_eps)
    assert distances(minimise(diabetes(), LASSO[:1], LARGE_EPS[solver], backend="reference"), truth) > 1
