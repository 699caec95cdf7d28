"""regularize_min_ndim=2 in one group is what two groups are, the second of which regularizes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg import FusedRegAdam, FusedRegAdamW, FusedRegOptimizer, FusedRegSGD
from fusedreg.parity import regularized
from fusedreg.penalties import off
from fusedreg.rules.registry import OPTIMIZERS

every_rule = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))


def by_hand(model: nn.Module, least: int, **options: Any) -> list[dict[str, Any]]:
    large = [param for param in model.parameters() if param.ndim >= least]
    small = [param for param in model.parameters() if param.ndim < least]
    return [{"params": large, **options}, {"params": small, **options, **off()}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1 + step, 40).reshape(5, 2, 4)).square().mean().backward()
        optimizer.step()


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@every_rule
def test_one_group_is_as_two(cls: type[FusedRegOptimizer], backend: str) -> None:
    one, two, unspared = make_model(), make_model(), make_model()
    options = {**regularized(cls), "backend": backend}
    per_group = {key: value for key, value in options.items() if key != "backend"}
    ours = cls(one.parameters(), **options, regularize_min_ndim=2)
    theirs = cls(by_hand(two, 2, **per_group), backend=backend)
    train(one, ours)
    train(two, theirs)
    assert_same_bits(one, two)
    all_of_them = cls(unspared.parameters(), **options)
    train(unspared, all_of_them)
    assert not torch.equal(one[3].bias, unspared[3].bias)
    assert torch.equal(fusedreg.penalty(ours), fusedreg.penalty(theirs))
    if ours.grad_norm is not None:
        assert torch.equal(ours.grad_norm, theirs.grad_norm)

    # It is an option of a group: a state dict has it, and it may change between two steps.
    resumed = cls(one.parameters(), backend=backend)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert resumed.param_groups[0]["regularize_min_ndim"] == 2
    train(one, resumed)
    train(two, theirs)
    assert_same_bits(one, two)
    resumed.param_groups[0]["regularize_min_ndim"] = 3
    three = cls(by_hand(two, 3, **per_group), backend=backend)
    three.state.update(theirs.state)
    train(one, resumed)
    train(two, three)
    assert_same_bits(one, two)


@every_rule
def test_groups_that_a_framework_made(cls: type[FusedRegOptimizer]) -> None:
    """A group for decay and one without, whose parameters have the strengths of the constructor all the same."""
    model, same = make_model(), make_model()
    halves = [list(model.parameters())[:3], list(model.parameters())[3:]]
    optimizer = cls([{"params": half} for half in halves], l2=0.1, regularize_min_ndim=2)
    train(model, optimizer)
    train(same, cls(by_hand(same, 2, l2=0.1)))
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]


def test_a_checkpoint_of_torch_keeps_it() -> None:
    model = make_model()
    plain = torch.optim.Adam(model.parameters())
    train(model, plain)
    optimizer = FusedRegAdam(model.parameters(), l1=0.5, regularize_min_ndim=2)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["regularize_min_ndim"] == 2
    plain.load_state_dict(optimizer.state_dict())
    train(model, plain)


def test_target_sparsity_is_of_the_large_ones() -> None:
    model = make_model()
    optimizer = FusedRegSGD(model.named_parameters(), lr=1e-6, sparsity=0.5, regularize_min_ndim=2)
    schedule = fusedreg.SparsitySchedule(optimizer, total_steps=10, begin=0.0, end=0.5, every=1)
    for _ in range(10):
        train(model, optimizer, steps=1)
        schedule.step()
    zeros = {name: int((param == 0).sum()) for name, param in model.named_parameters()}
    assert zeros["0.weight"] + zeros["3.weight"] == (12 + 18) // 2
    assert zeros["0.bias"] == zeros["1.weight"] == zeros["3.bias"] == 0


@pytest.mark.parametrize("bad", [-1, 1.5, "2", True])
def test_values_that_are_not_allowed(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid regularize_min_ndim value: .* \(allowed: a whole number >= 0\)"):
        FusedRegAdam(make_model().parameters(), regularize_min_ndim=bad)
    model = make_model()
    optimizer = FusedRegAdam(model.parameters(), l1=0.1)
    train(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["regularize_min_ndim"] = bad
    with pytest.raises(ValueError, match="Invalid regularize_min_ndim value"):
        optimizer.step()
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


def test_flat_parameters_are_refused_or_told() -> None:
    flat = nn.Parameter(torch.zeros(12))
    optimizer = FusedRegAdamW([flat], l1=0.1, regularize_min_ndim=2)
    flat.grad = torch.ones(12)
    with pytest.warns(UserWarning, match="acts on nothing: regularize_min_ndim=2 spares all parameters") as warned:
        optimizer.step()
    assert warned[0].filename == __file__
    optimizer.step()  # told once
    flat._fsdp_flattened = True  # as FullyShardedDataParallel marks its own
    with pytest.raises(ValueError, match="for parameters of FullyShardedDataParallel, which are flat"):
        FusedRegAdamW([flat], l1=0.1, regularize_min_ndim=2)


def test_an_error_names_the_group_that_there_is() -> None:
    model = nn.Sequential(nn.EmbeddingBag(4, 3, sparse=True), nn.Linear(3, 2))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters()}]
    optimizer = FusedRegAdam(groups, l1=0.1, regularize_min_ndim=3)
    model(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(RuntimeError, match="in param group 1 one of shape"), pytest.warns(match="acts on nothing"):
        optimizer.step()


def test_complex_biases_may_be_spared() -> None:
    params = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3, dtype=torch.complex64))]
    with pytest.raises(ValueError, match="complex"):
        FusedRegAdam(params, l1=0.1)
    optimizer = FusedRegAdam(params, l1=0.1, regularize_min_ndim=2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("least", [1, 3])
def test_it_follows_a_parameter_that_gets_other_dimensions(least, backend: str) -> None:
    """Between two steps, in the same tensor and group; and another bound in the group."""
    param, other = (nn.Parameter(torch.ones(6)) for _ in range(2))
    matrix = nn.Parameter(torch.ones(2, 2, 2))
    optimizer = FusedRegSGD([param, other, matrix], lr=0.1, l1=1.0, regularize_min_ndim=2, backend=backend)

    def step() -> None:
        for each in (param, other, matrix):
            each.grad = torch.zeros_like(each)
        optimizer.step()

    step()
    step()
    assert torch.equal(param, torch.ones(6))
    param.data = torch.ones(2, 3)
    step()
    assert torch.equal(param, torch.full((2, 3), 0.9))
    assert torch.equal(other, torch.ones(6))
    optimizer.param_groups[0]["regularize_min_ndim"] = least
    step()
    torch.testing.assert_close(param, torch.full((2, 3), 0.8 if least == 1 else 0.9))
    assert torch.equal(other, torch.full((6,), 0.9 if least == 1 else 1.0))
