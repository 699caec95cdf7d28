"""What a plan rests on changes between two steps: options that switch state on and off, state, shapes, gradients.

The C++ backend keeps its plan from step to step, so that each of these could leave it with something stale. With every
regularizer off the twin says what is right; with one on, the reference does, which keeps no plan.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    OPTIMIZERS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegFTRL,
    FusedRegSGD,
    assert_same_bits,
    known,
    make_params,
    run,
    set_grads,
    snapshot,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fusedreg.backends.cpp import load_extension
from fusedreg.optimizer import FusedRegOptimizer

SHAPES = ((4, 3), (5,))


def grow(optimizer, params) -> None:
    """Any change of the parameters makes a new plan."""
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [param]})


def reload(optimizer, params) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def nothing(optimizer, params) -> None:
    pass


MEANWHILE = [nothing, grow, reload]


def trained(cls, options, switches, meanwhile, **more):
    """Two steps under each setting of the switches, and something in between."""
    params = make_params(SHAPES, torch.float64)
    optimizer = cls(params, lr=0.1, **options)
    for i, settings in enumerate(switches):
        for group in optimizer.param_groups:
            group.update(settings)
        run(optimizer, params, 1, first_seed=10 * i)
        meanwhile(optimizer, params)
        run(optimizer, params, 1, first_seed=10 * i + 1)
    return [param.detach() for param in params]


MOMENTA = list(itertools.product([0.9, 0.0], [0.5, 0.0], [0.9, 0.0], [0.9, 0.0]))


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
def test_momentum_on_and_off(momenta, dampening, meanwhile, backend) -> None:
    switches = [{"momentum": momentum} for momentum in momenta]
    options = {"momentum": momenta[0], "dampening": dampening}
    ours = trained(FusedRegSGD, options, switches, meanwhile, backend=backend)
    twins = trained(torch.optim.SGD, options, switches, meanwhile)
    torch.testing.assert_close(ours, twins, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
def test_the_prox_follows_momentum_on_and_off(momenta, nesterov, meanwhile) -> None:
    """A pure shrink by l1 has a closed form: each step takes lr * s_t, or lr * (1 + momentum * s_t), from the weight.

    Without momentum s_t is 1, whatever the dampening, and the gain that was reached waits for momentum to come back.
    """
    from conftest import EXTENSION, FAST

    dampening = 0.0 if nesterov else 0.5
    for backend in (FAST, "reference") if EXTENSION else ("reference",):
        weight = torch.full((3,), 50.0, dtype=torch.float64).requires_grad_()
        optimizer = FusedRegSGD([weight], lr=0.1, momentum=0.1, dampening=dampening, l1=1.0, backend=backend)
        optimizer.param_groups[0]["nesterov"] = nesterov
        expected, gain = 50.0, None
        for momentum in momenta:
            for change in (nothing, meanwhile):
                optimizer.param_groups[0]["momentum"] = momentum
                weight.grad = torch.zeros_like(weight)
                change(optimizer, [weight])
                optimizer.step()
                s = 1.0
                if momentum != 0:
                    gain = s = 1.0 if gain is None else momentum * gain + 1 - dampening
                expected -= 0.1 * (1 + momentum * s if nesterov else s)
        assert weight.tolist() == pytest.approx([expected] * 3, rel=1e-13), backend


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3)), ids=str)
def test_amsgrad_on_and_off(switches, meanwhile, backend) -> None:
    """Where it comes on late, the maximum begins at zero: torch's own step would fail, having no such state."""
    settings = [{"amsgrad": on} for on in switches]
    ours = trained(FusedRegAdam, {"amsgrad": switches[0]}, settings, meanwhile, backend=backend)
    by_hand = trained(torch.optim.Adam, {"amsgrad": True}, settings, with_a_maximum(meanwhile))
    torch.testing.assert_close(ours, by_hand, rtol=1e-13, atol=1e-14)


def with_a_maximum(meanwhile):
    def change(optimizer, params) -> None:
        meanwhile(optimizer, params)
        for state in optimizer.state.values():
            state.setdefault("max_exp_avg_sq", torch.zeros_like(state["exp_avg_sq"]))

    return change


