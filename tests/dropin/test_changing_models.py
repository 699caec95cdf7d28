"""Models that change in mid-training: frozen layers, swapped data, other dtypes, tied, parametrized and lazy weights.

What the step keeps between calls (its plan) must notice each of these, and go on as the twin does.
"""

from __future__ import annotations

import copy
import gc
import inspect
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import (
    REGULARIZED,
    TWINS,
    FusedRegAdam,
    assert_same_bits,
    known,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from twin_pairs import (
    CONFIGURATIONS,
    OURS_ALONE,
    assert_alike,
    assert_close,
    contents,
    every_class,
    every_configuration,
    every_rival,
    few_configurations,
    like_every_rival,
    like_the_twin,
    loss_of,
    make_model,
    on_default_device,
    plain,
    train,
)

SHAPES = ((6, 3), (5,), (), (2, 3, 5))


pytestmark = pytest.mark.usefixtures("in_one_thread")


# -- gradients that come and go


@like_every_rival
@every_configuration
def test_layers_frozen_and_unfrozen(make):
    """A frozen layer has no gradient: it stays, its state and count too, and goes on from there."""
    model = make_model()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    train(model, optimizer, 3, seed=10)
    assert model[0].weight.equal(frozen)
    model[0].requires_grad_(True)
    model[2].weight.requires_grad_(False)
    train(model, optimizer, 2, seed=20)
    model.requires_grad_(True)
    train(model, optimizer, 2, seed=30)
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_frozen_with_a_gradient_left(make):
    """requires_grad_(False) keeps an old gradient; what counts is the gradient, and the parameter is stepped."""
    params = make_params(SHAPES, torch.float64)
    params[1].requires_grad_(False)
    optimizer = make(params)
    for i in range(4):
        set_grads(params, i)
        params[0].requires_grad_(i % 2 == 0)
        optimizer.step()
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_gradients_that_come_and_go(make):
    """Each parameter has a gradient in its own subset of ten steps, in one step none has."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    for i in range(10):
        set_grads(params, i)
        for k, param in enumerate(params):
            if i == 6 or (i >> k) % 2:
                param.grad = None
        optimizer.step()
    return contents(optimizer)


@like_every_rival
@every_configuration
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_zero_grad(make, set_to_none):
    """After None nothing moves; after zeros the moments decay and momentum carries on."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((param.grad is None) == set_to_none for param in params)
    before = snapshot(optimizer)
    optimizer.step()
    optimizer.step()
    if set_to_none:
        assert_same_bits(before, snapshot(optimizer))
    return contents(optimizer)


@every_class
def test_zero_grad_by_default_and_on_a_graph(cls) -> None:
    """None by default; zeros are written in place, into a gradient cut from its graph."""
    params = make_params(SHAPES)
    optimizer = cls(params)
    set_grads(params, 1)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    param = params[0]
    param.grad = gradient = (param * 2).sin()
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is gradient
    assert gradient.grad_fn is None
    assert not gradient.any()


@like_the_twin
@few_configurations
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_with_a_graph(make):
    """backward(create_graph=True) leaves gradients that require gradients themselves."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    for _ in range(3):
        optimizer.zero_grad()
        sum((param**3).sum() for param in params).backward(create_graph=True)
        assert params[0].grad.requires_grad
        optimizer.step()
    optimizer.zero_grad()
    assert not any(tensor.requires_grad for state in optimizer.state.values() for tensor in state.values())
    return contents(optimizer)


@every_class
def test_gradients_are_let_go(cls, backend) -> None:
    """A step keeps no gradient alive: after zero_grad its memory is free."""
    (param,) = make_params(((5, 3),))
    optimizer = cls([param], backend=backend)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        gradient = weakref.ref(param.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gradient() is None


@every_class
@pytest.mark.parametrize("is_regularized", [False, True])
def test_a_model_is_let_go_with_its_optimizer(cls, is_regularized, backend) -> None:
    """At once, as with the twin, not when the collector of cycles comes by: on a GPU that is memory."""
    gc.disable()
    try:
        ours = {"backend": backend, **(regularized(cls) if is_regularized else {})}
        for make, more in ((TWINS[cls], {}), (cls, ours)):
            params = make_params(((5, 3), (4,)))
            optimizer = make(params, **more)
            run(optimizer, params, 2)
            optimizer.zero_grad()
            kept = [weakref.ref(param) for param in params]
            kept += [weakref.ref(tensor) for state in optimizer.state.values() for tensor in state.values()]
            del params, optimizer
            assert [reference for reference in kept if reference() is not None] == [], make
    finally:
        gc.enable()


# -- parameters' data


@like_every_rival
@every_configuration
def test_data_swapped(make):
    """p.data = ...: new values, another layout, a view of something larger; and in-place writes between steps."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    params[0].data = params[0].data * 2
    run(optimizer, params, 1, first_seed=1)
    params[3].data = params[3].data.transpose(0, 2).contiguous().transpose(0, 2)
    run(optimizer, params, 1, first_seed=2)
    wider = torch.full((6, 8), 7.0, dtype=torch.float64)
    wider[:, 1::3].copy_(params[0].detach())
    params[0].data = wider[:, 1::3]
    run(optimizer, params, 2, first_seed=3)
    assert (wider[:, ::3] == 7).all()
    with torch.no_grad():
        params[1].mul_(0.5)
        params[2].fill_(0.25)
    run(optimizer, params, 1, first_seed=5)
    return contents(optimizer)


@like_the_twin
@few_configurations
@pytest.mark.parametrize("assign", [False, True])
def test_a_models_state_dict_loaded_in_mid_training(make, assign):
    """With assign=True the model gets new parameters, and the optimizer keeps the old ones, as the twin does."""
    model = make_model()
    optimizer = make(model.parameters())
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    model.load_state_dict(saved, assign=assign)
    train(model, optimizer, 2, seed=5)
    return [contents(optimizer), list(model.state_dict().values())]


@pytest.mark.parametrize(
    "configuration", ["adam", "adam-amsgrad", "adamw", "sgd-dampening", "rmsprop-centered-momentum"]
)
def test_a_shape_that_does_not_fit_the_state(configuration, backend) -> None:
    """A parameter resized under its state: an error, as the twin's, and nothing has moved."""
    cls, flags = CONFIGURATIONS[configuration]
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend})):
        params = make_params(((5,), (2, 4)))
        optimizer = make(params, **plain(cls), **flags, **more)
        run(optimizer, params, 2)
        params[0].grad, params[0].data = None, torch.ones(3, 5)
        set_grads(params, 3)
        before = snapshot(optimizer)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
        if make is cls:  # the twin's Adam has counted the step
            assert_same_bits(before, snapshot(optimizer))


