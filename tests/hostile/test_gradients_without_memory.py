"""Gradients, states and steps that no kernel can look into: as torch, or refused before anything has changed."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import OPTIMIZERS, TWINS, FusedRegAdam, FusedRegSGD, assert_same_bits, make_params, set_grads, snapshot
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

every_class = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)


class Wrapped(Tensor):
    """Keeps its numbers in another tensor, as subclasses do that log, quantize or wait: its own pointer is null."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(each):
            return each.inner if isinstance(each, Wrapped) else each

        return function(*map(unwrap, args), **(kwargs or {}))


class Partial(Wrapped):
    """Copies one half of it."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        target, source = args
        return target[::2].copy_(source.inner[::2])


class Closed(Wrapped):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"nobody may {function}")


def plain(grad: Tensor) -> Tensor:
    return grad


GRADIENTS = {"wrapped": Wrapped, "zero": lambda grad: torch._efficientzerotensor(grad.shape)}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("change", ["from-the-first-step", "later"])
@every_class
def test_as_with_a_plain_gradient(cls, change, kind, backend) -> None:
    """Also where a plan made for plain ones is there, and where plain ones come again."""
    results = []
    for is_plain in (True, False):
        params = make_params(((7, 13), (33,)))
        optimizer = cls(params, lr=0.05, l1=0.01, max_grad_norm=0.5, backend=backend)
        for step in range(4):
            set_grads(params, step)
            if step == 2 or (step == 0 and change == "from-the-first-step"):
                zeros = torch.zeros_like(params[0])
                grad = params[0].grad if kind == "wrapped" else zeros
                params[0].grad = grad if is_plain else GRADIENTS[kind](grad)
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("kind", [Closed, Partial])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_gradient_that_cannot_be_read_is_refused(is_first, kind, backend) -> None:
    params = make_params(((7, 13), (33,)))
    optimizer = FusedRegAdam(params, l1=0.01, max_grad_norm=0.5, backend=backend)
    if not is_first:
        set_grads(params, 0)
        optimizer.step()
    set_grads(params, 1)
    before = snapshot(optimizer)
    good, params[1].grad = params[1].grad, kind(params[1].grad)
    with pytest.raises(RuntimeError, match=f"a gradient is a {kind.__name__}, which has no plain memory to read"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    params[1].grad = good
    optimizer.step()


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors is in prototype stage")
def test_a_masked_gradient_is_refused() -> None:
    """What it says nothing of has numbers, too."""
    (param,) = make_params(((3, 4),))
    param.grad = torch.masked.masked_tensor(torch.ones(3, 4), torch.eye(3, 4, dtype=torch.bool))
    optimizer = FusedRegAdam([param], lr=0.1)
    with pytest.raises(RuntimeError, match="a gradient is a MaskedTensor"):
        optimizer.step()
    assert not optimizer.state
    assert_same_bits([param.detach()], [make_params(((3, 4),))[0].detach()])


def test_a_state_without_memory_goes_to_the_reference() -> None:
    results = []
    for wrap in (plain, Wrapped):
        params = make_params(((7, 13),))
        optimizer = FusedRegAdam(params, lr=0.05, l1=0.01)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
            if step == 0:
                optimizer.state[params[0]]["exp_avg"] = wrap(optimizer.state[params[0]]["exp_avg"])
        results.append(params[0].detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_freed_memory_is_refused(what, backend) -> None:
    """Wrappers that shard a model free its parameters between forward and backward passes."""
    params = make_params(((7, 13), (33,)))
    optimizer = FusedRegAdam(params, l1=0.01, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)[1:]
    tensor = params[0] if what == "parameter" else params[0].grad
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"Invalid {what}: its memory was freed"):
        optimizer.step()
    tensor.untyped_storage().resize_(size)
    assert_same_bits(snapshot(optimizer)[1:], before)


# -- modes that see torch's operations


@every_class
def test_a_traced_step_steps(cls) -> None:
    """The graph that make_fx records has the step in it, as the twin's has."""
    params = make_params(((7, 13), (33,)))
    optimizer = cls(params, lr=0.05, l1=0.01)
    set_grads(params, 0)
    optimizer.step()  # a plan is there

    def step(grad: Tensor) -> Tensor:
        params[0].grad = grad
        optimizer.step()
        return params[0].detach().clone()

    graph = make_fx(step)(torch.ones(7, 13))
    placeholder = next(iter(graph.graph.nodes))
    assert placeholder.users, "what the graph computes does not depend on the gradient"


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_a_mode_sees_the_step(cls) -> None:
    results = []
    for is_watched in (False, True):
        params = make_params(((7, 13), (33,)))
        optimizer = cls(params, lr=0.05, l1=0.01, max_grad_norm=0.5)
        for step in range(3):
            set_grads(params, step)
            if is_watched and step == 1:
                with FlopCounterMode(display=False):
                    optimizer.step()
            else:
                optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


