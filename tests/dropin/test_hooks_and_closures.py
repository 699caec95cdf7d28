"""Closures, accumulation, and every hook around a step and a state dict: called when, in which order and with what."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import TWINS, FusedRegAdam, assert_same_bits, make_params, set_grads, snapshot
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from twin_pairs import (
    assert_alike,
    contents,
    every_class,
    every_configuration,
    every_rival,
    few_configurations,
    like_every_rival,
    like_the_twin,
    loss_of,
    make_model,
    train,
)

SHAPES = ((6, 3), (5,), ())


@like_every_rival
@every_configuration
def test_gradient_accumulation(make):
    """Three backwards a step; zero_grad leaves zeros and None in turn."""
    model = make_model()
    optimizer = make(model.parameters())
    for i in range(12):
        loss_of(model, i).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_closure(make):
    """Runs once, before the step, with grad mode on; its loss comes back; the step is counted once."""
    model = make_model()
    optimizer = make(model.parameters())
    calls, losses = [], []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, len(calls))
        loss.backward()
        return loss

    for grad_mode in (torch.enable_grad, torch.no_grad, torch.enable_grad):
        with grad_mode():
            losses.append(optimizer.step(closure))
            losses.append(optimizer.step(closure=closure))
            calls.append(torch.is_grad_enabled())
    assert calls == [True, True, True, True, True, False, True, True, True]
    return [losses, contents(optimizer)]


RETURNS = {"nothing": None, "a-float": 1.5, "a-pair": (1.5, "aux"), "a-tensor": torch.tensor(2.0)}


@every_class
@pytest.mark.parametrize("returned", RETURNS)
def test_what_a_closure_returns_comes_back_as_it_is(cls, returned, backend) -> None:
    params = make_params(SHAPES)
    set_grads(params, 1)
    assert cls(params, backend=backend).step(lambda: RETURNS[returned]) is RETURNS[returned]


@like_every_rival
@every_configuration
def test_a_closure_that_takes_gradients_away(make):
    """The step sees the gradients as the closure leaves them."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    optimizer.step(lambda: set_grads(params, 1))
    set_grads(params, 2)
    optimizer.step(lambda: setattr(params[1], "grad", None))
    optimizer.step(optimizer.zero_grad)
    optimizer.step(lambda: set_grads(params, 3))
    return contents(optimizer)


@like_the_twin
@few_configurations
def test_a_closure_that_edits_the_optimizer(make):
    """Groups and parameters are read after the closure."""
    params = make_params(SHAPES, torch.float64)
    late = make_params(((4, 5),), torch.float64, seed=9)
    optimizer = make(params)

    def closure():
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": late, "lr": 0.3})
        optimizer.param_groups[0]["lr"] *= 0.5
        params[0].data = params[0].data * 0.9
        set_grads([*params, *late], 4)

    for _ in range(3):
        optimizer.step(closure)
    return contents(optimizer)


@like_the_twin
@few_configurations
def test_a_closure_that_steps(make):
    """A step within a step, as nested line searches do: the inner one is taken first."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)

    def inner():
        set_grads(params, 1)

    def outer():
        optimizer.step(inner)
        set_grads(params, 2)

    optimizer.step(outer)
    optimizer.step(outer)
    return contents(optimizer)


@every_class
def test_the_signature_of_step_is_the_twins(cls) -> None:
    ours, theirs = (inspect.signature(make(make_params()).step).parameters for make in (cls, TWINS[cls]))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def seen_by(seen: list, name: str):
    """A hook that notes its name, and what it was given beside the optimizer: dicts by their keys, tuples by length."""

    def hook(optimizer, *given):
        seen.append((name, [sorted(each) if isinstance(each, dict) else len(each) for each in given]))

    return hook


@like_the_twin
@every_configuration
def test_step_hooks(make):
    """Global pre, own pre, the closure, own post, global post; each with the arguments of the call."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(seen_by(seen, "global pre")),
        register_optimizer_step_post_hook(seen_by(seen, "global post")),
        optimizer.register_step_pre_hook(seen_by(seen, "pre 1")),
        optimizer.register_step_pre_hook(seen_by(seen, "pre 2")),
        optimizer.register_step_post_hook(seen_by(seen, "post 1")),
        optimizer.register_step_post_hook(seen_by(seen, "post 2")),
    ]
    try:
        set_grads(params, 1)
        optimizer.step()
        optimizer.step(lambda: seen.append("closure"))
        optimizer.step(closure=lambda: seen.append("closure"))
        for handle in handles[2:4]:
            handle.remove()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert [name for name, _ in seen[:6]] == ["global pre", "pre 1", "pre 2", "post 1", "post 2", "global post"]
    return contents(optimizer), seen


@like_every_rival
@few_configurations
def test_a_pre_hook_that_changes_the_arguments(make):
    """It may put in a closure, or replace the one that is there."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    seen = []

    def closure(seed):
        def evaluate():
            set_grads(params, seed)
            return seed

        return evaluate

    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure(1)), {}))
    seen += [optimizer.step(), optimizer.step(closure(2)), optimizer.step(closure=closure(3))]
    handle.remove()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "closure": closure(4)}))
    seen.append(optimizer.step())
    assert seen == [1, 1, 1, 4]
    return contents(optimizer), seen


@like_every_rival
@few_configurations
def test_hooks_that_write(make):
    """A pre-hook that clips and one that sets lr act on this step; a post-hook's in-place write on the next."""
    model = make_model()
    optimizer = make(model.parameters())

    def before(o, args, kwargs):
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        o.param_groups[0]["lr"] *= 0.8

    @torch.no_grad()
    def after(o, args, kwargs):
        for param in model.parameters():
            param.clamp_(-0.4, 0.4)
            o.state[param]["seen"] = 1

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    train(model, optimizer, 5)
    return contents(optimizer)


