"""Nothing outlives its use: a deleted optimizer frees its parameters, at once where nothing refers back to it.

A plan in C++ holds Python objects that Python's garbage collector does not see there. So what it holds must be seen
elsewhere, or a cycle through a parameter would never be freed.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import OPTIMIZERS, TWINS, FusedRegAdam, FusedRegSGD, make_params, regularized, run, set_grads


@pytest.fixture(autouse=True, scope="module")
def _only_what_comes_now():
    """The collector need not walk what was there before: the tests take a third of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


every_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS)


@pytest.fixture
def no_collector():
    """References alone must free. What a first step leaves behind, torch's lazy imports, does not count."""
    after_a_step(FusedRegAdam)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def after_a_step(cls, **options):
    params = make_params()
    params.append(torch.zeros(9, 2)[:, 0].requires_grad_())  # staged: copied for a step
    optimizer = cls(params, **options)
    run(optimizer, params, 2)
    return optimizer, params


def watch(optimizer, params) -> list[weakref.ref]:
    watched = [optimizer, *params, *(param.grad for param in params)]
    watched += [value for state in optimizer.state.values() for value in state.values()]
    return [weakref.ref(thing) for thing in watched]


def alive(references: list[weakref.ref]) -> list[str]:
    things = [thing for reference in references if (thing := reference()) is not None]
    return [f"{type(thing).__name__}{tuple(getattr(thing, 'shape', ()))}" for thing in things]


@every_optimizer
def test_a_deleted_optimizer_frees_everything_at_once(cls, backend, no_collector) -> None:
    optimizer, params = after_a_step(cls, backend=backend, **regularized(cls))
    references = watch(optimizer, params)
    del optimizer, params
    assert alive(references) == []


@every_optimizer
def test_an_optimizer_does_not_keep_parameters_that_left_it(cls, backend, no_collector) -> None:
    """From the next step on, as with the twin."""
    optimizer, params = after_a_step(cls, backend=backend, **regularized(cls))
    references = [weakref.ref(params[0]), weakref.ref(params[0].grad)]
    optimizer.param_groups[0]["params"].pop(0)
    optimizer.state.pop(params[0], None)
    gains = optimizer.param_groups[0].pop("momentum_gain", None)
    del params[0], gains
    set_grads(params, 5)
    optimizer.step()
    assert alive(references) == []


@every_optimizer
def test_a_step_keeps_no_gradient(cls, backend, no_collector) -> None:
    """zero_grad(), which sets None, gives the memory back."""
    optimizer, params = after_a_step(cls, backend=backend, **regularized(cls))
    references = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert alive(references) == []


def parameter_that_knows_its_optimizer(optimizer, params) -> None:
    params[0].optimizer = optimizer


def optimizer_that_knows_itself(optimizer, params) -> None:
    optimizer.myself = optimizer


def hook_on_the_optimizer(optimizer, params) -> None:
    optimizer.register_step_post_hook(lambda *_: optimizer)


def group_that_knows_its_optimizer(optimizer, params) -> None:
    optimizer.param_groups[0]["owner"] = optimizer


def scheduler(optimizer, params) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)


CYCLES = [
    parameter_that_knows_its_optimizer,
    optimizer_that_knows_itself,
    hook_on_the_optimizer,
    group_that_knows_its_optimizer,
    scheduler,
]


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("kind", ["twin", "ours"])
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_a_cycle_is_collected(cls, kind, cycle, backend) -> None:
    """The twin's are: that is what makes it a test of ours."""
    options = {"momentum": 0.9} if cls is FusedRegSGD else {}
    if kind == "twin":
        optimizer, params = after_a_step(TWINS[cls], lr=0.1, **options)
    else:
        optimizer, params = after_a_step(cls, lr=0.1, backend=backend, **options)
    cycle(optimizer, params)
    run(optimizer, params, 1)
    references = watch(optimizer, params)
    del optimizer, params
    gc.collect()
    assert alive(references) == []


@every_optimizer
def test_steps_do_not_pile_up(cls, backend) -> None:
    """The number of tensors stays the same over steps, new plans, checkpoints and refused steps."""
    optimizer, params = after_a_step(cls, backend=backend, **regularized(cls))

    def much() -> int:
        run(optimizer, params, 3)
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, params, 1)
        params[0].data = params[0].data.clone()
        params[1].grad = None
        optimizer.step()
        optimizer.param_groups[0]["l1"] = -1.0
        with pytest.raises(ValueError, match="Invalid l1"):
            optimizer.step()
        optimizer.param_groups[0]["l1"] = 0.1
        run(optimizer, params, 1)
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    much()
    assert much() == much()


@every_optimizer
def test_a_parameter_is_still_itself_after_its_optimizer(cls, backend) -> None:
    """Python's object of a parameter, with its attributes and hooks, is not replaced while C++ holds the tensor."""
    optimizer, params = after_a_step(cls, backend=backend, **regularized(cls))
    param = params[0]
    param.note = "kept"
    identity = id(param)
    del params, param
    gc.collect()
    param = optimizer.param_groups[0]["params"][0]
    assert id(param) == identity
    assert param.note == "kept"
    del optimizer
    gc.collect()
    assert param.note == "kept"
    (param * 2).sum().backward()
    assert param.grad is not None
