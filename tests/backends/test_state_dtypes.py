"""States of another dtype than their parameter: the compiled CPU backend converts them in the update pass."""

import copy

import pytest
import torch

import fusedreg
from fusedreg.parity import TOLERANCE_IN_EPS, regularized
from fusedreg.rules.registry import OPTIMIZERS

PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
]
# Longer than a tile of the loops, which no vector width divides; and a view that no vector is aligned to.
SHAPES = [(37, 53), (5,), (3, 1)]
WITH_STATES = [cls for cls in OPTIMIZERS if cls.spec.needed_states(cls([torch.zeros(1)]).param_groups[0])]


def make_params(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in (*SHAPES, (1029,))]
    return in_place([each.to(dtype) for each in tensors])


def in_place(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Leaves with copies of their numbers, the last of them one element behind the beginning of its memory."""
    *aligned, last = (each.detach().clone() for each in tensors)
    buffer = torch.empty(len(last) + 1, dtype=last.dtype)
    return [each.requires_grad_() for each in (*aligned, buffer[1:].copy_(last))]


def trained(cls, options: dict, param_dtype: torch.dtype):
    """Parameters, gradients and an optimizer after some steps."""
    params = make_params(param_dtype, 0)
    optimizer = cls(params, backend="reference", **options)
    for seed in range(1, 8):
        for param, grad in zip(params, make_params(param_dtype, seed), strict=True):
            param.grad = grad.detach()
        optimizer.step()
    return params, make_params(param_dtype, 9), optimizer


def convert_states(optimizer, *dtypes: torch.dtype) -> None:
    """In turn, in the order in which the rule needs them."""
    for state in optimizer.state.values():
        for i, name in enumerate(optimizer.spec.needed_states(optimizer.param_groups[0])):
            state[name] = state[name].to(dtypes[i % len(dtypes)])


@pytest.mark.parametrize("group_l1", [False, True], ids=["elements", "units"])
@pytest.mark.parametrize(("param_dtype", "state_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("cls", WITH_STATES, ids=lambda cls: cls.__name__)
def test_follows_the_reference(cls, param_dtype, state_dtype, group_l1) -> None:
    options = regularized(cls)
    if group_l1:
        if cls.spec.why_no_units:
            pytest.skip(cls.spec.why_no_units)
        options |= dict(group_l1=0.05, unit="rows")
    follow_the_reference(cls, options, param_dtype, state_dtype)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", WITH_STATES, ids=lambda cls: cls.__name__)
def test_follows_the_reference_with_states_of_several_dtypes(cls, param_dtype) -> None:
    follow_the_reference(cls, regularized(cls), param_dtype, torch.bfloat16, torch.float32)
    follow_the_reference(cls, regularized(cls), param_dtype, torch.float32, torch.bfloat16, torch.float16)


def follow_the_reference(cls, options: dict, param_dtype: torch.dtype, *state_dtypes: torch.dtype) -> None:
    params, grads, warm = trained(cls, options, param_dtype)
    results = []
    for backend in ("cpp", "reference"):
        own = in_place(params)
        assert own[-1].data_ptr() % 64 != 0
        optimizer = cls(own, backend=backend, **options)
        optimizer.load_state_dict(copy.deepcopy(warm.state_dict()))
        convert_states(optimizer, *state_dtypes)
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad.detach().clone()
        optimizer.step()
        results.append((own, optimizer))
    (ours, optimizer), (theirs, reference) = results
    names = cls.spec.needed_states(optimizer.param_groups[0])
    for own, truth, before in zip(ours, theirs, params, strict=True):
        pairs = [(own.detach(), truth.detach(), before.detach())]
        for name in names:
            state = reference.state[truth][name]
            pairs.append((optimizer.state[own][name], state, state))
        for result, expected, scale in pairs:
            assert result.dtype == expected.dtype
            finfo = torch.finfo(result.dtype)
            largest = max(float(expected.abs().max()), float(scale.abs().max()), finfo.smallest_normal)
            # Both compute in float32 (float64), and round once; where that is a tie, to neighbours.
            allowed = max(TOLERANCE_IN_EPS[result.dtype], 1.01 if finfo.eps > 1e-6 else 0.0)
            error = float((result.double() - expected.double()).abs().max()) / (finfo.eps * largest)
            assert error <= allowed
    for param in ours:
        for i, name in enumerate(names):
            assert optimizer.state[param][name].dtype == state_dtypes[i % len(state_dtypes)]


def test_wider_states_are_left_to_the_reference() -> None:
    """Converted to float32 and back, they would lose digits without a word."""
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = fusedreg.FusedRegAdam([param], backend="cpp")
    optimizer.step()
    convert_states(optimizer, torch.float64)
    with pytest.raises(RuntimeError, match="it needs state of the parameter's shape and device"):
        optimizer.step()


def test_a_state_that_changes_its_dtype_gets_a_new_plan() -> None:
    """Between two steps, in the same dict."""
    param = torch.randn(1000, requires_grad=True)
    param.grad = torch.randn(1000)
    optimizer = fusedreg.FusedRegAdam([param], backend="cpp")
    twin = torch.optim.Adam([param.detach().clone().requires_grad_()])
    (theirs,) = twin.param_groups[0]["params"]
    theirs.grad = param.grad
    optimizer.step()
    twin.step()
    convert_states(optimizer, torch.bfloat16)
    optimizer.step()
    twin.step()
    assert optimizer.state[param]["exp_avg_sq"].dtype == torch.bfloat16
    torch.testing.assert_close(param, theirs, rtol=0, atol=2e-5)
