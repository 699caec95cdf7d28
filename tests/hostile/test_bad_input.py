"""What is not allowed raises, with the value in the message, and after the error nothing has moved."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from conftest import needs_cpp
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    OPTIMIZERS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    through_a_file,
)

from fusedreg.parity import STAGES
from fusedreg.penalties import OPTIONS, PENALTIES, PENALTY_MODES

BAD = [
    ("l1", -0.5, "-0.5"),
    ("l1", math.nan, "nan"),
    ("l1", math.inf, "inf"),
    ("l1", "much", "'much'"),
    ("l2", -0.25, "-0.25"),
    ("l2", math.inf, "inf"),
    ("l0", -1.0, "-1.0"),
    ("l0", math.inf, "inf"),
    ("mcp_gamma", 0.0, "0.0"),
    ("mcp_gamma", math.nan, "nan"),
    ("lower", math.inf, "inf"),
    ("lower", None, "None"),
    ("upper", -math.inf, "-inf"),
    ("upper", math.nan, "nan"),
    ("freeze_zeros", 2, "2"),
    ("freeze_zeros", "yes", "'yes'"),
    ("penalty_mode", "lasso", "'lasso'"),
    ("penalty_mode", None, "None"),
    ("clip_value", -1.5, "-1.5"),
    ("clip_value", math.nan, "nan"),
    ("max_grad_norm", 0.0, "0.0"),
    ("max_grad_norm", -2.0, "-2.0"),
    ("max_grad_norm", math.nan, "nan"),
]
bad_values = pytest.mark.parametrize(("key", "value", "shown"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD])


@pytest.mark.parametrize("cls", OPTIMIZERS)
@bad_values
def test_arguments(cls, key, value, shown) -> None:
    with pytest.raises(ValueError, match=rf"Invalid {key} value: {re.escape(shown)} .*allowed"):
        cls(make_params(), **{key: value})


@bad_values
def test_group_values(key, value, shown) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params[:1])
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        optimizer.add_param_group({"params": params[1:], key: value})
    assert len(optimizer.param_groups) == 1


@bad_values
def test_a_value_set_between_steps_moves_nothing(key, value, shown, backend) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
    run(optimizer, params, 2)
    set_grads(params, 9)
    before = snapshot(optimizer)
    good = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
    optimizer.param_groups[0][key] = good
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3


NUMBERS = {"l1": 0.25, "l2": 1.0, "mcp_gamma": 3.0, "lower": -2.0, "clip_value": 1.0, "max_grad_norm": 0.5}
KINDS_OF_NUMBERS = {
    "float32": np.float32,
    "float64": np.float64,
    "array": np.array,
    "tensor": torch.tensor,
    "requires grad": lambda value: torch.tensor(value, requires_grad=True),
}


@pytest.mark.parametrize("kind", KINDS_OF_NUMBERS)
def test_numbers_of_other_kinds(kind, backend, recwarn) -> None:
    """Taken as Python's, without a warning; a checkpoint that has them loads."""
    torch.set_warn_always(True)
    results = []
    try:
        for make in (float, KINDS_OF_NUMBERS[kind]):
            params = make_params(seed=3)
            optimizer = FusedRegAdam(
                [{"params": params, "l1": make(NUMBERS["l1"])}],
                backend=backend,
                **{name: make(value) for name, value in NUMBERS.items()},
            )
            run(optimizer, params, 2)
            optimizer.param_groups[0]["l2"] = make(0.5)
            run(optimizer, params, 1)
            results.append([param.detach() for param in params])
    finally:
        torch.set_warn_always(False)
    assert_same_bits(*results)
    assert not recwarn.list
    if kind != "requires grad":
        optimizer.param_groups[0]["l2"] = 0.5
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


@bad_values
def test_a_checkpoint_with_a_bad_value(key, value, shown) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"Invalid {key} value"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0][key] == {option.name: option.default for option in OPTIONS}[key]