# -- dtypes


@every_rival
@every_configuration
def test_a_model_moved_to_another_dtype(configuration, backend, rival) -> None:
    """model.double(), and the state after it by load_state_dict, as the documentation of torch has it."""

    def flow(make):
        model = make_model(torch.float32)
        optimizer = make(model.parameters())
        train(model, optimizer, 2, dtype=torch.float32)
        optimizer.zero_grad()
        model.double()
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 2, seed=5)
        assert all(param.dtype == torch.float64 for param in model.parameters())
        return contents(optimizer)

    assert_alike(flow, configuration, backend, rival, dtype=torch.float32)


@few_configurations
def test_a_model_moved_by_swapping_its_parameters(configuration, backend) -> None:
    """torch.__future__: .double() and load_state_dict then exchange what is behind a parameter, and keep the object.

    torch refuses that where somebody else holds on to the tensor; between steps nobody may.
    """

    def flow(make):
        model = make_model(torch.float32)
        optimizer = make(model.parameters())
        train(model, optimizer, 2, dtype=torch.float32)
        optimizer.zero_grad()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            train(model, optimizer, 1, seed=5, dtype=torch.float32)
            optimizer.zero_grad()
            model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 2, seed=7)
        return contents(optimizer)

    assert_alike(flow, configuration, backend, dtype=torch.float32)