@every_class
def test_a_pre_hook_must_return_a_pair(cls, backend) -> None:
    params = make_params(SHAPES)
    set_grads(params, 1)
    optimizer = cls(params, backend=backend)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: args)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


@every_class
def test_hooks_belong_to_one_optimizer(cls) -> None:
    """Not to its class, nor to the twin; and they fire once, however many classes lie between."""
    seen = []

    class Mine(cls):
        def step(self, closure=None):
            seen.append("mine")
            return super().step(closure)

    class NoStepOfItsOwn(cls):
        pass

    params = make_params(SHAPES)
    set_grads(params, 1)
    counts = {}
    for make in (cls, NoStepOfItsOwn, TWINS[cls]):
        hooked, other = make(params), make(params)
        hooked.register_step_post_hook(lambda *_: seen.append("post"))
        seen.clear()
        other.step()
        hooked.step()
        counts[make] = list(seen)
    assert list(counts.values()) == [["post"]] * 3
    # A step that calls its parent's passes two hooked methods, as with the twin.
    mine = Mine(params)
    mine.register_step_post_hook(lambda *_: seen.append("post"))
    seen.clear()
    mine.step()
    assert seen == ["mine", "post", "post"]


@like_the_twin
@every_configuration
def test_state_dict_hooks(make):
    """All four kinds, `prepend` and returned replacements included, and a resume through them."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    seen = []
    optimizer.register_state_dict_pre_hook(seen_by(seen, "save pre"))
    optimizer.register_state_dict_pre_hook(seen_by(seen, "save pre, first"), prepend=True)
    optimizer.register_state_dict_post_hook(seen_by(seen, "save post"))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "extra": 7})
    optimizer.register_load_state_dict_pre_hook(seen_by(seen, "load pre"))
    optimizer.register_load_state_dict_pre_hook(seen_by(seen, "load pre, first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(seen_by(seen, "load post"))
    optimizer.register_load_state_dict_post_hook(seen_by(seen, "load post, first"), prepend=True)
    for i in range(4):
        set_grads(params, i)
        optimizer.step()
        if i == 1:
            state_dict = optimizer.state_dict()
            assert state_dict["extra"] == 7
            optimizer.load_state_dict(state_dict)
    assert [name for name, _ in seen] == [
        *("save pre, first", "save pre", "save post"),
        *("load pre, first", "load pre", "load post, first", "load post"),
    ]
    return contents(optimizer), seen


@like_the_twin
@few_configurations
def test_a_load_hook_may_unpack_a_checkpoint(make):
    """What is loaded is what the pre-hook returns; what it is given need not look like a state dict."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    set_grads(params, 1)
    optimizer.step()
    checkpoint = {"epoch": 3, "optimizer": optimizer.state_dict()}
    resumed = make(params)
    resumed.register_load_state_dict_pre_hook(lambda o, state_dict: state_dict["optimizer"])
    resumed.load_state_dict(checkpoint)
    set_grads(params, 2)
    resumed.step()
    return contents(resumed)


def test_a_load_hook_may_mend_what_our_checks_would_refuse() -> None:
    params = make_params(SHAPES)
    optimizer = FusedRegAdam(params)
    state_dict = FusedRegAdam(params, l1=0.5).state_dict()
    state_dict["param_groups"][0]["l1"] = "half"
    with pytest.raises(ValueError, match="Invalid l1 value: 'half'"):
        optimizer.load_state_dict(state_dict)

    def mend(optimizer, state_dict):
        groups = [{**group, "l1": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(mend)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["l1"] == 0.5


@like_the_twin
@every_configuration
def test_a_load_hook_that_writes_the_groups(make):
    """A post-hook runs when all is loaded; what it sets holds in the next step."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    set_grads(params, 1)
    optimizer.step()

    def halve(o):
        for group in o.param_groups:
            group["lr"] = 0.011
        for state in o.state.values():
            for name, value in state.items():
                if name != "step":
                    state[name] = value / 2

    optimizer.register_load_state_dict_post_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    set_grads(params, 2)
    optimizer.step()
    return contents(optimizer)


@every_rival
@every_configuration
def test_one_optimizer_per_parameter_in_the_backward(configuration, backend, rival) -> None:
    """The pattern that frees each gradient as soon as it is there: a step in a post-accumulate-grad hook."""

    def flow(make):
        model = make_model()
        optimizers = {param: make([param]) for param in model.parameters()}

        def step_at_once(param):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(step_at_once)
        for i in range(5):
            loss_of(model, i).backward()
        assert all(param.grad is None for param in model.parameters())
        return [contents(optimizer) for optimizer in optimizers.values()]

    # A norm would be each parameter's own, and is refused.
    options = {} if rival == "twin" else {"max_grad_norm": None}
    assert_alike(flow, configuration, backend, rival, **options)


@like_the_twin
@every_configuration
def test_a_step_invalidates_the_graph_that_saved_a_weight(make):
    """A second backward through old weights would be wrong; autograd sees our writes and says so, as for the twin."""
    model = make_model()
    optimizer = make(model.parameters())
    messages = []
    for _ in range(2):  # the second step reuses what the first has set up
        loss = loss_of(model, 1)
        loss.backward(retain_graph=True)
        versions = [param._version for param in model.parameters()]
        optimizer.step()
        assert all(param._version > v for param, v in zip(model.parameters(), versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            loss.backward()
        messages.append(caught.type)
        optimizer.zero_grad()
    return contents(optimizer), messages