def test_a_backend_by_name_under_a_mode_is_refused(backend) -> None:
    params = make_params(((7, 13),))
    optimizer = FusedRegAdam(params, backend=backend)
    set_grads(params, 0)
    before = snapshot(optimizer)
    with FlopCounterMode(display=False):
        if backend == "reference":
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match=r"a TorchDispatchMode .* is active"):
                optimizer.step()
            assert_same_bits(snapshot(optimizer), before)


# -- a parameter listed twice


@every_class
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_stepped_twice_or_refused(cls) -> None:
    for variant in cls.spec.variants.values():
        options = {"lr": 0.05, **variant}
        if "foreach" in inspect.signature(cls).parameters:
            options["foreach"] = False
        optimizers = []
        for make in (cls, TWINS[cls]):
            (param,) = make_params(((70, 130),))
            param.grad = torch.ones_like(param)
            optimizers.append(make([param, param], **options))
        ours, theirs = optimizers
        if cls.spec.counts_first_step(ours.param_groups[0]):
            with pytest.raises(ValueError, match="is listed twice, and its momentum would begin twice"):
                ours.step()
            continue
        for _ in range(3):
            ours.step()
            theirs.step()
        torch.testing.assert_close(snapshot(ours)[0], snapshot(theirs)[0])


def test_a_gradient_of_another_dtype_is_refused(backend) -> None:
    """torch lets a parameter say so (``grad_dtype``)."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    pairs = [
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float32),
        (torch.complex64, torch.float32),
    ]
    for ours, theirs in pairs:
        param = torch.ones(7, 13, dtype=ours, requires_grad=True)
        optimizer = FusedRegAdam([param], backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()
        before = snapshot(optimizer)
        param.grad = None
        param.grad_dtype = theirs
        param.grad = torch.ones(7, 13, dtype=theirs)
        with pytest.raises(ValueError, match=rf"Invalid gradient: its dtype is {theirs}, its parameter's {ours}"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


NARROW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("grad_dtype", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_gradients_are_widened(dtype, grad_dtype, backend) -> None:
    """float32 holds all of them: a step is the one in float32, up to the rounding of the weights."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    if backend not in ("cpp", "reference"):
        pytest.skip("it takes gradients of the parameter's dtype")
    options = {"lr": 0.1, "l1": 0.01, "weight_decay": 0.1, "clip_value": 1.5, "max_grad_norm": 2.0}
    params = make_params(((37, 53), (5,), (), (1029,)), dtype)
    wide = [param.detach().to(torch.float32, copy=True).requires_grad_() for param in params]
    ours = FusedRegAdam(params, backend=backend, state_dtype=torch.float32, **options)
    theirs = FusedRegAdam(wide, backend="reference", **options)
    for step in range(4):
        its = grad_dtype if step % 2 == 0 else dtype  # it changes, in one plan
        for i, (param, other) in enumerate(zip(params, wide, strict=True)):
            grad = make_params((param.shape,), its, seed=10 * step + i)[0].detach()
            param.grad = None
            param.grad_dtype = its
            param.grad = grad.mT.contiguous().mT if step == 3 and grad.ndim == 2 else grad
            other.grad = grad.float()
            with torch.no_grad():
                other.copy_(param)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, theirs.grad_norm)
        for param, other in zip(params, wide, strict=True):
            assert param.grad.dtype == its
            pairs = [(ours.state[param][name], theirs.state[other][name]) for name in ("exp_avg", "exp_avg_sq")]
            for one, two in [(param.detach(), other.detach().to(dtype)), *pairs]:
                tolerance = max(2 * torch.finfo(one.dtype).eps, 1e-5)
                torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * 1e-2)