def test_state_of_another_dtype_goes_to_the_reference() -> None:
    """Moved without load_state_dict; torch's Adam raises there."""
    params = make_params(((5, 5),))
    optimizer = FusedRegAdam(params, **REGULARIZED)
    run(optimizer, params, 1)
    params[0].data, params[0].grad = params[0].data.bfloat16(), None
    run(optimizer, params, 1)
    assert params[0].dtype == torch.bfloat16
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@every_rival
@pytest.mark.parametrize("configuration", ["adam-amsgrad", "adamw", "sgd-dampening", "rmsprop-centered-momentum"])
@pytest.mark.parametrize("grouped", ["one-group", "a-group-each"])
def test_parameters_of_several_dtypes(configuration, grouped, backend, rival) -> None:
    """Together in one group, and in groups with options of their own; each as exact as its dtype allows.

    Adam's twin is the fused one, which computes 16 bits in float32 as ours does. SGD's is the for-loop: torch's fused
    SGD starts on a CPU, in 16 bits, from a momentum buffer that nobody has written.
    """
    options = [{"lr": 0.05}, {"lr": 0.02, "weight_decay": 0.3}, {"lr": 0.1, "maximize": True}, {}]
    # where gradients are near 0, Adam's direction in 16 bits is one of chance
    more = {"eps": 1e-2, "fused": True} if "adam" in configuration else {}

    def flow(make):
        params = [param for dtype in DTYPES for param in make_params(((7, 13), (33,)), dtype)]
        groups = [{"params": params[2 * i : 2 * i + 2], **options[i]} for i in range(len(DTYPES))]
        optimizer = make(groups if grouped == "a-group-each" else params, **more)
        run(optimizer, params, 4)
        return contents(optimizer)

    assert_alike(flow, configuration, backend, rival)


def test_the_default_dtype_decides_the_step_counts(backend) -> None:
    """torch.set_default_dtype(float64) makes them float64, unless fused; counts that are there stay as they are."""
    before = torch.get_default_dtype()
    try:
        for default in (torch.float64, torch.float32, torch.bfloat16):
            for options in ({}, {"fused": True}):

                def flow(make, default=default, options=options):
                    torch.set_default_dtype(default)
                    params = make_params(SHAPES, torch.float64)
                    late = make_params(((3,),), torch.float64)
                    optimizer = make(params, **options)
                    run(optimizer, params, 2)
                    torch.set_default_dtype(torch.float32)
                    optimizer.add_param_group({"params": late})
                    run(optimizer, [*params, *late], 2)
                    found = contents(optimizer)
                    resumed = make([{"params": params}, {"params": late}], **options)
                    resumed.load_state_dict(optimizer.state_dict())
                    run(resumed, [*params, *late], 1)
                    return [found, contents(resumed)]

                assert_alike(flow, "adam-amsgrad", backend)
    finally:
        torch.set_default_dtype(before)


@every_rival
@every_configuration
def test_the_default_device_is_not_the_parameters(configuration, backend, rival) -> None:
    """torch.set_default_device names where new tensors go. A step on parameters elsewhere must not care.

    "meta" stands for any other device: whatever is made there by mistake holds no data. Only ours runs under it:
    the twin's Adam made that mistake before torch 2.12.
    """
    devices = iter(["meta", torch.get_default_device()])

    def flow(make):
        params = make_params(((6, 3), (5,)), torch.float64)
        with torch.device(next(devices)):
            optimizer = make(params)
            run(optimizer, params, 3)
        return contents(optimizer)

    assert_alike(flow, configuration, backend, rival)