@pytest.mark.parametrize(("dampening", "momentum", "steps"), [(1.0, 0.1, 330), (1.5, 0.5, 6), (1.9, 0.9, 6)])
def test_a_gain_of_exactly_zero_is_not_a_first_step(dampening, momentum, steps, backend) -> None:
    """momentum * s + 1 - dampening comes to zero, or underflows; the clock is 0 before the first step, too."""
    results = []
    for cls, options in ((torch.optim.SGD, {}), (FusedRegSGD, {"backend": backend})):
        weight = torch.zeros(3, dtype=torch.float64).requires_grad_()
        optimizer = cls([weight], lr=0.1, momentum=momentum, dampening=dampening, **options)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_with_a_momentum_buffer_of_none(momentum, backend) -> None:
    """What torch's SGD used to save where it had no momentum."""
    results = []
    for cls, options in ((torch.optim.SGD, {}), (FusedRegSGD, {"backend": backend})):
        params = make_params(SHAPES, torch.float64)
        optimizer = cls(params, lr=0.1, momentum=momentum, **options)
        saved = optimizer.state_dict()
        saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
        optimizer.load_state_dict(saved)
        run(optimizer, params, 3)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


# -- the state is the user's to change


def clear_state(optimizer, params, kept) -> None:
    kept.append(dict(optimizer.state))
    optimizer.state.clear()


def pop_state(optimizer, params, kept) -> None:
    kept.append(optimizer.state.pop(params[0]))


def put_copies(optimizer, params, kept) -> None:
    for param in params:
        kept.append(optimizer.state[param])
        optimizer.state[param] = {k: torch.zeros_like(v) for k, v in optimizer.state[param].items()}


def swap_states(optimizer, params, kept) -> None:
    a, b = params[:2]
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]


def replace_tensors(optimizer, params, kept) -> None:
    for param in params:
        kept.append(dict(optimizer.state[param]))
        for name, value in optimizer.state[param].items():
            optimizer.state[param][name] = value * 2


def write_into_tensors(optimizer, params, kept) -> None:
    for param in params:
        for value in optimizer.state[param].values():
            value.mul_(2)


def swap_data(optimizer, params, kept) -> None:
    for param in params:
        for value in optimizer.state[param].values():
            value.data = value.data * 2


def twin_and_ours(rule: str, backend: str) -> list[tuple[type, dict[str, Any]]]:
    """The classes, and options of theirs."""
    if rule == "adam":
        return [(torch.optim.Adam, {}), (FusedRegAdam, {"backend": backend})]
    return [(torch.optim.SGD, {"momentum": 0.9}), (FusedRegSGD, {"momentum": 0.9, "backend": backend})]


CHANGES = [clear_state, pop_state, put_copies, swap_states, replace_tensors, write_into_tensors, swap_data]


