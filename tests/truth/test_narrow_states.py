"""What is lost where states are kept in bfloat16 or in 8 bits, or all of a model in bfloat16, and what stochastic
rounding keeps of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_cpp
from figures import at_most
from helpers import one_thread
from sklearn.datasets import load_digits
from solvers import SOLVERS, diabetes, minimise, scikit_learns, violations
from torch import nn

from fusedreg import FusedRegAdam

BF16 = torch.bfloat16


@needs_cpp
@pytest.mark.parametrize("solver", ["adam", "nadam"])
def test_the_lasso_s_support_from_narrow_states(solver) -> None:
    """Of scikit-learn, under all strengths, as in float32. To the nearest, the averages stall: what is left of
    the gradient is then as large as what the penalty pulls by, and weights stay where none should be."""
    problem = diabetes()
    strengths = [(factor * problem.l1_max, 0.0) for factor in np.geomspace(0.003, 0.9, 12)]
    truth = scikit_learns(problem, strengths)

    def fit(**options: Any) -> tuple[int, float]:
        """Supports that are right, and the largest violation of optimality, in units of l1."""
        found = minimise(problem, strengths, SOLVERS[solver], 3000, dtype=torch.float32, backend="cpp", **options)
        right = ((found != 0) == (truth != 0)).all(1).sum()
        return int(right), float((violations(problem, found, strengths) / [l1 for l1, _ in strengths]).max())

    assert fit()[0] == 12
    for state_dtype in (BF16, "int8"):
        for seed in range(2):
            right, violation = fit(state_dtype=state_dtype, stochastic_rounding=True, rounding_seed=seed)
            assert right == 12
            at_most(1e-2, violation, f"Lasso, states in {state_dtype}, stochastic rounding: optimality, in units of l1")
        right, violation = fit(state_dtype=state_dtype)
        assert right < 12
        assert violation > 0.03  # where the others are below 0.01


def digits(seed: int, dtype: torch.dtype, lr: float, **options: Any) -> float:
    """The accuracy on a third of the digits, in percent, of a small network that is trained on the others."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X / 16).to(dtype), torch.from_numpy(y)
    torch.manual_seed(seed)
    order = torch.randperm(len(y))
    train, test = order[600:], order[:600]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    optimizer = FusedRegAdam(model.parameters(), lr=lr, **options)
    for _ in range(20):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
    return float((model(X[test]).argmax(1) == y[test]).float().mean()) * 100


def test_digits_in_bfloat16() -> None:
    """Within noise of float32; and where the learning rate is small, what rounding to the nearest makes of it."""
    rounds, states = {"stochastic_rounding": True}, {"state_dtype": BF16}

    def mean(*args: Any, **options: Any) -> float:
        return float(np.mean([digits(seed, *args, **options) for seed in range(3)]))

    with one_thread():
        for lr in (1e-3, 1e-4):
            wide = mean(torch.float32, lr)
            codes: dict[str, Any] = {"state_dtype": "int8"}
            for dtype, options in [(torch.float32, states | rounds), (BF16, rounds), (torch.float32, codes | rounds)]:
                # 1800 answers: their mean is known to half a point
                at_most(1.5, abs(mean(dtype, lr, **options) - wide), "digits, narrow, stochastic rounding: points")
        assert mean(BF16, 1e-4) < wide - 30