def test_a_clipped_step_under_another_default_device(backend) -> None:
    """The norm, and the check of strides that interleave, make tensors of their own."""
    results = []
    for device in (torch.get_default_device(), "meta"):
        params = make_params(((6, 3), (5,)), torch.float64)
        params.append(torch.zeros(8, dtype=torch.float64).as_strided((3, 2), (2, 3)).requires_grad_())
        optimizer = FusedRegAdam(params, lr=0.1, max_grad_norm=1.0, backend=backend)
        with torch.device(device):
            run(optimizer, params, 2)
        results.append([optimizer.grad_norm, *contents(optimizer)])
    assert_close(results[1], results[0])


# -- modules of other kinds


@like_every_rival
@few_configurations
def test_tied_weights(make):
    """One parameter in two layers: it is listed, and stepped, once."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    for seed, param in enumerate(model.parameters()):
        param.data.copy_(on_default_device(param.shape, seed))
    model[2].weight = model[0].weight
    optimizer = make(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 3
    train(model, optimizer, 4)
    return contents(optimizer)


@every_rival
@few_configurations
def test_weights_tied_in_mid_training(configuration, backend, rival) -> None:
    """Two parameters come to share memory, and part again. The twin steps them one after the other.

    Backend "cpp" refuses that where it is asked for by name; "auto" then takes the reference.
    """

    def flow(make):
        params = make_params(((4, 3), (4, 3), (5,)), torch.float64)
        optimizer = make(params)
        run(optimizer, params, 2)
        params[1].data = params[0].data
        run(optimizer, params, 2, first_seed=5)
        params[1].data = params[1].data.clone()
        run(optimizer, params, 2, first_seed=9)
        return contents(optimizer)

    assert_alike(flow, configuration, "auto" if backend == "cpp" else backend, rival, foreach=False)


PARAMETRIZATIONS = {
    "weight-norm": lambda module: parametrizations.weight_norm(module),
    "spectral-norm": lambda module: parametrizations.spectral_norm(module),
    "orthogonal": lambda module: parametrizations.orthogonal(module),
}


@like_every_rival
@few_configurations
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_modules(make, name):
    """And parametrized in mid-training: the old parameter goes, and the new ones come in a group of their own."""
    torch.manual_seed(3)  # spectral norm starts at random
    model = make_model()
    PARAMETRIZATIONS[name](model[0])
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    known = set(model.parameters())
    torch.manual_seed(4)
    PARAMETRIZATIONS[name](model[2])
    optimizer.add_param_group({"params": [param for param in model.parameters() if param not in known]})
    train(model, optimizer, 2, seed=10)
    parametrize.remove_parametrizations(model[0], "weight")
    return [contents(optimizer), model[0].weight.detach()]


@like_every_rival
@few_configurations
def test_functional_calls_and_func_grad(make):
    """Gradients by torch.func over stacked models, set by hand."""
    models = [make_model() for _ in range(3)]
    for i, model in enumerate(models):
        model[0].weight.data.mul_(1 + i)
    params, buffers = torch.func.stack_module_state(models)
    optimizer = make(params.values())
    base = models[0]

    def loss(params, x):
        return (torch.func.functional_call(base, (params, buffers), (x,)) - 1).square().mean()

    for i in range(4):
        x = on_default_device((3, 11, 5), i)
        gradients = torch.func.vmap(torch.func.grad(loss))({k: v.detach() for k, v in params.items()}, x)
        for name, param in params.items():
            param.grad = gradients[name]
        optimizer.step()
    return contents(optimizer)


@every_class
def test_a_step_inside_a_transform_is_refused(cls, backend) -> None:
    """A gradient that exists only inside torch.func.grad has no memory. As with the twin: an error, nothing moves."""
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend})):
        (param,) = make_params(((5,),))
        optimizer = make([param], **more)
        before = param.detach().clone()

        def step(x, param=param, optimizer=optimizer):
            param.grad = x * 2
            optimizer.step()
            return x.sum()

        with pytest.raises(RuntimeError):
            torch.func.grad(step)(torch.ones(5))
        assert param.equal(before)


@like_the_twin
@few_configurations
def test_shared_memory(make):
    """share_memory() in mid-training moves the storage of every parameter; a peer's view sees the next step."""
    model = make_model()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    model.share_memory()
    if torch.get_default_device().type == "cpu":
        assert model[0].weight.is_shared()
    peer = model[0].weight.detach()
    train(model, optimizer, 2, seed=10)
    assert peer.equal(model[0].weight)
    return contents(optimizer)