@pytest.mark.parametrize("keep", [True, False], ids=["old-kept", "old-dropped"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_change_of_state_is_seen(rule, change, keep, backend) -> None:
    """As by the twin; and what was taken out, where someone has kept it, is not written any more."""
    results = []
    for cls, options in twin_and_ours(rule, backend):
        params = make_params(((4, 3), (4, 3), (5,)), torch.float64)
        optimizer = cls(params, lr=0.1, **options)
        run(optimizer, params, 3)
        kept: list = []
        change(optimizer, params, kept)
        if not keep:
            kept.clear()
        before = copy.deepcopy(flat(kept))
        run(optimizer, params, 2, first_seed=50)
        assert all(a.equal(b) for a, b in zip(before, flat(kept), strict=True))
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


def flat(kept) -> list[torch.Tensor]:
    if isinstance(kept, torch.Tensor):
        return [kept]
    return [tensor for item in (kept.values() if isinstance(kept, dict) else kept) for tensor in flat(item)]


def test_state_that_the_options_do_not_need_may_be_of_any_kind(backend) -> None:
    """A checkpoint's leftovers: amsgrad's maximum in another dtype, while amsgrad is off."""
    results = []
    for leftovers in (True, False):
        params = make_params(SHAPES)
        optimizer = FusedRegAdam(params, lr=0.1, backend=backend)
        run(optimizer, params, 1)
        if leftovers:
            for param in params:
                optimizer.state[param]["max_exp_avg_sq"] = torch.zeros(1, dtype=torch.float64)
        grow(optimizer, params)
        run(optimizer, params, 2, first_seed=20)
        results.append([param.detach() for param in params])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


# -- shapes and hyperparameters


def test_two_parameters_that_trade_their_sizes_in_place(backend) -> None:
    """The same addresses, strides and number of elements in all: a plan that knows no sizes would read past an end."""
    pool = [torch.zeros(64), torch.zeros(64)]
    a, b = (torch.nn.Parameter(memory[:size]) for memory, size in zip(pool, (16, 64), strict=True))
    optimizer = FusedRegSGD([a, b], lr=1.0, backend=backend)
    for sizes in ((16, 64), (64, 16)):
        for param, memory, size in zip((a, b), pool, sizes, strict=True):
            param.grad = None
            param.data = memory[:size]
            param.grad = torch.ones(size)
        optimizer.step()
    assert pool[0].tolist() == [-2.0] * 16 + [-1.0] * 48
    assert pool[1].tolist() == [-2.0] * 16 + [-1.0] * 48


def test_a_number_replaced_by_a_tensor_that_compares_equal(backend) -> None:
    """torch.tensor(0.1) == 0.1, and yet it is 1.5e-9 more."""
    results = []
    for cls, options in ((torch.optim.SGD, {}), (FusedRegSGD, {"backend": backend})):
        params = make_params(SHAPES, torch.float64)
        optimizer = cls(params, lr=0.1, **options)
        run(optimizer, params, 1)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        run(optimizer, params, 1)
        optimizer.param_groups[0]["lr"].fill_(0.2)
        run(optimizer, params, 1)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("key", ["lr", "l1", "l2", "clip_value", "max_grad_norm"])
def test_a_tensor_hyperparameter_written_in_place(key, backend) -> None:
    results = []
    for as_tensor in (True, False):
        params = make_params(SHAPES, torch.float64)
        optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
        group = optimizer.param_groups[0]
        for value in (0.01, 0.3, 0.02):
            if not as_tensor:
                group[key] = value
            elif not isinstance(group[key], torch.Tensor):
                group[key] = torch.tensor(value, dtype=torch.float64)
            else:
                group[key].fill_(value)
            set_grads(params, int(value * 100))
            optimizer.step()
        results.append([param.detach() for param in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


# What schedulers change before every step goes a way of its own. Here are also values that must not go it.
NEW_NUMBERS = {
    "lr": [0.02, 0.0, -0.0, -0.1, math.nan, math.inf, 1, True, np.float64(0.02), np.float32(0.02), "small", None, ()],
    "momentum": [0.5, 0.0, -0.5, math.nan, 1, True, np.float64(0.5), "small", None, (0.5,)],
    "betas": [
        (0.5, 0.8),
        (0.0, 0.8),
        (1.5, 0.8),
        (math.nan, 0.8),
        (0.5, 0),
        (np.float64(0.5), 0.8),
        [0.5, 0.8],
        (0.5,),
        (0.5, 0.8, 0.9),
        0.5,
        None,
    ],
    "weight_decay": [0.3, 0.0, -0.3, math.nan, 1, np.float64(0.3), "small", None],
}


@pytest.mark.parametrize("key", NEW_NUMBERS)
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_new_numbers_in_a_training_loop_are_what_they_are_anywhere(cls, key, backend) -> None:
    """As in steps that check and read everything anew. Where a value is refused, nothing has moved, and it is refused
    again; and then the loop goes on, with one that is allowed, with another, and with the first that there was."""
    if key not in inspect.signature(cls).parameters:
        pytest.skip(f"{cls.__name__} has no {key}")

    def flow(value, least: int, anew: bool) -> list:
        params = make_params(((4, 3), (5,), (2, 2)))
        options = known(cls, lr=0.1, weight_decay=0.1, momentum=0.9, l1=0.01, regularize_min_ndim=least)
        optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], backend=backend, **options)
        if anew:
            optimizer.register_step_pre_hook(lambda *_: optimizer._forget())
        run(optimizer, params, 2)
        first, group = optimizer.param_groups
        before = group[key]
        seen = []
        for i, (of_first, its) in enumerate([(value, before), (value, value), (before, value), (before, before)]):
            first[key], group[key] = of_first, its
            for _ in range(2):
                was = snapshot(optimizer)
                try:
                    run(optimizer, params, 1, first_seed=i)
                    seen.append("done")
                except Exception as error:
                    assert_same_bits(was, snapshot(optimizer))
                    seen.append(f"{type(error).__name__}: {error}")
        return [seen, snapshot(optimizer)]

    for value in (*NEW_NUMBERS[key], torch.tensor(0.25)):
        for least in (0, 2):
            (expected, wanted), (seen, got) = (flow(value, least, anew) for anew in (True, False))
            assert seen == expected, (value, least)
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR", "weight decay"])
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_what_schedulers_change_is_not_read_with_all_else(cls, scheduler, monkeypatch) -> None:
    params = make_params(SHAPES)
    optimizer = cls(params, **known(cls, lr=0.1, momentum=0.9))
    cycles = bool({"momentum", "betas"} & set(optimizer.defaults))
    if scheduler == "OneCycleLR":
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=cycles)
    elif scheduler == "CyclicLR":
        schedule = lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=cycles)
    elif "weight_decay" in optimizer.defaults:
        optimizer.param_groups[0]["weight_decay"] = 0.1
        schedule = None
    else:
        pytest.skip(f"{cls.__name__} has no weight_decay")
    slow = []
    monkeypatch.setattr(cls, "_step", lambda self: slow.append(self) or FusedRegOptimizer._step(self))
    for i in range(6):
        run(optimizer, params, 1, first_seed=i)
        if schedule is None:
            optimizer.param_groups[0]["weight_decay"] *= 0.9
        else:
            schedule.step()
    assert len(slow) <= (1 if load_extension()[0] is not None else 6)


