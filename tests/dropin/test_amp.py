"""Mixed precision: torch.amp.GradScaler's protocol and autocast, as with the twin.

A scaler hands unscaling and skipping to our step, as it does with the twin's fused one.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import FusedRegAdam, FusedRegSGD, assert_same_bits, known, make_params, set_grads, snapshot
from twin_pairs import (
    CONFIGURATIONS,
    TWINS,
    assert_alike,
    contents,
    every_configuration,
    every_rival,
    few_configurations,
    has_option,
    like_every_rival,
    like_the_twin,
    loss_of,
    make_model,
    on_default_device,
)

from fusedreg.step.created import Created

pytestmark = pytest.mark.usefixtures("in_one_thread")


SHAPES = ((6, 3), (5,), ())


def make_scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(
        torch.get_default_device().type, **{"init_scale": 256.0, "growth_interval": 2, **options}
    )


def scaled_backward(scaler, params, i: int, bad=None) -> None:
    """Gradients that differ in each step; `bad` multiplies one of the losses."""
    losses = [((param - 0.1 * i) ** 2).sum() for param in params]
    if bad is not None:
        losses[-1] = losses[-1] * bad
    scaler.scale(sum(losses)).backward()


@like_every_rival
@every_configuration
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_growth_backoff_and_skipped_steps(make, bad):
    """Steps 0, 5 and 6 overflow. The scale, and the steps between, are the twin's."""
    params = make_params(SHAPES, torch.float32)
    optimizer, scaler = make(params), make_scaler()
    scales = []
    for i in range(10):
        optimizer.zero_grad()
        scaled_backward(scaler, params, i, bad if i in (0, 5, 6) else None)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        if i in (0, 5, 6):
            assert_same_bits(before, snapshot(optimizer))
        scaler.update()
        scales.append(scaler.get_scale())
    assert min(scales) < 256.0 < max(scales)
    return contents(optimizer), scales, scaler.state_dict()


@few_configurations
def test_the_first_step_overflows(configuration, backend) -> None:
    """Then no step is counted, and no state is there that was not before."""
    cls, flags = CONFIGURATIONS[configuration]
    params = make_params(SHAPES)
    optimizer, scaler = cls(params, backend=backend, **flags), make_scaler()
    before = snapshot(optimizer)
    scaled_backward(scaler, params, 1, math.inf)
    scaler.step(optimizer)
    assert_same_bits(before, snapshot(optimizer))
    assert all(state["step"] == 0 for state in optimizer.state.values())  # Adagrad's is there from the beginning


@like_every_rival
@few_configurations
def test_unscale_before_the_step(make):
    """unscale_, a clip by hand, then the step: nothing may be unscaled twice."""
    params = make_params(SHAPES, torch.float32)
    optimizer, scaler = make(params), make_scaler()
    norms = []
    for i in range(6):
        optimizer.zero_grad()
        scaled_backward(scaler, params, i, math.inf if i == 2 else None)
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0))
        scaler.step(optimizer)
        scaler.update()
    return [contents(optimizer), norms[:2] + norms[3:]]


def test_the_norm_is_that_of_the_unscaled_gradients(backend) -> None:
    for unscaled_first in (False, True):
        params = make_params(((6, 3),))
        optimizer = FusedRegAdam(params, lr=0.1, max_grad_norm=1.0, backend=backend)
        scaler = make_scaler(init_scale=1024.0)
        scaler.scale((params[0] ** 2).sum()).backward()
        if unscaled_first:
            scaler.unscale_(optimizer)
        expected = (2 * params[0].detach()).norm()
        scaler.step(optimizer)
        torch.testing.assert_close(optimizer.grad_norm, expected)


@like_every_rival
@pytest.mark.parametrize("configuration", ["adam-amsgrad"])
def test_two_optimizers_with_one_scaler(make):
    """Only the one whose gradients overflow skips; the scale backs off for both."""
    first, second = make_params(SHAPES, seed=1), make_params(SHAPES, seed=2)
    optimizers, scaler = (make(first), make(second, lr=0.01)), make_scaler()
    scales = []
    for i in range(8):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaled_backward(scaler, first, i, math.inf if i in (2, 5) else None)
        scaled_backward(scaler, second, i, math.inf if i in (4, 5) else None)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert optimizers[0].state[first[0]]["step"] == optimizers[1].state[second[0]]["step"] == 6
    return list(map(contents, optimizers)), scales


