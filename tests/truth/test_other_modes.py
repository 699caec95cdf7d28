"""Proves what is not the elastic net: decoupled decay, decoupled L1, subgradients, a prox in the wrong metric.

So that nobody merges the modes by mistake, and to show that the comparison with scikit-learn tells them apart.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FusedRegAdam, FusedRegAdamW, FusedRegSGD
from solvers import SOLVERS, Solver, diabetes, minimise, prox_without_gain, scikit_learns, violations

from fusedreg import reference

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


@pytest.mark.parametrize("solver", ["adam", "amsgrad", "momentum", "nesterov"])
def test_coupled_decay_is_the_elastic_net(solver) -> None:
    """The contrast: decay through the gradient, as Adam's and SGD's twins have it, is an l2 beside the l1."""
    strengths = ELASTIC_NET[:1]
    fit = minimise(diabetes(), [(5.0, 0.0)], SOLVERS[solver], weight_decay=0.3)
    np.testing.assert_allclose(fit, scikit_learns(diabetes(), strengths), rtol=0, atol=1e-8)
    assert violations(diabetes(), fit, strengths).max() < 1e-8


@pytest.mark.parametrize("solver", ["adam", "amsgrad", "adamw-no-decay", "momentum", "nesterov"])
def test_decoupled_l1_is_not_the_lasso(solver) -> None:
    """A shrink by lr, whatever the metric or the momentum's gain."""
    strengths = [*LASSO, (0.5, 0.0)]
    fit = minimise(diabetes(), strengths, SOLVERS[solver], l1_mode="decoupled")
    assert (distances(fit, scikit_learns(diabetes(), strengths)) > 1).all()


def test_decoupled_l1_is_scale_free() -> None:
    """It is measured against Adam's normalised step, which is at most about lr: zeros below 1, nothing left above."""
    below, above = minimise(diabetes(), [(0.9, 0.0), (1.1, 0.0)], SOLVERS["adam"], l1_mode="decoupled")
    truth = scikit_learns(diabetes(), [(0.9, 0.0), (1.1, 0.0)])
    assert 0 < (below == 0).sum() < 5
    assert (above == 0).all()
    assert ((truth != 0).sum(1) >= 7).all()


def test_decoupled_l1_is_the_lasso_for_plain_sgd() -> None:
    """Its metric is lr alone, so there the two modes are one."""
    fit = minimise(diabetes(), LASSO, SOLVERS["sgd"], l1_mode="decoupled")
    np.testing.assert_allclose(fit, scikit_learns(diabetes(), LASSO), rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_subgradients_give_no_zero(solver) -> None:
    strengths = [*LASSO, (0.9 * diabetes().l1_max, 0.0)]
    truth = scikit_learns(diabetes(), strengths)
    assert (truth == 0).sum() > 10
    fit = minimise(diabetes(), strengths, SOLVERS[solver], l1_mode="subgradient", start=np.full((3, 10), 0.1))
    assert (fit != 0).all()


def test_subgradients_still_come_near_the_lasso() -> None:
    """What they miss is the zeros: Adam's lr ends at 1e-3, and so close do the weights come."""
    fit = minimise(diabetes(), LASSO, SOLVERS["adam"], l1_mode="subgradient")
    assert (distances(fit, scikit_learns(diabetes(), LASSO)) < 0.05).all()


TWINS = {
    "adam": (FusedRegAdam, torch.optim.Adam, {"lr": 0.05}),
    "adamw": (FusedRegAdamW, torch.optim.AdamW, {"lr": 0.05}),
    "momentum": (FusedRegSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}


@pytest.mark.parametrize("twin", TWINS)
def test_subgradient_mode_is_the_tutorials_loop(twin, backend) -> None:
    """loss += l1 * sum |w| + l2 / 2 * sum w^2, then torch's optimizer: the same weights step by step."""
    ours, theirs, options = TWINS[twin]
    X, y = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    start = torch.randn(8, dtype=torch.float64)
    w, v = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = ours([w], **options, l1=0.1, l2=0.2, l1_mode="subgradient", backend=backend)
    tutorials = theirs([v], **options)
    for _ in range(50):
        optimizer.zero_grad()
        (X @ w - y).square().mean().backward()
        optimizer.step()
        tutorials.zero_grad()
        ((X @ v - y).square().mean() + 0.1 * v.abs().sum() + 0.1 * v.square().sum()).backward()
        tutorials.step()
        torch.testing.assert_close(w, v, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("solver", ["momentum", "nesterov", "dampening"])
def test_without_the_momentums_gain_it_is_not_the_lasso(solver, monkeypatch) -> None:
    some = {"steps": 1000, "backend": "reference"}
    truth = scikit_learns(diabetes(), LASSO[:1])
    assert distances(minimise(diabetes(), LASSO[:1], SOLVERS[solver], **some), truth) < 1e-8
    monkeypatch.setattr(reference, "prox", prox_without_gain)
    assert distances(minimise(diabetes(), LASSO[:1], SOLVERS[solver], **some), truth) > 1


def test_a_metric_without_eps_is_not_the_lasso(monkeypatch) -> None:
    """The prox's d is the step's, eps included; without it the penalty weighs too much where eps counts."""
    solver = Solver(FusedRegAdam, {"lr": 1.0, "eps": 5.0}, 3000, lr_decay=True)
    truth = scikit_learns(diabetes(), LASSO[:1])
    assert distances(minimise(diabetes(), LASSO[:1], solver, backend="reference"), truth) < 1e-8
    right = reference.prox

    def without_eps(z, w_old, step, group):
        return right(z, w_old, step._replace(metric=step.metric - group["eps"]), group)

    monkeypatch.setattr(reference, "prox", without_eps)
    assert distances(minimise(diabetes(), LASSO[:1], solver, backend="reference"), truth) > 1
