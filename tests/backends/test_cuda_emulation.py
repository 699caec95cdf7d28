"""The CUDA backend without a GPU: its tables, slots, launches and maths, run by a host that plays device.

What this does not show is what only a device has: barriers, the reductions over a block, streams and graphs.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from cuda_emulation import EmulatedCudaBackend
from helpers import (
    IDS,
    OPTIMIZER_FLAGS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    flags_of,
    make_params,
    run,
    set_grads,
    snapshot,
)

from fusedreg import backends
from fusedreg.parity import TOLERANCE_IN_EPS, Case, cases, error_in_eps

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(params=[True, False], ids=["clocks-on-host", "clocks-on-device"])
def emulated(request, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedCudaBackend(host_clocks=request.param))


@pytest.fixture
def device_clocks(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedCudaBackend(host_clocks=False))


@pytest.mark.parametrize("case", list(cases("cuda")), ids=str)
def test_one_step(case: Case, emulated) -> None:
    assert error_in_eps(case) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.parametrize("numel", [16383, 16384, 16385, 3 * 16384 + 5])
@pytest.mark.parametrize("offset", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE_IN_EPS, ids=str)
def test_chunks_tails_and_misalignment(numel, offset, dtype, emulated) -> None:
    """Against the reference, with sentinels around the views."""
    results = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(numel)
        buffer = torch.full((numel + 40,), 123.0, dtype=dtype)
        param = buffer[offset : offset + numel].normal_().requires_grad_()
        # No norm clip: gradients so small that a decay cancels them make a first step of Adam a matter of rounding.
        optimizer = FusedRegAdam([param], backend=backend, **{**REGULARIZED, "max_grad_norm": math.inf})
        gradient = torch.rand(numel + 8, dtype=torch.float64) + 0.5
        param.grad = gradient.mul(torch.randn(numel + 8).sign()).to(dtype)[8 - offset :][:numel]
        optimizer.step()
        assert (buffer.detach()[:offset] == 123.0).all()
        assert (buffer.detach()[offset + numel :] == 123.0).all()
        results.append(param.detach().double())
    unit = torch.finfo(dtype).eps * results[1].abs().max()
    # Two results of half precision, each rounded once, may be neighbours.
    assert (results[0] - results[1]).abs().max() <= max(TOLERANCE_IN_EPS[dtype], 1.0) * unit


def test_more_slots_than_a_launch_holds(emulated) -> None:
    """A group for every parameter, and parameters at their own steps."""
    results = []
    for backend in ("cuda", "reference"):
        params = make_params([(5, 3)] * 70, torch.float64)
        groups = [{"params": [p], "lr": 0.01 + 0.001 * i, "l1": 0.002 * (i % 3)} for i, p in enumerate(params)]
        optimizer = FusedRegAdam(groups, backend=backend, l2=0.1, weight_decay=0.1, max_grad_norm=3.0)
        for step in range(4):
            set_grads(params, step)
            for i, param in enumerate(params):
                if i % 4 == step:
                    param.grad = None
            optimizer.step()
        results.append(([p.detach() for p in params], [optimizer.state[p]["step"] for p in params]))
    for ours, truth in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
    assert results[0][1] == results[1][1]


def test_dtypes_side_by_side(emulated) -> None:
    results = []
    for backend in ("cuda", "reference"):
        params = [p for i, dtype in enumerate(TOLERANCE_IN_EPS) for p in make_params(((19, 3), (5,)), dtype, i)]
        optimizer = FusedRegAdam(params[::2] + params[1::2], backend=backend, **REGULARIZED)
        run(optimizer, params, 3)
        results.append(([p.detach() for p in params], optimizer.grad_norm))
    for ours, truth in zip(*(result[0] for result in results), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, truth, rtol=4 * max(eps, 1e-7), atol=4 * max(eps, 1e-7))
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_FLAGS, ids=IDS)
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, math.nan])
def test_amp_on_the_device(cls, flags, found_inf, device_clocks, monkeypatch) -> None:
    """Scale and found_inf are read by the kernels, and a skipped step moves no clock."""
    monkeypatch.setattr("fusedreg.optimizer.on_gpu", lambda value: isinstance(value, torch.Tensor))
    results = []
    for backend in ("cuda", "cpp"):
        params = make_params(dtype=torch.float64)
        optimizer = cls(params, backend=backend, **{**REGULARIZED, **flags_of(cls, flags)})
        run(optimizer, params, 2)
        before = snapshot(optimizer)
        set_grads(params, 50)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        optimizer.step()
        if found_inf != 0:
            assert_same_bits(before, snapshot(optimizer))
        del optimizer.grad_scale, optimizer.found_inf
        run(optimizer, params, 2)
        results.append(snapshot(optimizer))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_hyperparameters_on_the_device(cls, device_clocks, monkeypatch) -> None:
    """As a CUDA graph needs it: moved in place between steps, read by the kernels."""
    everything_on_device = lambda value: isinstance(value, torch.Tensor)  # noqa: E731
    for module in ("optimizer", "groups"):
        monkeypatch.setattr(f"fusedreg.{module}.on_gpu", everything_on_device)
    values = {"lr": 0.05, "l1": 0.03, "l2": 0.2, "weight_decay": 0.1, "clip_value": 0.8, "max_grad_norm": 2.0}
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    params, own = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    ours = cls([{"params": params[:2]}, {"params": params[2:], "l2": 0.0}], backend="cuda", **tensors)
    theirs = cls([{"params": own[:2]}, {"params": own[2:], "l2": 0.0}], backend="reference", **values)
    for i in range(5):
        run(ours, params, 1, first_seed=i)
        run(theirs, own, 1, first_seed=i)
        for key, tensor in tensors.items():
            tensor.mul_(0.7)
            for group in theirs.param_groups:
                if key in group and not (key == "l2" and group is theirs.param_groups[1]):
                    group[key] = tensor.item()
        torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=1e-12, atol=0)
    for a, b in zip(params, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_empty_parameters_alone_move_their_clocks(emulated) -> None:
    param = torch.nn.Parameter(torch.empty(0, 3))
    param.grad = torch.empty(0, 3)
    optimizer = FusedRegAdam([param], backend="cuda", max_grad_norm=1.0)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    assert optimizer.grad_norm == 0
