"""Whatever raises, wherever: a step is taken wholly or not at all.

Errors come from the closure, from hooks, from allocations that fail; and, by a tracer, as a KeyboardInterrupt at every
single line that a step runs through. After a step that was not taken everything is as it was, and the next one gives
the same bits as if nothing had been.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from helpers import FusedRegAdam, FusedRegSGD, assert_same_bits, make_params, regularized, set_grads
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedreg
from fusedreg.backends.cpp import CppPlan
from fusedreg.backends.device_plan import DevicePlan
from fusedreg.backends.reference import ReferencePlan

SHAPES = ((4, 3), (5,), (2, 6))
CONFIGURATIONS = {
    "adam": (FusedRegAdam, {"amsgrad": True}),
    # A buffer that nobody counted takes another gain, and is damped: what an untaken step leaves behind would show.
    "sgd": (FusedRegSGD, {"momentum": 0.9, "dampening": 0.5}),
}
# With a seed that must move with the step.
ROUNDED = {
    "rounded": (FusedRegSGD, {"momentum": 0.9, "state_dtype": torch.bfloat16, "stochastic_rounding": True}),
    "codes": (FusedRegSGD, {"momentum": 0.9, "state_dtype": "int8", "stochastic_rounding": True}),
}
PLANS = {"cpp": CppPlan, "cuda": DevicePlan, "triton": DevicePlan, "reference": ReferencePlan}

every_rule = pytest.mark.parametrize("rule", CONFIGURATIONS)
every_stage = pytest.mark.parametrize("steps", [0, 2], ids=["first-step", "third-step"])


class Stop(Exception):
    pass


def make(rule: str, backend: str, steps: int):
    """An optimizer after some steps, with the gradients of the next one. One parameter has gaps, and is copied."""
    cls, flags = (CONFIGURATIONS | ROUNDED)[rule]
    params = make_params(SHAPES)
    params[1] = torch.zeros(10)[::2].copy_(params[1].detach()).requires_grad_()
    optimizer = cls(params, backend=backend, **{**regularized(cls), **flags})
    for i in range(steps):
        set_grads(params, i)
        optimizer.step()
    set_grads(params, steps)
    return optimizer, params


def everything(optimizer, params) -> list[Any]:
    """Keys, values and bits of parameters, gradients, state and groups."""
    found: list[Any] = []
    for param in params:
        found += [param.detach().clone(), param.grad.clone(), param in optimizer.state]
        found += [(name, copy.deepcopy(value)) for name, value in optimizer.state.get(param, {}).items()]
    for group in optimizer.param_groups:
        found += [(name, copy.deepcopy(value)) for name, value in group.items() if name != "params"]
    return found


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, tuple):
            assert x[0] == y[0]
            x, y = x[1], y[1]
        if isinstance(x, torch.Tensor):
            assert_same_bits([x], [y])
        else:
            assert x == y


def finish(optimizer, params, first: int, last: int = 5) -> list[Any]:
    for i in range(first, last):
        set_grads(params, i)
        optimizer.step()
    return everything(optimizer, params)


def undisturbed(rule: str, backend: str) -> list[Any]:
    return finish(*make(rule, backend, 0), 0)


def assert_refused(optimizer, params, error: type[BaseException], *closure) -> None:
    before = everything(optimizer, params)
    with pytest.raises(error):
        optimizer.step(*closure)
    assert_same(before, everything(optimizer, params))


def fail(*_: object) -> None:
    raise Stop


# -- closures and hooks


@every_rule
@every_stage
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_in_the_closure(rule, steps, error, backend) -> None:
    optimizer, params = make(rule, backend, steps)

    def closure() -> None:
        raise error

    assert_refused(optimizer, params, error, closure)
    assert_same(finish(optimizer, params, steps), undisturbed(rule, backend))


@every_rule
@every_stage
@pytest.mark.parametrize("whose", ["optimizer", "global"])
def test_an_error_in_a_pre_hook(rule, steps, whose, backend) -> None:
    optimizer, params = make(rule, backend, steps)
    register = optimizer.register_step_pre_hook if whose == "optimizer" else register_optimizer_step_pre_hook
    with register(fail):
        assert_refused(optimizer, params, Stop)
    assert_same(finish(optimizer, params, steps), undisturbed(rule, backend))


@every_rule
@every_stage
@pytest.mark.parametrize("whose", ["optimizer", "global"])
def test_an_error_in_a_post_hook_comes_after_a_whole_step(rule, steps, whose, backend) -> None:
    optimizer, params = make(rule, backend, steps)
    register = optimizer.register_step_post_hook if whose == "optimizer" else register_optimizer_step_post_hook
    with register(fail), pytest.raises(Stop):
        optimizer.step()
    assert_same(finish(optimizer, params, steps + 1), undisturbed(rule, backend))


@every_rule
def test_an_error_in_a_state_dict_hook(rule, backend) -> None:
    optimizer, params = make(rule, backend, 2)
    before = everything(optimizer, params)
    for register in (optimizer.register_state_dict_pre_hook, optimizer.register_state_dict_post_hook):
        with register(fail), pytest.raises(Stop):
            optimizer.state_dict()
    assert_same(before, everything(optimizer, params))
    assert_same(finish(optimizer, params, 2), undisturbed(rule, backend))


@every_rule
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_a_load_state_dict_hook(rule, when, backend) -> None:
    """Before: nothing is loaded. After: all is."""
    saved = copy.deepcopy(make(rule, backend, 3)[0].state_dict())
    optimizer, params = make(rule, backend, 2)
    before = everything(optimizer, params)
    pre, post = optimizer.register_load_state_dict_pre_hook, optimizer.register_load_state_dict_post_hook
    register = pre if when == "before" else post
    with register(fail), pytest.raises(Stop):
        optimizer.load_state_dict(copy.deepcopy(saved))  # it keeps tensors that fit as they are
    if when == "before":
        assert_same(before, everything(optimizer, params))
        assert_same(finish(optimizer, params, 2), undisturbed(rule, backend))
    else:
        other, its_params = make(rule, backend, 2)
        other.load_state_dict(saved)
        assert_same(finish(optimizer, params, 2), finish(other, its_params, 2))


@every_rule
@pytest.mark.parametrize("wrong", ["groups", "params", "no state"])
def test_a_state_dict_that_does_not_fit(rule, wrong, backend) -> None:
    optimizer, params = make(rule, backend, 2)
    saved = copy.deepcopy(make(rule, backend, 3)[0].state_dict())
    if wrong == "groups":
        saved["param_groups"].append(saved["param_groups"][0])
    elif wrong == "params":
        saved["param_groups"][0]["params"].pop()
    else:
        del saved["state"]
    before = everything(optimizer, params)
    with pytest.raises((ValueError, KeyError)):
        optimizer.load_state_dict(saved)
    assert_same(before, everything(optimizer, params))
    assert_same(finish(optimizer, params, 2), undisturbed(rule, backend))


# -- what fails inside


@contextlib.contextmanager
def fails_at_call(monkeypatch, owner: object, name: str, number: int, error: type[BaseException]):
    """The number-th call of a function raises."""
    real, calls = getattr(owner, name), 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield
    assert calls >= number, "never called so often: nothing was tested"


@every_rule
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_state_that_cannot_be_made(rule, number, error, backend, monkeypatch) -> None:
    optimizer, params = make(rule, backend, 0)
    with fails_at_call(monkeypatch, torch, "zeros_like", number, error):
        assert_refused(optimizer, params, error)
    assert_same(finish(optimizer, params, 0), undisturbed(rule, backend))


@every_rule
@every_stage
@pytest.mark.parametrize("function", ["set_groups", "refresh", "sum_of_squares"])
def test_a_plan_that_fails_before_its_update(rule, steps, function, backend, monkeypatch) -> None:
    optimizer, params = make(rule, backend, steps)
    optimizer.param_groups[0]["lr"] *= 2  # or set_groups would have nothing to do
    with fails_at_call(monkeypatch, PLANS[backend], function, 1, MemoryError):
        assert_refused(optimizer, params, MemoryError)
    optimizer.param_groups[0]["lr"] /= 2
    assert_same(finish(optimizer, params, steps), undisturbed(rule, backend))


@every_rule
@every_stage
def test_a_grad_scale_of_zero(rule, steps, backend) -> None:
    """Where 1 / grad_scale has no value: refused, as everything that cannot be done, before anything has changed."""
    optimizer, params = make(rule, backend, steps)
    optimizer.grad_scale = torch.tensor(0.0)
    assert_refused(optimizer, params, ZeroDivisionError)
    del optimizer.grad_scale
    assert_same(finish(optimizer, params, steps), undisturbed(rule, backend))


class InterruptAtLine:
    """A KeyboardInterrupt at the number-th line that runs in fusedreg's own files."""

    FOLDER = str(Path(fusedreg.__file__).parent)

    def __init__(self, number: int) -> None:
        self.left, self.where = number, ""

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.FOLDER):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> InterruptAtLine:
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@needs_cpp
@pytest.mark.parametrize("rule", [*CONFIGURATIONS, *ROUNDED])
@every_stage
@pytest.mark.parametrize("lr_factor", [1, 2], ids=["same-lr", "new-lr"])
def test_a_keyboard_interrupt_at_any_line(rule, steps, lr_factor) -> None:
    """The reference moves parameter by parameter; the C++ backend's update is one call, which no signal cuts short."""

    def start():
        optimizer, params = make(rule, "cpp", steps)
        optimizer.param_groups[0]["lr"] *= lr_factor
        return optimizer, params

    truth = finish(*start(), steps)
    taken = not_taken = 0
    for number in range(1, 10_000):
        optimizer, params = start()
        before = [param.detach().clone() for param in params]
        interrupt = InterruptAtLine(number)
        try:
            with interrupt:
                optimizer.step()
        except KeyboardInterrupt:
            moved = [not a.equal(b) for a, b in zip(before, params, strict=True)]
            assert all(moved) or not any(moved), f"half a step after an interrupt at {interrupt.where}"
            taken, not_taken = taken + all(moved), not_taken + (not any(moved))
            try:
                assert_same(finish(optimizer, params, steps + all(moved)), truth)
            except AssertionError:
                pytest.fail(f"after an interrupt at {interrupt.where}, the next steps are other ones")
        else:
            break
    assert not_taken > 30
    assert taken >= 1


