"""The edges of a step: zeros, NaN, lr = 0, missing gradients, skipped steps, and the norm to the bit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from conftest import needs_cpp
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegAdamW,
    FusedRegSGD,
    assert_same_bits,
    known,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    threads,
    variant_of,
)

from fusedreg.parity import stages_in
from fusedreg.penalties import PENALTY_MODES

every_optimizer = pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)


@every_optimizer
def test_no_penalty_is_bitwise_no_prox(cls, flags, backend) -> None:
    """l1 = l2 = 0 in every mode gives the same bits, -0.0 included."""
    results = []
    options = {**known(cls, weight_decay=0.1), **variant_of(cls, flags)}
    for mode in cls.spec.modes:
        params = make_params()
        with torch.no_grad():
            params[0][0, 0] = -0.0
        run(
            cls(params, **options, penalty_mode=mode, lr=0.01, backend=backend),
            params,
            3,
        )
        results.append([param.detach() for param in params])
    for each in results[1:]:
        assert_same_bits(results[0], each)


@every_optimizer
@pytest.mark.parametrize("mode", PENALTY_MODES)
def test_lr_zero_moves_nothing(cls, flags, mode, backend) -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    options = {**regularized(cls, flags), **stages_in(mode), "lr": 0.0, "penalty_mode": mode}
    if cls.spec.name == "rprop":  # its lr is where step sizes begin
        options["step_sizes"] = (0.0, 50.0)
    run(cls(params, backend=backend, **options), params, 3)
    assert_same_bits(before, [param.detach() for param in params])


@every_optimizer
@pytest.mark.parametrize("mode", ["proximal", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_zeros_are_exact_and_positive(cls, flags, mode, dtype, backend) -> None:
    params = make_params(((40, 25),), dtype)
    options = {**regularized(cls, flags), "penalty_mode": mode, "l1": 3.0}
    if cls.spec.name == "adadelta":  # its steps begin at lr * sqrt(eps)
        options["lr"] = 40.0
    run(cls(params, backend=backend, **options), params, 4)
    zero = params[0].detach() == 0
    assert zero.sum() > 50
    assert not torch.signbit(params[0].detach()[zero]).any()


@every_optimizer
@pytest.mark.parametrize("with_stages", [False, True], ids=["l1+l2", "stages"])
@pytest.mark.parametrize("mode", PENALTY_MODES)
def test_nan_survives(cls, flags, mode, with_stages, backend) -> None:
    """A NaN in a gradient, or in a weight, must be seen; a soft-threshold that makes it 0 would hide a diverged run."""
    params = make_params(((50,), (50,)))
    options = {**regularized(cls, flags), "penalty_mode": mode, "max_grad_norm": None}
    options |= stages_in(mode) if with_stages else {}
    optimizer = cls(params, backend=backend, **options)
    run(optimizer, params, 1)
    set_grads(params, 5)
    params[0].grad[17] = math.nan
    with torch.no_grad():
        params[1][33] = math.nan
    optimizer.step()
    assert params[0].isnan().nonzero().flatten().tolist() == [17]
    assert params[1].isnan().nonzero().flatten().tolist() == [33]


def test_infinite_weights_and_gradients_equal_torch(backend) -> None:
    results = []
    for cls, options in ((torch.optim.SGD, {}), (FusedRegSGD, {"backend": backend})):
        params = make_params(((20,),))
        with torch.no_grad():
            params[0][3] = math.inf
        optimizer = cls(params, lr=0.1, momentum=0.9, **options)
        set_grads(params, 1)
        params[0].grad[7] = -math.inf
        optimizer.step()
        results.append(params[0].detach())
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


@every_optimizer
def test_a_parameter_without_gradient_is_untouched(cls, flags, backend) -> None:
    params = make_params()
    before = params[1].detach().clone()
    optimizer = cls(params, backend=backend, **regularized(cls, flags))
    state = dict(optimizer.state.get(params[1], {}))  # Adagrad's is made with the optimizer, as torch's
    for i in range(3):
        set_grads(params, i)
        params[1].grad = None
        optimizer.step()
    assert params[1].equal(before)
    assert optimizer.state.get(params[1], {}) == state
    assert state.get("step", 0) == 0
    # and then it comes: it starts at its own first step
    set_grads(params, 9)
    optimizer.step()
    assert not params[1].equal(before)
    if "step" in optimizer.state[params[0]]:
        assert optimizer.state[params[1]]["step"] == 1
        assert optimizer.state[params[0]]["step"] == 4


def test_no_gradient_at_all(backend) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, max_grad_norm=1.0, l1=0.1, backend=backend)
    before = snapshot(optimizer)
    optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.grad_norm == 0


@every_optimizer
def test_p_grad_is_never_written(cls, flags, backend) -> None:
    params = make_params()
    optimizer = cls(params, backend=backend, **regularized(cls, flags))
    set_grads(params, 1)
    grads = [param.grad.clone() for param in params]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert_same_bits(grads, [param.grad for param in params])


@every_optimizer
@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5, math.nan])
def test_found_inf_skips_everything(cls, flags, found_inf, backend) -> None:
    """Any nonzero value: it is a sum over devices, so it can be 2."""
    params = make_params()
    optimizer = cls(params, backend=backend, **regularized(cls, flags))
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), torch.tensor(2.0)
    set_grads(params, 50)
    optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


@every_optimizer
def test_grad_scale_divides_before_the_clips(cls, flags, backend) -> None:
    results = []
    for scale in (1.0, 1024.0):
        params = make_params(dtype=torch.float64)
        optimizer = cls(params, backend=backend, **regularized(cls, flags))
        for i in range(3):
            set_grads(params, i)
            for param in params:
                param.grad *= scale
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        results.append(([param.detach() for param in params], optimizer.grad_norm))
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("clip_value", [None, 0.7])
def test_clipping_is_torchs(backend, clip_value) -> None:
    """clip_grad_value_, then clip_grad_norm_, then a step of the twin."""
    params, theirs = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    optimizer = FusedRegAdam(params, lr=0.1, clip_value=clip_value, max_grad_norm=1.5, backend=backend)
    twin = torch.optim.Adam(theirs, lr=0.1)
    for i in range(4):
        set_grads(params, i)
        set_grads(theirs, i)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(theirs, clip_value)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        twin.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-14, atol=0)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_grad_norm_is_a_0_dim_tensor_of_the_last_step(backend) -> None:
    params = make_params()
    optimizer = FusedRegSGD(params, max_grad_norm=math.inf, backend=backend)
    assert optimizer.grad_norm is None
    set_grads(params, 1)
    expected = torch.sqrt(sum(param.grad.double().square().sum() for param in params))
    optimizer.step()
    assert optimizer.grad_norm.shape == ()
    assert optimizer.grad_norm.dtype == torch.float32
    torch.testing.assert_close(optimizer.grad_norm.double(), expected, rtol=1e-7, atol=0)


def test_grad_norm_is_seen_by_copies(backend) -> None:
    """Lightning's and Fabric's wrappers take over an optimizer's attributes, once, before the first step."""
    params = make_params()
    optimizer = FusedRegSGD(params, max_grad_norm=math.inf, backend=backend)
    wrapper = object.__new__(type("Wrapper", (FusedRegSGD,), {}))
    wrapper.__dict__.update(optimizer.__dict__)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
        assert wrapper.grad_norm.equal(optimizer.grad_norm)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.grad_norm.equal(optimizer.grad_norm)
        before = optimizer.grad_norm
        set_grads(twin.param_groups[0]["params"], 7)
        twin.step()
        assert optimizer.grad_norm.equal(before)