@every_configuration
@pytest.mark.parametrize("found_inf", [2.0, 1.0, math.inf])
def test_found_inf_is_a_sum_over_devices(configuration, found_inf, backend) -> None:
    """Two devices that overflow make 2, which torch's fused kernels take for no overflow. Here any nonzero skips."""
    cls, flags = CONFIGURATIONS[configuration]
    params = make_params(SHAPES)
    options = known(cls, lr=0.1, l1=0.05, l2=0.1, weight_decay=0.1, max_grad_norm=1.0)
    optimizer = cls(params, backend=backend, **options, **flags)
    set_grads(params, 1)
    optimizer.step()
    before, norm = snapshot(optimizer), optimizer.grad_norm
    set_grads(params, 2)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), torch.tensor(4.0)
    optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.grad_norm.equal(norm)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not params[0].equal(before[0])


@every_configuration
def test_the_same_hooks_run_as_with_a_fused_twin(configuration, backend) -> None:
    """A step that the scaler has us skip is a call of step all the same: its hooks run."""

    if not has_option(configuration, "fused"):
        pytest.skip("the twin has no fused step")
    twin = TWINS[CONFIGURATIONS[configuration][0]]
    if not hasattr(twin([torch.zeros(1, requires_grad=True)], fused=True), "_step_supports_amp_scaling"):
        pytest.skip("this torch's fused step takes no scaler")

    def flow(make):
        params = make_params(SHAPES, torch.float32)
        optimizer, scaler = make(params, fused=True), make_scaler()
        seen = []
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(f"post {int(o.found_inf)}"))
        for i in range(4):
            optimizer.zero_grad()
            scaled_backward(scaler, params, i, math.inf if i == 1 else None)
            returned = scaler.step(optimizer)
            scaler.update()
            seen.append((returned, hasattr(optimizer, "grad_scale"), hasattr(optimizer, "found_inf")))
        return contents(optimizer), seen

    assert_alike(flow, configuration, backend)


@every_configuration
def test_the_scaler_leaves_all_to_our_step(configuration, backend) -> None:
    """Without `fused` too: the step is called where it is to be skipped, and nobody unscales p.grad in place."""
    cls, flags = CONFIGURATIONS[configuration]
    params = make_params(SHAPES)
    optimizer, scaler = cls(params, backend=backend, **flags), make_scaler()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for bad in (None, math.inf):
        optimizer.zero_grad()
        scaled_backward(scaler, params, 1, bad)
        gradients = [param.grad.clone() for param in params]
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(gradients, [param.grad for param in params])
    assert len(calls) == 2


@like_the_twin
@few_configurations
def test_steps_with_and_without_the_scaler(make):
    """What the scaler has set on the optimizer is gone after its step."""
    params = make_params(SHAPES, torch.float32)
    optimizer, scaler = make(params), make_scaler()
    for i in range(6):
        optimizer.zero_grad()
        if i % 2:
            ((params[0] - i) ** 2).sum().backward()
            optimizer.step()
        else:
            scaled_backward(scaler, params, i)
            scaler.step(optimizer)
            scaler.update()
    return contents(optimizer)


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam"])
def test_a_scaler_that_is_off(make):
    params = make_params(SHAPES)
    optimizer, scaler = make(params), make_scaler(enabled=False)
    for i in range(3):
        optimizer.zero_grad()
        scaled_backward(scaler, params, i)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return contents(optimizer), scaler.get_scale()


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam"])
def test_misuse_of_the_scaler_is_told_as_with_the_twin(make):
    params = make_params(SHAPES)
    optimizer, scaler = make(params), make_scaler()
    told = []

    def note(call, *args, **kwargs):
        with pytest.raises(RuntimeError) as caught:
            call(*args, **kwargs)
        told.append(str(caught.value))

    scaled_backward(scaler, params, 1)
    note(scaler.step, optimizer, closure=lambda: 0.0)
    scaler.unscale_(optimizer)
    note(scaler.unscale_, optimizer)
    scaler.step(optimizer)
    note(scaler.step, optimizer)
    note(scaler.unscale_, optimizer)
    return contents(optimizer), told


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam"])
def test_no_gradient_anywhere(make):
    """As the twin's fused step: nothing to check, nothing to do."""
    params = make_params(SHAPES)
    optimizer, scaler = make(params, fused=True), make_scaler()
    scaler.scale(torch.ones(())).item()  # makes the scale
    scaler.step(optimizer)
    return contents(optimizer)


@like_the_twin
@few_configurations
def test_scaler_state_resumes_with_the_optimizers(make):
    params = make_params(SHAPES, torch.float32)
    optimizer, scaler = make(params), make_scaler()
    for i in range(8):
        if i == 4:
            optimizer_state, scaler_state = optimizer.state_dict(), scaler.state_dict()
            optimizer, scaler = make(params), make_scaler(init_scale=8.0)
            optimizer.load_state_dict(optimizer_state)
            scaler.load_state_dict(scaler_state)
        optimizer.zero_grad()
        scaled_backward(scaler, params, i, math.inf if i == 2 else None)
        scaler.step(optimizer)
        scaler.update()
    return contents(optimizer), scaler.get_scale()