@like_every_rival
@few_configurations
def test_lazy_modules(make):
    """The optimizer takes parameters that have no shape yet, steps past them, and finds them when they have one."""
    lazy = nn.Sequential(nn.LazyLinear(7, dtype=torch.float64), nn.Tanh(), nn.Linear(7, 3, dtype=torch.float64))
    optimizer = make(lazy.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert isinstance(lazy[0].weight, nn.UninitializedParameter)
    lazy(on_default_device((2, 5), 1))
    lazy.load_state_dict(make_model().state_dict())
    train(lazy, optimizer, 3)
    return contents(optimizer)


class Tagged(nn.Parameter):
    """A user's own subclass, plain memory underneath."""


@like_every_rival
@few_configurations
def test_parameter_subclasses_and_plain_tensors(make):
    """A subclass of Parameter, a Buffer, a plain tensor that requires grad and one that does not."""
    first, second, third, fourth = (param.detach() for param in make_params(SHAPES, torch.float64))
    params = [Tagged(first), nn.Buffer(second), third.requires_grad_(), fourth]
    optimizer = make(params)
    run(optimizer, params, 3)
    assert type(optimizer.param_groups[0]["params"][0]) is Tagged
    return [{name: tensor.as_subclass(torch.Tensor) for name, tensor in each.items()} for each in contents(optimizer)]


@like_the_twin
@few_configurations
def test_a_tensor_that_retains_its_gradient(make):
    """Not a leaf, but allowed: torch takes what has retain_grad()."""
    leaf = make_params(((6, 3),), torch.float64)[0]
    param = leaf * 2
    param.retain_grad()
    optimizer = make([param])
    param.square().sum().backward()
    optimizer.step()
    optimizer.step()
    return contents(optimizer)


@every_class
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_integer_parameters_are_refused_as_by_the_twin(cls, name) -> None:
    """A step of 0.1 is none on integers; an error is better than a silent truncation."""
    for make, more in ((TWINS[cls], {}), (cls, {"backend": name})):
        param = nn.Parameter(torch.arange(5), requires_grad=False)
        param.grad = torch.ones_like(param)
        optimizer = make([param], lr=0.1, **more)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
        assert param.tolist() == [0, 1, 2, 3, 4]


@every_class
def test_sparse_gradients_are_refused(cls, backend) -> None:
    """By SGD and Adagrad too, whose twins take them."""
    embedding = nn.Embedding(6, 3, sparse=True)
    optimizer = cls(embedding.parameters(), backend=backend)
    embedding(torch.tensor([1, 4])).sum().backward()
    before, state = embedding.weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(
        RuntimeError, match=r"does not support sparse gradients, and in param group 0 one of shape \(6, 3\).*SparseAdam"
    ):
        optimizer.step()
    assert embedding.weight.equal(before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


# -- modes around a step


@like_every_rival
@every_configuration
@pytest.mark.parametrize("mode", ["no_grad", "enable_grad", "inference_mode"])
def test_modes_around_a_step(make, mode):
    """The step is the same, and leaves nothing that requires a gradient."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    for i in range(4):
        set_grads(params, i)
        with getattr(torch, mode)():
            optimizer.step()
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert not any(tensor.requires_grad for state in optimizer.state.values() for tensor in state.values())
    return contents(optimizer)


@like_the_twin
@every_configuration
def test_inference_mode_after_ordinary_steps(make):
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    set_grads(params, 8)
    with torch.inference_mode():
        optimizer.step()
    run(optimizer, params, 2)
    return contents(optimizer)


@pytest.mark.parametrize("configuration", ["adam", "adamw", "sgd-dampening"])
def test_state_made_in_inference_mode_is_of_no_use_outside(configuration, backend) -> None:
    """Its tensors cannot be written in ordinary mode, and the twin raises. So must ours, before anything has moved."""
    cls, flags = CONFIGURATIONS[configuration]
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend})):
        params = make_params(((4, 3),))
        optimizer = make(params, **plain(cls), **flags, **more)
        set_grads(params, 1)
        with torch.inference_mode():
            optimizer.step()
        before = snapshot(optimizer)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="inference tensor outside InferenceMode"):
                optimizer.step()
            if make is cls:  # the twin has written what it complains of
                assert_same_bits(before, snapshot(optimizer))


PLAYED_THROUGH = """
import functools, fusedreg, torch
from fusedreg.rules.registry import OPTIMIZERS
from torch._subclasses.fake_tensor import FakeTensorMode
for cls in OPTIMIZERS:
    shapes = []
    # torch's ASGD reads its scalars, which are fake
    twin = None if any(scalar.is_beside for scalar in cls.spec.scalar_states) else cls.spec.twin
    for make in cls, twin or functools.partial(cls, backend="reference"):
        with FakeTensorMode():
            model = torch.nn.Linear(5, 7, bias=False)
            optimizer = make(model.parameters(), lr=0.1)
            for _ in range(2):
                model(torch.ones(3, 5)).sum().backward()
                optimizer.step()
        shapes.append({k: v.shape for k, v in optimizer.state.get(model.weight, {}).items()})
    assert shapes[0] == shapes[1], shapes
    print(cls.__name__)
"""


def test_fake_tensors() -> None:
    """Under FakeTensorMode a training step is played through without memory, to find out what it would need.

    In a process of its own: a kernel that took a fake tensor for a real one would write where nothing is.
    """
    pytest.importorskip("torch._subclasses.fake_tensor")
    done = subprocess.run([sys.executable, "-c", PLAYED_THROUGH], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [cls.__name__ for cls in TWINS], done.stderr
    assert done.returncode == 0


@every_configuration
@pytest.mark.parametrize("rival", ["twin", "regularized"])
def test_meta_tensors(configuration, rival) -> None:
    """As fake ones: shapes and counts, no data."""
    cls, flags = CONFIGURATIONS[configuration]
    if any(scalar.is_beside for scalar in cls.spec.scalar_states):
        pytest.skip("the twin reads numbers that it keeps beside its parameters")
    described = []
    for make in (TWINS[cls], cls):
        more = regularized(cls) if rival == "regularized" and make is cls else {}
        model = make_model().to("meta")
        optimizer = make(model.parameters(), **flags, **more)
        for _ in range(2):
            model(torch.ones(3, 5, dtype=torch.float64, device="meta")).sum().backward()
            optimizer.step()
        described.append(
            [
                {k: (v.shape, v.dtype, v.device) for k, v in optimizer.state.get(p, {}).items() if k not in OURS_ALONE}
                for p in model.parameters()
            ]
        )
    assert described[0] == described[1]


def test_the_model_learns_alike(backend) -> None:
    """A whole run: 100 steps, a falling loss, and the twin's weights at the end."""
    for cls in TWINS:
        losses = []
        lr = max(0.02, inspect.signature(cls).parameters["lr"].default)  # Adadelta's is 1
        for make, more in ((cls, {"backend": backend}), (TWINS[cls], {})):
            model = make_model()
            optimizer = make(model.parameters(), lr=lr, **known(cls, weight_decay=0.01), **more)
            first = loss_of(model, 1).item()
            train(model, optimizer, 100, seed=0)
            losses.append(loss_of(model, 1).item())
            assert losses[-1] < first / 2
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