@needs_cpp
@pytest.mark.parametrize("clip_value", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_and_two_threads_give_the_same_bits(dtype, clip_value) -> None:
    results = []
    for count in (1, 2):
        with threads(count):
            params = make_params(((300, 401), (77,), (100_003,), (64, 64)), dtype)
            options = {**REGULARIZED, "clip_value": clip_value}
            optimizer = FusedRegAdam(params, backend="cpp", **options)
            run(optimizer, params, 2)
            results.append([*snapshot(optimizer), optimizer.grad_norm])
    assert_same_bits(*results)


@needs_cpp
@pytest.mark.parametrize("elements", [2**24 + 12_345, 2**25 + 12_345], ids=str)
def test_one_and_two_threads_give_the_same_bits_where_chunks_are_longer(elements) -> None:
    """From 2**24 elements on, and again from 2**25. In float64, whose norm shows every order of its sum."""
    generator = torch.Generator().manual_seed(elements)
    numbers = (torch.randn(elements + 77, generator=generator, dtype=torch.float64) for _ in range(2))
    weights, gradients = numbers
    results = []
    for count in (1, 2):
        with threads(count):
            params = [torch.nn.Parameter(part.clone()) for part in weights.split([77, elements])]
            for param, gradient in zip(params, gradients.split([77, elements]), strict=True):
                param.grad = gradient
            options = {"l1": 0.1, "l2": 0.2, "weight_decay": 0.3, "max_grad_norm": 100.0}
            optimizer = FusedRegSGD(params, lr=0.5, backend="cpp", **options)
            optimizer.step()
            results.append([torch.cat([param.detach() for param in params]), optimizer.grad_norm])
    assert_same_bits(*results)
    result, norm = results[0]
    # Each of 32 lanes adds up at most 4096 numbers of a chunk.
    torch.testing.assert_close(norm, gradients.norm(), rtol=4096 * 2**-53, atol=0)
    moved = weights - 0.5 * (100 / (norm + 1e-6) * gradients + 0.3 * weights)  # as torch clips
    expected = moved.sign() * (moved.abs() - 0.5 * 0.1).clamp(min=0) / (1 + 0.5 * 0.2)
    # Eight operations, on numbers below 8: each is off by half an ulp, 2**-51, at the most.
    torch.testing.assert_close(result, expected, rtol=0, atol=8 * 2**-51)


@needs_cpp
def test_the_norm_has_the_same_bits_on_every_instruction_set() -> None:
    from conftest import EXTENSION

    norms = []
    before = EXTENSION.instruction_set()
    try:
        for name in EXTENSION.instruction_sets():
            EXTENSION.use_instruction_set(name)
            params = make_params(((1003, 7), (31,)), torch.float32)
            optimizer = FusedRegSGD(params, max_grad_norm=1.0, backend="cpp")
            run(optimizer, params, 1)
            norm = optimizer._measured["grad_norm"]
            norms.append(norm if isinstance(norm, float) else norm.item())
    finally:
        EXTENSION.use_instruction_set(before)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegAdamW])