# -- the tensors themselves are the user's to change


def set_data_of_params(params) -> None:
    for param in params:
        param.data = param.data * 2


def set_params(params) -> None:
    with torch.no_grad():
        for param in params:
            param.set_(param.detach() * 2)


def move_storages_of_params(params) -> None:
    """To larger ones: the tensors' own addresses are others, and nothing else of them."""
    for param in params:
        move_storage(param.detach())


def move_storage(tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    before, size = storage.data_ptr(), storage.nbytes()
    kept = torch.empty(0)
    for factor in range(2, 50):  # until it does not just grow in place
        storage.resize_(size * factor * 100)
        if storage.data_ptr() != before:
            return
        kept = torch.empty(size)  # noqa: F841
    raise AssertionError("it stayed where it is")


def swap_tensors(params) -> None:
    for param in params:
        torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach() * 2))


def resize_params_and_back(params) -> None:
    """Which gets memory anew for the more elements in between."""
    for param in params:
        shape = param.shape
        param.requires_grad_(False).resize_(1000).resize_(shape).fill_(0.5).requires_grad_()


def replace_gradients(params) -> None:
    for param in params:
        param.grad = param.grad * 2


def write_into_gradients(params) -> None:
    for param in params:
        param.grad.mul_(2)


def set_data_of_gradients(params) -> None:
    for param in params:
        param.grad.data = param.grad * 2


def set_gradients(params) -> None:
    for param in params:
        param.grad.set_(param.grad * 2)


def resize_gradients(params) -> None:
    for param in params:
        param.grad.resize_(1000).resize_(param.shape).fill_(0.5)


def move_storages_of_gradients(params) -> None:
    for param in params:
        move_storage(param.grad)


def negate_gradients(params) -> None:
    """Where they are: what their memory holds is read with the other sign."""
    for param in params:
        param.grad.data = torch._neg_view(param.grad.clone())


def transpose_gradients(params) -> None:
    for param in params:
        param.grad.data = param.grad.t().contiguous().t()


def drop_a_gradient(params) -> None:
    params[0].grad = None


CHANGES_OF_TENSORS = [
    set_data_of_params,
    set_params,
    move_storages_of_params,
    swap_tensors,
    resize_params_and_back,
    replace_gradients,
    write_into_gradients,
    set_data_of_gradients,
    set_gradients,
    resize_gradients,
    move_storages_of_gradients,
    negate_gradients,
    transpose_gradients,
    drop_a_gradient,
]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("change", CHANGES_OF_TENSORS)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_change_of_tensors_is_seen(rule, change, steps, backend) -> None:
    """The gradients' objects are the same in every step, as with ``zero_grad(set_to_none=False)``."""
    results = []
    for cls, options in twin_and_ours(rule, backend):
        params = make_params(((4, 3), (4, 3), (5, 2)), torch.float64)
        optimizer = cls(params, lr=0.1, **options)
        set_grads(params, 0)
        for _ in range(steps):
            optimizer.step()
        change(params)
        for _ in range(2):
            optimizer.step()
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