TOGETHER = [
    ({"lower": 1.0, "upper": 0.5}, r"Invalid lower value: 1.0 with upper=0.5 \(allowed: lower <= upper\)"),
    ({"lower": 0.5, "l0": 0.1}, r"Invalid lower value: 0.5 with l0=0.1 \(allowed: lower <= 0 <= upper"),
    ({"upper": -0.5, "freeze_zeros": True}, r"Invalid upper value: -0.5 with freeze_zeros=True \(allowed: lower <= 0"),
    ({"lower": 0.5, "l1": 0.1, "mcp_gamma": 3.0}, r"Invalid lower value: 0.5 with mcp_gamma=3.0 \(allowed: lower <= 0"),
    ({"penalty_mode": "subgradient", "l0": 0.1}, r"Invalid l0 value: 0.1 with penalty_mode='subgradient' \(allowed: 0"),
    (
        {"penalty_mode": "subgradient", "mcp_gamma": 3.0},
        r"Invalid mcp_gamma value: 3.0 with penalty_mode='subgradient'",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"), TOGETHER, ids=lambda value: "+".join(value) if isinstance(value, dict) else ""
)
def test_options_that_are_not_allowed_together(options, message, backend) -> None:
    """In the constructor, in a new group, in a checkpoint, and between two steps, where nothing moves."""
    params = make_params()
    with pytest.raises(ValueError, match=message):
        FusedRegAdam(params, **options)
    optimizer = FusedRegAdam(params[:1], backend=backend)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("name", [penalty.name for penalty in PENALTIES if not penalty.takes_complex])
def test_complex_with_a_penalty_on_real_numbers(name) -> None:
    param = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=rf"Invalid {name} value: .*complex"):
        FusedRegAdam([param], **{name: STAGES.get(name, 0.1)})