def test_a_weight_that_never_saw_a_gradient_moves_by_at_most_two_lr(cls, backend) -> None:
    """An unused embedding row: v = 0, d = eps, and an unguarded lr * l1 / d would wipe it out at once."""
    embedding = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64) + 3)
    optimizer = cls([embedding], lr=1e-3, l1=0.5, l2=0.1, weight_decay=0.0, backend=backend)
    for i in range(20):
        before = embedding.detach().clone()
        embedding.grad = torch.zeros_like(embedding)
        embedding.grad[:3] = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        optimizer.step()
        moved = (embedding.detach() - before)[3:].abs().max()
        assert 0 < moved <= 2e-3 * (1 + 1e-12)
    assert (embedding[3:] != 0).all()


def test_sgd_prox_follows_the_momentum(backend) -> None:
    """The prox's step size is lr * s_t, s_t the momentum recurrence on a constant 1: checked on a pure shrink."""
    weight = torch.nn.Parameter(torch.full((3,), 10.0, dtype=torch.float64))
    optimizer = FusedRegSGD([weight], lr=0.1, momentum=0.5, dampening=0.2, l1=1.0, backend=backend)
    expected, s = 10.0, 0.0
    for i in range(5):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        s = 1.0 if i == 0 else 0.5 * s + 0.8
        expected -= 0.1 * s
        torch.testing.assert_close(weight.detach(), torch.full((3,), expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_a_momentum_buffer_from_torch_takes_the_stationary_gain(backend) -> None:
    weight = torch.nn.Parameter(torch.full((3,), 10.0, dtype=torch.float64))
    twin = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    weight.grad = torch.zeros_like(weight)
    twin.step()
    optimizer = FusedRegSGD([weight], lr=0.1, momentum=0.5, l1=1.0, backend=backend)
    optimizer.load_state_dict(twin.state_dict())
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 10 - 0.1 * 2.0).detach())


@needs_cpp
def test_autograd_sees_the_in_place_change() -> None:
    """Raw pointers bypass autograd; a backward through a stale weight must still be refused."""
    weight = make_params(((4, 4),))[0]
    loss = (weight**3).sum()
    weight.grad = torch.ones_like(weight)
    FusedRegAdam([weight], backend="cpp").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_cpp
def test_a_step_allocates_nothing_of_parameter_size(two_threads) -> None:
    """Counted by torch's own profiler, with everything on: no tensor is allocated at all."""
    params = make_params(((1000, 500), (64, 64)), torch.float32)
    optimizer = FusedRegAdam(params, backend="cpp", **REGULARIZED)
    run(optimizer, params, 2)
    set_grads(params, 3)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:  # else 2.10 warns
        optimizer.step()
    assert sum(abs(event.cpu_memory_usage) for event in profile.key_averages()) < 1024
