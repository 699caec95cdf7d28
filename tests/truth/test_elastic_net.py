"""Truth from outside: scikit-learn's Lasso and ElasticNet, the optimality conditions, and a prox minimised by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FusedRegAdam, FusedRegAdamW, FusedRegSGD
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet

from fusedreg import reference

N_STEPS = 6000


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return X, y - y.mean()


def fit(make_optimizer, X, y, lr_decay: bool):
    """Full-batch minimisation of 1 / (2n) * |y - Xw|^2 + penalty."""
    gram, correlation = torch.from_numpy(X.T @ X / len(y)), torch.from_numpy(X.T @ y / len(y))
    w = torch.nn.Parameter(torch.zeros(X.shape[1], dtype=torch.float64))
    optimizer = make_optimizer([w])
    lr = optimizer.param_groups[0]["lr"]
    for i in range(N_STEPS):
        if lr_decay:  # Adam's normalised steps end where its lr does
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * i / N_STEPS)) + 1e-3
        w.grad = gram @ w.detach() - correlation
        optimizer.step()
    return w.detach().numpy(), (gram @ w.detach() - correlation).numpy()


SOLVERS = {
    "adam": (lambda p, **k: FusedRegAdam(p, lr=1.0, **k), True),
    "amsgrad": (lambda p, **k: FusedRegAdam(p, lr=1.0, amsgrad=True, **k), True),
    "adamw-no-decay": (lambda p, **k: FusedRegAdamW(p, lr=1.0, weight_decay=0.0, **k), True),
    "sgd": (lambda p, **k: FusedRegSGD(p, lr=0.2, **k), False),
    "momentum": (lambda p, **k: FusedRegSGD(p, lr=0.1, momentum=0.9, **k), False),
    "dampening": (lambda p, **k: FusedRegSGD(p, lr=0.2, momentum=0.9, dampening=0.5, **k), False),
    "nesterov": (lambda p, **k: FusedRegSGD(p, lr=0.05, momentum=0.9, nesterov=True, **k), False),
}


@pytest.mark.parametrize(("l1", "l2"), [(1.0, 0.0), (20.0, 0.0), (5.0, 0.3)], ids=["lasso-1", "lasso-20", "elastic"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_lasso_and_elastic_net(solver, l1, l2, diabetes) -> None:
    make, lr_decay = SOLVERS[solver]
    X, y = diabetes
    w, gradient = fit(lambda p: make(p, l1=l1, l2=l2), X, y, lr_decay)
    net = ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), fit_intercept=False, tol=1e-15, max_iter=1_000_000)
    truth = net.fit(X, y).coef_
    assert 0 < (truth == 0).sum() < len(truth)
    assert ((w == 0) == (truth == 0)).all()
    np.testing.assert_allclose(w, truth, rtol=0, atol=1e-8)
    # optimality itself: gradient + l2 w = -l1 sign(w) on the support, |gradient| <= l1 off it
    on = w != 0
    np.testing.assert_allclose((gradient + l2 * w)[on], -l1 * np.sign(w[on]), rtol=0, atol=1e-8)
    assert (np.abs(gradient[~on]) <= l1 + 1e-8).all()


def test_lasso_on_each_backend(backend, diabetes, monkeypatch) -> None:
    monkeypatch.setattr("test_elastic_net.N_STEPS", 3000)
    X, y = diabetes
    w, _ = fit(lambda p: FusedRegSGD(p, lr=0.1, momentum=0.9, l1=5.0, backend=backend), X, y, False)
    truth = ElasticNet(alpha=5.0, l1_ratio=1.0, fit_intercept=False, tol=1e-15, max_iter=1_000_000).fit(X, y).coef_
    np.testing.assert_allclose(w, truth, rtol=0, atol=1e-8)
    assert ((w == 0) == (truth == 0)).all()


def test_the_other_modes_are_not_the_lasso(diabetes) -> None:
    """So that nobody merges the modes by mistake."""
    X, y = diabetes
    truth = ElasticNet(alpha=5.0, l1_ratio=1.0, fit_intercept=False, tol=1e-15, max_iter=1_000_000).fit(X, y).coef_
    decoupled, _ = fit(lambda p: FusedRegAdam(p, lr=1.0, l1=5.0, l1_mode="decoupled"), X, y, True)
    assert np.abs(decoupled - truth).max() > 1
    subgradient, _ = fit(lambda p: FusedRegAdam(p, lr=1.0, l1=5.0, l1_mode="subgradient"), X, y, True)
    assert (subgradient != 0).all()
    decayed, _ = fit(lambda p: FusedRegAdamW(p, lr=1.0, l1=5.0, weight_decay=0.3), X, y, True)
    net = ElasticNet(alpha=5.3, l1_ratio=5.0 / 5.3, fit_intercept=False, tol=1e-15, max_iter=1_000_000).fit(X, y).coef_
    assert np.abs(decayed - net).max() > 1


def test_the_reference_prox_minimises_its_defining_problem() -> None:
    """d / (2 lr) (x - z)^2 + l1 |x| + l2 / 2 x^2 over a fine grid, without the safeguard's floor."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(200):
        z, w_old = (torch.randn((), generator=generator, dtype=torch.float64) for _ in range(2))
        l1, l2 = torch.rand(2, generator=generator).double().tolist()
        d = 10 ** (torch.rand((), generator=generator).double() * 4)
        d = torch.maximum(d, (l1 + l2 * w_old.abs()) / 2)
        group = {"lr": 0.7, "l1": l1, "l2": l2, "l1_mode": "proximal"}
        step = reference.Step(z, {}, 0, metric=d, tau=0.7)
        x = reference.prox(z, w_old, step, group)
        grid = torch.cat([torch.linspace(-1.5, 1.5, 4001, dtype=torch.float64) * z.abs(), x[None], torch.zeros(1)])
        objective = d / (2 * 0.7) * (grid - z) ** 2 + l1 * grid.abs() + l2 / 2 * grid**2
        value = d / (2 * 0.7) * (x - z) ** 2 + l1 * x.abs() + l2 / 2 * x**2
        assert value <= objective.min() * (1 + 1e-14) + 1e-15


@pytest.mark.parametrize("mode_is_ours", [True, False], ids=["step-by-step", "no-zeros"])
def test_subgradient_mode_is_the_tutorials_loop(mode_is_ours) -> None:
    """loss += l1 * sum |w| + l2 / 2 * sum w^2, then SGD: the same weights step by step."""
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        w = torch.nn.Parameter(torch.randn(8, dtype=torch.float64))
        X, y = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
        penalties = {"l1": 0.1, "l2": 0.2, "l1_mode": "subgradient"} if ours else {}
        optimizer = (FusedRegSGD if ours else torch.optim.SGD)([w], lr=0.05, momentum=0.9, **penalties)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (X @ w - y).square().mean()
            if not ours:
                loss = loss + 0.1 * w.abs().sum() + 0.1 * w.square().sum()
            loss.backward()
            optimizer.step()
        results.append(w.detach())
    if mode_is_ours:
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
    else:
        assert (results[0] != 0).all()