# -- what is asked for before each step, and costs nothing where there is nothing to do


def test_numbers_in_the_place_of_others_that_are_gone(backend) -> None:
    """A new float may well be where the last one was."""
    results = []
    for cls, more in ((torch.optim.SGD, {}), (FusedRegSGD, {"backend": backend})):
        params = make_params(SHAPES, torch.float64)
        optimizer = cls(params, lr=0.1, **more)
        for key in ("lr", "weight_decay", "momentum"):
            for i in range(40):
                optimizer.param_groups[0][key] = 1 / (i // 2 + 2)
                run(optimizer, params, 1 + i % 3, first_seed=i)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_a_learning_rate_that_is_refused_is_refused_again(backend) -> None:
    params = make_params(SHAPES, torch.float64)
    optimizer = FusedRegFTRL(params, lr=0.1, backend=backend)
    run(optimizer, params, 3)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["lr"] = -0.1
    for _ in range(3):
        with pytest.raises(ValueError, match="Invalid lr"):
            optimizer.step()
    assert all(a.equal(b) for a, b in zip(before, params, strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not any(a.equal(b) for a, b in zip(before, params, strict=True))


def replace_groups(optimizer, params) -> None:
    optimizer.param_groups = [{**group, "lr": group["lr"] / 2} for group in optimizer.param_groups]


def replace_a_group(optimizer, params) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}


def replace_params(optimizer, params) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def drop_a_param(optimizer, params) -> None:
    del optimizer.param_groups[0]["params"][0]


def reverse_params(optimizer, params) -> None:
    optimizer.param_groups[0]["params"].reverse()


def replace_state(optimizer, params) -> None:
    old = optimizer.state
    optimizer.state = type(old)(dict)
    for param in params:
        optimizer.state[param] = {name: value * 2 for name, value in old[param].items()}


def add_a_key(optimizer, params) -> None:
    optimizer.param_groups[0]["of the user"] = object()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "change",
    [replace_groups, replace_a_group, replace_params, drop_a_param, reverse_params, replace_state, add_a_key],
)
def test_a_change_of_the_optimizer_is_seen(change, steps, backend) -> None:
    results = []
    for cls, more in ((torch.optim.Adam, {}), (FusedRegAdam, {"backend": backend})):
        params = make_params(((4, 3), (4, 3), (5,)), torch.float64)
        optimizer = cls(params, lr=0.1, **more)
        run(optimizer, params, steps)
        change(optimizer, params)
        run(optimizer, params, 2, first_seed=50)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("whose", ["optimizer", "global"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_that_come_and_go_between_steps(when, whose, backend) -> None:
    params = make_params(SHAPES)
    optimizer = FusedRegAdam(params, backend=backend)
    run(optimizer, params, 3)
    calls: list[object] = []
    register = getattr(optimizer, f"register_step_{when}_hook")
    if whose == "global":
        register = register_optimizer_step_pre_hook if when == "pre" else register_optimizer_step_post_hook
    for _ in range(2):
        handle = register(lambda *_: calls.append(None))
        run(optimizer, params, 3)
        handle.remove()
        run(optimizer, params, 3)
    assert len(calls) == 6


def test_a_profiler_that_comes_and_goes_between_steps(backend) -> None:
    params = make_params(SHAPES)
    optimizer = FusedRegAdam(params, backend=backend)
    run(optimizer, params, 3)
    for _ in range(2):
        with torch.autograd.profiler.profile() as profile:
            run(optimizer, params, 3)
        assert sum("Optimizer.step#FusedRegAdam.step" in event.name for event in profile.function_events) == 3
        run(optimizer, params, 3)


def test_a_mode_that_comes_and_goes_between_steps(backend) -> None:
    """A backend with kernels of its own is not seen by it, and refuses; torch's operations are."""

    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    params = make_params(SHAPES)
    optimizer = FusedRegAdam(params)
    run(optimizer, params, 3)
    for _ in range(2):
        set_grads(params, 1)
        with Counts() as counts:
            optimizer.step()
        assert counts.calls > 0
        run(optimizer, params, 3)