@every_rival
@few_configurations
@pytest.mark.parametrize("with_scaler", [False, True], ids=["autocast", "autocast-and-scaler"])
def test_autocast(configuration, with_scaler, backend, rival) -> None:
    """bfloat16 forwards over float32 parameters.

    The gradients of the first run are kept and given to the second: an ulp in a weight could round to another bfloat16,
    and the comparison would be one of chances.
    """
    recorded: list[list[torch.Tensor]] = []

    def flow(make):
        model = make_model(torch.float32)
        params = list(model.parameters())
        optimizer, scaler = make(params), make_scaler(enabled=with_scaler)
        first_run = len(recorded) == 0
        losses = []
        for i in range(5):
            optimizer.zero_grad()
            with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
                output = model(on_default_device((11, 5), i, torch.float32))
                assert output.dtype == torch.bfloat16
                loss = (output.float() - 1).square().mean()
            scaler.scale(loss).backward()
            losses.append(loss.item())
            if first_run:
                recorded.append([param.grad.clone() for param in params])
            for param, grad in zip(params, recorded[i], strict=True):
                assert param.grad.dtype == torch.float32
                torch.testing.assert_close(param.grad, grad, rtol=0.05, atol=0.05 * grad.abs().max().item())
                param.grad = grad.clone()
            scaler.step(optimizer)
            scaler.update()
        assert losses[-1] < losses[0]
        return contents(optimizer)

    assert_alike(flow, configuration, backend, rival, lr=0.01)


@like_every_rival
@pytest.mark.parametrize("configuration", ["adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_low_precision_with_the_scaler(make, dtype):
    """Parameters themselves in 16 bits; the fused twin computes in float32 too, the for-loop does not."""
    model = make_model(dtype)
    optimizer, scaler = make(model.parameters(), fused=True, eps=1e-3), make_scaler(init_scale=16.0)
    recorded = torch.Generator().manual_seed(5)
    for _ in range(4):
        for param in model.parameters():
            values = torch.randn(param.shape, generator=recorded, device="cpu") * 16
            param.grad = values.to(param.device, dtype)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    return contents(optimizer)


@like_the_twin
@pytest.mark.parametrize("configuration", ["sgd-dampening"])
def test_the_loss_of_a_positional_closure_comes_back(make):
    model = make_model()
    optimizer, scaler = make(model.parameters(), fused=True), make_scaler(init_scale=1.0, growth_interval=100)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 1)
        scaler.scale(loss).backward()
        return loss

    closure()
    return [scaler.step(optimizer, closure).detach(), contents(optimizer)]


def test_sgd_keeps_its_gain_over_a_skipped_step(backend) -> None:
    """The prox's step size counts the steps that were taken."""
    params = make_params(((4,),), torch.float64)
    optimizer = FusedRegSGD(params, lr=0.1, momentum=0.5, l1=0.01, backend=backend)
    for found_inf in (0.0, 1.0, 0.0):
        set_grads(params, 1)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    assert optimizer.state[params[0]]["momentum_gain"].item() == 1.5


def test_only_a_scaler_is_told_that_a_step_unscales(backend) -> None:
    """Lightning refuses gradient_clip_val beside an optimizer that says so, and does not unscale for its own clip."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedRegAdam([param], lr=0.1, fused=True, backend=backend)
    assert not optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler(param.device.type, init_scale=8.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert param.grad.tolist() == [8.0] * 3, "the scaler unscaled by itself"
    scaler.update()


def test_scalar_states_come_to_the_device_in_one_copy() -> None:
    """In the first step under a scaler after plain ones. "meta" stands for a GPU: each copy to one would wait."""
    params = [torch.zeros(3, device="meta") for _ in range(50)]
    state = {param: {"step": torch.tensor(2.0)} for param in params}
    group = FusedRegAdam([torch.zeros(2)]).param_groups[0]
    with torch.autograd.profiler.profile() as profile, Created(FusedRegAdam.spec, state) as created:
        scalars = [created.state_of(param, group, scalars_on_device=True)[2][0] for param in params]
        created.copy_moved()
    assert all(scalar.is_meta and scalar is own["step"] for scalar, own in zip(scalars, state.values(), strict=True))
    names = [event.name for event in profile.function_events]
    assert names.count("aten::_to_copy") == 1
    assert names.count("aten::_foreach_copy_") == 1
    moved = [(torch.tensor(i, dtype=(torch.float32, torch.float64)[i % 2]), torch.zeros(())) for i in range(5)]
    created._moved = [(before, after.to(before.dtype)) for before, after in moved]
    kept = list(created._moved)
    created.copy_moved()
    assert [after.item() for _, after in kept] == [0, 1, 2, 3, 4]
