"""What the tests of all frameworks share: a small model, data, and torch's twin beside ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fusedreg

# (ours, torch's twin, options of both)
TWINS = [
    pytest.param(fusedreg.FusedRegAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, id="AdamW"),
    pytest.param(fusedreg.FusedRegSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, id="SGD"),
]
every_twin = pytest.mark.parametrize(("ours", "theirs", "options"), TWINS)
# A strength for weights, in a framework that makes the groups.
SPARING: dict[str, Any] = {"l1": 0.05, "regularize_min_ndim": 2}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))


def make_data(rows: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 10, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Up to rounding, and both have moved from where they began."""
    start = [tensor for tensor in make_model().parameters()]
    theirs = list(other.parameters())
    for i, (a, b) in enumerate(zip(one.parameters(), theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        if len(start) == len(theirs) and start[i].shape == a.shape:
            assert not torch.equal(a, start[i])


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def zeros_of(model: nn.Module) -> dict[bool, int]:
    """How many parameters are exactly zero, among those of two dimensions (True) and among the others (False)."""
    zeros = {True: 0, False: 0}
    for param in model.parameters():
        zeros[param.ndim > 1] += int((param == 0).sum())
    return zeros


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)