# -- steps inside of steps, and what may run in the middle of one


@every_rule
def test_a_closure_that_takes_steps_itself(rule, backend) -> None:
    optimizer, params = make(rule, backend, 0)

    def closure(depth: int) -> float:
        set_grads(params, 2 - depth)
        if depth:
            assert optimizer.step(lambda: closure(depth - 1)) == depth - 1
        set_grads(params, depth)
        return depth

    optimizer.step(lambda: closure(2))
    other, its_params = make(rule, backend, 0)
    for i in range(3):
        set_grads(its_params, i)
        other.step()
    assert_same(everything(optimizer, params), everything(other, its_params))


@every_rule
def test_nothing_of_the_users_runs_between_the_norm_and_the_update(rule, backend, monkeypatch) -> None:
    """So no hook can replace a gradient that was measured, and that the update is about to read."""
    optimizer, params = make(rule, backend, 1)
    for param in params:
        param.register_hook(fail)
        param.register_post_accumulate_grad_hook(fail)
    seen: list[str] = []

    def profile(frame, event, _) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            # what a dataclass wrote for itself stands in no file: the one that it was written for
            seen.append(frame.f_globals["__file__"] if file.startswith("<") else file)

    measure, update = PLANS[backend].sum_of_squares, PLANS[backend].update

    def measure_and_watch(plan, step):
        result = measure(plan, step)
        sys.setprofile(profile)
        return result

    def stop_and_update(plan, step) -> None:
        sys.setprofile(None)
        update(plan, step)

    monkeypatch.setattr(PLANS[backend], "sum_of_squares", measure_and_watch)
    monkeypatch.setattr(PLANS[backend], "update", stop_and_update)
    optimizer.step()
    ours = (InterruptAtLine.FOLDER, __file__, *(str(Path(module.__file__).parent) for module in (torch, contextlib)))
    assert [name for name in seen if not name.startswith(ours)] == []
    assert __file__ in seen  # the update was reached under the profiler
