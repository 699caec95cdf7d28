"""What both GPU backends do, without a GPU: CUDA's kernels, emulated on the CPU; with ``make test-triton`` Triton's, in
its interpreter.

What one of them does alone is in test_cuda_emulation.py and test_triton.py, which also say what neither shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import EMULATED_CUDA, INTERPRETING, TARGETS
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    OPTIMIZERS,
    REGULARIZED,
    SHAPES,
    FusedRegAdam,
    FusedRegSGD,
    assert_a_norm_has_the_whole_range,
    assert_same_bits,
    known,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    variant_of,
)

from fusedreg import backends
from fusedreg.backends.device_plan import CHUNK, DevicePlan
from fusedreg.parity import TOLERANCE_IN_EPS

pytestmark = pytest.mark.parametrize("backend", TARGETS if INTERPRETING else [EMULATED_CUDA], indirect=True)

# A chunk takes the interpreter milliseconds: where cases are many, it has fewer variants or shapes.
PLAIN = [(cls, "plain") for cls in OPTIMIZERS]
AFFORDABLE_VARIANTS = PLAIN if INTERPRETING else OPTIMIZER_VARIANTS
AFFORDABLE_SHAPES = ((7, 13), ()) if INTERPRETING else SHAPES


@pytest.fixture(params=[True, False], ids=["scalars-on-host", "scalars-on-device"])
def both_scalars(request, backend, monkeypatch):
    """Scalar states on the host, and on the device, where they are without this."""
    its_class = type(backends.BACKENDS[backend])
    monkeypatch.setitem(backends.BACKENDS, backend, its_class(scalars_on_host=request.param))


@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("offset", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE_IN_EPS, ids=str)
def test_chunks_tails_and_misalignment(numel, offset, dtype, backend, both_scalars) -> None:
    """Against the reference, with sentinels around the views."""
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(numel)
        buffer = torch.full((numel + 40,), 123.0, dtype=dtype)
        param = buffer[offset : offset + numel].normal_().requires_grad_()
        # No norm clip: gradients so small that a decay cancels them make a first step of Adam a matter of rounding.
        optimizer = FusedRegAdam([param], backend=name, **{**REGULARIZED, "max_grad_norm": math.inf})
        gradient = torch.rand(numel + 8, dtype=torch.float64) + 0.5
        param.grad = gradient.mul(torch.randn(numel + 8).sign()).to(dtype)[8 - offset :][:numel]
        optimizer.step()
        assert (buffer.detach()[:offset] == 123.0).all()
        assert (buffer.detach()[offset + numel :] == 123.0).all()
        results.append((param.detach().double(), optimizer.grad_norm.double()))
    (ours, our_norm), (truth, norm) = results
    unit = torch.finfo(dtype).eps * truth.abs().max()
    # Two results of half precision, each rounded once, may be neighbours.
    assert (ours - truth).abs().max() <= max(TOLERANCE_IN_EPS[dtype], 1.0) * unit
    torch.testing.assert_close(our_norm, norm, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


def test_as_many_groups_as_parameters(backend, both_scalars, both_tables) -> None:
    """A group for every parameter, and parameters at their own steps."""
    results = []
    for name in (backend, "reference"):
        params = make_params([(5, 3)] * 70, torch.float64)
        groups = [{"params": [p], "lr": 0.01 + 0.001 * i, "l1": 0.002 * (i % 3)} for i, p in enumerate(params)]
        optimizer = FusedRegAdam(groups, backend=name, l2=0.1, weight_decay=0.1, max_grad_norm=3.0)
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


def test_dtypes_and_variants_side_by_side(backend, both_scalars, both_tables) -> None:
    """Launches of their own, one norm."""
    shapes = ((19, 3), (5,), (7,))
    results = []
    for name in (backend, "reference"):
        params = [p for i, dtype in enumerate(TOLERANCE_IN_EPS) for p in make_params(shapes, dtype, i)]
        groups = [{"params": params[::3] + params[1::3]}, {"params": params[2::3], "amsgrad": True}]
        optimizer = FusedRegAdam(groups, backend=name, **REGULARIZED)
        run(optimizer, params, 3)
        results.append(([p.detach() for p in params], optimizer.grad_norm))
    for ours, truth in zip(*(result[0] for result in results), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, truth, rtol=4 * max(eps, 1e-7), atol=4 * max(eps, 1e-7))
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, math.nan])
def test_amp_on_the_device(cls, variant, found_inf, backend, everything_on_device) -> None:
    """Scale and found_inf are read by the kernels, and a skipped step moves nothing: no scalar state, no norm."""
    results = []
    for name in (backend, "cpp"):
        if backends.BACKENDS[name].unavailable_reason():
            name = "reference"
        params = make_params(AFFORDABLE_SHAPES, torch.float64)
        optimizer = cls(params, backend=name, **regularized(cls, variant))
        run(optimizer, params, 2)
        before = [*snapshot(optimizer), optimizer.grad_norm]
        set_grads(params, 50)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        optimizer.step()
        if found_inf != 0:
            assert_same_bits(before, [*snapshot(optimizer), optimizer.grad_norm])
        del optimizer.grad_scale, optimizer.found_inf
        run(optimizer, params, 2)
        results.append(snapshot(optimizer))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("cls", "variant", "dtype"),
    [*((*each, torch.float64) for each in AFFORDABLE_VARIANTS), *((*each, torch.float32) for each in PLAIN)],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else None,
)
def test_hyperparameters_on_the_device(cls, variant, dtype, backend, everything_on_device) -> None:
    """As a CUDA graph needs it: moved in place between steps, read by the kernels."""
    values = {"lr": 0.05, "l1": 0.03, "l2": 0.2, "weight_decay": 0.1, "clip_value": 0.8, "max_grad_norm": 2.0}
    values |= {"mcp_gamma": 9.0, "lower": -1.6, "upper": 1.3, "l0": 1e-3}
    tensors = {key: torch.tensor(value, dtype=dtype) for key, value in known(cls, **values).items()}
    values = {key: tensor.item() for key, tensor in tensors.items()}
    params, own = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    options = variant_of(cls, variant)
    ours = cls([{"params": params[:2]}, {"params": params[2:], "l2": 0.0}], backend=backend, **options, **tensors)
    theirs = cls([{"params": own[:2]}, {"params": own[2:], "l2": 0.0}], backend="reference", **options, **values)
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


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_has_the_whole_range(dtype, offset, backend) -> None:
    assert_a_norm_has_the_whole_range(backend, dtype, CHUNK + 777, offset)


def test_squares_are_added_up_without_loss(backend, monkeypatch) -> None:
    """In float32: a pack's of these numbers are exact, and what the sum of packs loses by rounding is kept."""
    sums = []

    def recorded(plan, step, sum_of_squares=DevicePlan.sum_of_squares) -> torch.Tensor:
        partial_sums = sum_of_squares(plan, step)
        sums.append(partial_sums.sum())
        return partial_sums

    monkeypatch.setattr(DevicePlan, "sum_of_squares", recorded)
    param = torch.nn.Parameter(torch.zeros(3 * CHUNK))
    param.grad = torch.randint(1024, 2048, param.shape).float()
    FusedRegSGD([param], lr=1e-3, backend=backend, max_grad_norm=math.inf).step()
    assert sums == [param.grad.double().square().sum()]


def test_empty_parameters_alone_move_their_scalar_states(backend, both_scalars, both_tables) -> None:
    param = torch.nn.Parameter(torch.empty(0, 3))
    param.grad = torch.empty(0, 3)
    optimizer = FusedRegAdam([param], backend=backend, max_grad_norm=1.0)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    assert optimizer.grad_norm == 0