def test_groups_that_disagree_on_max_grad_norm() -> None:
    params = make_params()
    with pytest.raises(ValueError, match=r"Invalid max_grad_norm values: 1.0 and 2.0"):
        FusedRegAdam([{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 2.0}], max_grad_norm=1.0)
    optimizer = FusedRegAdam([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=1.0)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[1]["max_grad_norm"] = None
    with pytest.raises(ValueError, match=r"Invalid max_grad_norm values: 1.0 and None"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="Invalid backend value: 'gpu'"):
        FusedRegAdam(make_params(), backend="gpu")
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: "):
            FusedRegAdam(make_params(), backend=name)


def test_cpp_cannot_take_other_devices() -> None:
    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    param.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it runs on CPU parameters, and one is on meta"):
        FusedRegAdam([param], backend="cpp").step()


def test_the_twins_own_checks_stay() -> None:
    params = make_params()
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            FusedRegAdam(params, **options)
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        FusedRegSGD(params, nesterov=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedRegAdam([])
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        FusedRegAdam(params, fused=True, differentiable=True)


def sparse(param):
    index = torch.zeros(param.ndim, 1, dtype=torch.int64)
    return torch.sparse_coo_tensor(index, torch.ones(1), param.shape, check_invariants=True)


def raises_after(optimizer, params, error, match) -> None:
    before = snapshot(optimizer)
    keys = {id(p): set(optimizer.state.get(p, {})) for p in params}
    with pytest.raises(error, match=match):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
    assert keys == {id(p): set(optimizer.state.get(p, {})) for p in params}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)
def test_bad_gradients_move_nothing(cls, flags, steps_before, backend) -> None:
    """Each is on the last parameter: those before it must not have been stepped, nor have got state."""
    params = make_params(((4, 3), (5,), (2, 6)))
    optimizer = cls(params, backend=backend, **regularized(cls, flags))
    run(optimizer, params, steps_before)

    set_grads(params, 1)
    params[-1].grad = sparse(params[-1])
    raises_after(optimizer, params, RuntimeError, "does not support sparse gradients")

    set_grads(params, 1)
    original = params[-1].data
    params[-1].data = original.double()
    raises_after(optimizer, params, ValueError, "its dtype is torch.float32, its parameter's torch.float64")

    params[-1].data = original[:, :4]
    raises_after(optimizer, params, ValueError, r"its shape is .*2, 6.*, its parameter's .*2, 4")

    params[-1].data = original
    optimizer.step()


@pytest.mark.parametrize(
    "overlapping",
    [lambda: torch.ones(1, 4).expand(3, 4), lambda: torch.ones(10).as_strided((4, 4), (2, 1))],
    ids=["expanded", "as_strided"],
)
def test_parameters_that_overlap_themselves(overlapping, backend) -> None:
    param = overlapping().requires_grad_()
    other = torch.nn.Parameter(torch.ones(2))
    param.grad, other.grad = torch.ones(param.shape), torch.ones(2)
    optimizer = FusedRegAdam([other, param], backend=backend)
    with pytest.raises(ValueError, match="elements of it share memory"):
        optimizer.step()
    assert (other == 1).all()
    assert not optimizer.state


def test_a_parameter_that_comes_to_overlap_in_mid_training(backend) -> None:
    params = make_params(((3, 4), (5,)))
    optimizer = FusedRegAdam(params[::-1], backend=backend, **REGULARIZED)
    run(optimizer, params, 2)
    params[0].data = torch.ones(1, 4).expand(3, 4)
    set_grads(params, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="elements of it share memory"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


@needs_cpp
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_parameters_that_come_to_share_memory_in_mid_training(backend) -> None:
    params = make_params(((8,), (8,)))
    optimizer = FusedRegSGD(params, lr=0.1, backend=backend)
    run(optimizer, params, 1)
    params[1].data = params[0].data[:]
    for param in params:
        param.grad = torch.ones(8)
    expected = params[0].detach() - 0.2
    if backend == "cpp":
        with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: two parameters share memory"):
            optimizer.step()
    else:
        optimizer.step()
        torch.testing.assert_close(params[0].detach(), expected)


def test_strides_that_interleave_without_overlap_are_fine() -> None:
    param = torch.zeros(8).as_strided((3, 2), (2, 3)).requires_grad_()
    param.grad = torch.ones(3, 2)
    FusedRegSGD([param], lr=1.0).step()
    assert param.equal(torch.full((3, 2), -1.0))


def test_complex_with_l1() -> None:
    param = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"Invalid l1 value: 0.1 .*complex"):
        FusedRegAdam([param], l1=0.1)
    optimizer = FusedRegAdam([param], l2=0.1)
    param.grad = torch.randn(3, dtype=torch.complex64)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["l1"] = 0.2
    with pytest.raises(ValueError, match=r"Invalid l1 value: 0.2 .*complex"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


def test_an_exception_in_a_closure_moves_nothing(backend) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
    run(optimizer, params, 1)
    before = snapshot(optimizer)

    def closure():
        raise KeyError("stop")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert_same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("cls", [cls for cls in OPTIMIZERS if cls.spec.twin is None])
def test_options_that_no_twin_checks(cls, backend) -> None:
    """In the constructor, in a group of its own, and set between steps: an error, and nothing has moved."""
    params = make_params()
    optimizer = cls(params, backend=backend)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    for option in cls.spec.options:
        wrong = {True: -1.0, False: "wrong"}[option.is_allowed(0.5)]
        allowed = re.escape(f"(allowed: {option.allowed})")
        invalid = pytest.raises(ValueError, match=f"Invalid {option.name} value: .* {allowed}")
        with invalid:
            cls(params, **{option.name: wrong})
        with invalid:
            optimizer.add_param_group({"params": make_params(((3,),)), option.name: wrong})
        right, optimizer.param_groups[0][option.name] = optimizer.param_groups[0][option.name], wrong
        with invalid:
            optimizer.step()
        optimizer.param_groups[0][option.name] = right
    assert_same_bits(snapshot(optimizer), before)
    run(optimizer, params, 1)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_penalty_modes_that_a_rule_does_not_have(cls) -> None:
    params = make_params()
    for mode in set(PENALTY_MODES) - set(cls.spec.modes):
        optimizer = cls(params)
        with pytest.raises(ValueError, match=f"Invalid penalty_mode value: '{mode}' .*{cls.spec.why_not_others}"):
            cls(params, penalty_mode=mode)
        optimizer.param_groups[0]["penalty_mode"] = mode
        set_grads(params, 1)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"Invalid penalty_mode value: '{mode}'"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
