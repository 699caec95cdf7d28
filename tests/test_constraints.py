"""Constraints are met after every step, in every mode and dtype; what they do not touch moves as without them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_cpp
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    FusedRegAdam,
    assert_same_bits,
    known,
    make_params,
    regularized,
    run,
    set_grads,
    variant_of,
)

from fusedreg.penalties import PENALTY_MODES

every_optimizer = pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
every_mode = pytest.mark.parametrize("mode", PENALTY_MODES)


def with_zeros(dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    """Parameters in which every third weight is a zero, and where those are."""
    params = make_params(((40, 25), (130,)), dtype)
    zeros = []
    for param in params:
        is_zero = torch.arange(param.numel()).reshape(param.shape) % 3 == 0
        param.data[is_zero] = 0.0
        param.data.view(-1)[3] = -0.0
        zeros.append(is_zero)
    return params, zeros


@every_optimizer
@every_mode
@every_dtype
def test_frozen_zeros_stay_zero(cls, flags, mode, dtype, backend) -> None:
    params, zeros = with_zeros(dtype)
    options = {**regularized(cls, flags), "penalty_mode": mode}
    optimizer = cls(params, backend=backend, freeze_zeros=True, **options)
    run(optimizer, params, 3)
    for param, is_zero in zip(params, zeros, strict=True):
        assert (param[is_zero] == 0).all()
        assert (param[~is_zero] != 0).float().mean() > 0.5  # l1 takes some more
        for name in set(optimizer.spec.needed_states(optimizer.param_groups[0])) - {"ax", "prev", "held_back"}:
            assert (optimizer.state[param][name][is_zero] != 0).all()  # the state moves on


@every_optimizer
@every_mode
@pytest.mark.parametrize("penalties", [{}, {"l1": 0.05, "l2": 0.07}], ids=["none", "l1+l2"])
def test_what_is_not_zero_moves_as_without_freezing(cls, flags, mode, penalties, backend) -> None:
    """But for roundings of the weight and of its step: frozen zeros have kernels of their own, with their own FMAs."""
    results = []
    for freezes in (False, True):
        params, zeros = with_zeros(torch.float32)
        before = [param.detach()[~is_zero].clone() for param, is_zero in zip(params, zeros, strict=True)]
        options = {"lr": 0.02, **penalties, **variant_of(cls, flags), "penalty_mode": mode}
        run(cls(params, backend=backend, freeze_zeros=freezes, **options), params, 1)
        results.append([param.detach()[~is_zero] for param, is_zero in zip(params, zeros, strict=True)])
    for w, ours, truth in zip(before, *results, strict=True):
        assert ((ours - truth).abs() <= 2e-7 * (w.abs() + (truth - w).abs())).all()


def test_what_a_prox_has_zeroed_is_frozen(backend) -> None:
    params = make_params(((40, 25),))
    optimizer = FusedRegAdam(params, lr=0.05, l1=3.0, freeze_zeros=True, backend=backend)
    run(optimizer, params, 2)
    (param,) = params
    was_zero = param.detach() == 0
    assert 10 < was_zero.sum() < 990
    optimizer.param_groups[0]["l1"] = 0.0
    run(optimizer, params, 5)
    assert (param.detach() == 0).equal(was_zero)
    optimizer.param_groups[0]["freeze_zeros"] = False
    run(optimizer, params, 1)
    assert (param.detach() != 0).all()


@every_optimizer
@every_mode
def test_a_nan_gradient_of_a_frozen_zero_is_seen(cls, flags, mode, backend) -> None:
    params, (is_zero, _) = with_zeros(torch.float32)
    options = {**regularized(cls, flags), "penalty_mode": mode, "max_grad_norm": None, "clip_value": None}
    optimizer = cls(params, backend=backend, freeze_zeros=True, **options)
    set_grads(params, 1)
    params[0].grad[0, 0], params[0].grad[0, 3] = math.nan, math.inf
    optimizer.step()
    assert is_zero[0, 0]
    assert is_zero[0, 3]
    assert params[0][0, 0].isnan()


def test_freezing_may_be_switched_between_steps(backend) -> None:
    """As SparsitySchedule does: the same weights as an optimizer that never froze, where nothing was zero."""
    results = []
    for switches in (False, True):
        params = make_params()
        optimizer = FusedRegAdam(params, lr=0.1, backend=backend)
        for i in range(6):
            optimizer.param_groups[0]["freeze_zeros"] = switches and i % 2 == 1
            set_grads(params, i)
            optimizer.step()
        results.append([param.detach() for param in params])
    assert_same_bits(*results)


FURTHER = {
    "alone": {},
    "box": {"lower": -0.5, "upper": 0.4},
    "l0": {"l0": 0.02},
    "freeze_zeros": {"freeze_zeros": True},
    "mcp_gamma": {"mcp_gamma": 3.0},
    "box, l0, freeze_zeros": {"lower": -0.5, "upper": 0.4, "l0": 0.02, "freeze_zeros": True},
}


@needs_cpp
@every_optimizer
@pytest.mark.parametrize("clip", [{}, {"weight_decay": 0.1, "max_grad_norm": 1.0}], ids=["plain", "decay-clip"])
@pytest.mark.parametrize("l2", [0.0, 0.07])
@pytest.mark.parametrize("further", FURTHER)
def test_each_stage_behind_l1_with_and_without_l2(cls, flags, further, l2, clip) -> None:
    """A C++ kernel has a loop for each. Gradients from nothing to large, so that the prox's floor acts on some."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(7, 37, generator=generator, dtype=torch.float64)
    weights[0, ::3] = 0.0
    scales = 10.0 ** torch.randint(-12, 1, weights.shape, generator=generator)
    gradients = [torch.randn(weights.shape, generator=generator, dtype=torch.float64) * scales for _ in range(3)]
    options = {**known(cls, lr=0.1, l1=0.05, l2=l2, **clip), **FURTHER[further], **variant_of(cls, flags)}
    results = []
    for backend in ("cpp", "reference"):
        param = torch.nn.Parameter(weights.clone())
        optimizer = cls([param], backend=backend, **options)
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
        results.append(param.detach())
    # Some hundred operations in double precision.
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
