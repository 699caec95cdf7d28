"""Each penalty's declaration holds together: its prox is the minimiser, its subdifferential and gradient its value's.

Every registered penalty is tested, and all of them together. scipy, which knows only the value, is the judge.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import OPTIMIZERS, FusedRegAdam, assert_same_bits, make_params, set_grads
from scipy.optimize import minimize_scalar

import fusedreg
from fusedreg.penalties import OPTIONS, PENALTIES, Penalty
from fusedreg.penalties.spec import distance_to_subdifferential

N = 400
EPSILON = torch.finfo(torch.float64).eps
DEFAULTS = {option.name: option.default for option in OPTIONS}

every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
# One after the other, and then all at once.
SETS: list[tuple[Penalty, ...]] = [*((penalty,) for penalty in PENALTIES), PENALTIES]
every_set = pytest.mark.parametrize("penalties", SETS, ids=lambda penalties: "+".join(each.name for each in penalties))


def decades(low: float, high: float) -> torch.Tensor:
    return 10 ** torch.empty(N, dtype=torch.float64).uniform_(low, high)


def strengths(penalties: tuple[Penalty, ...]) -> dict[str, Any]:
    """A group in which these penalties are on: strengths over six decades, as a tensor, one for each element."""
    return {**DEFAULTS, **{penalty.name: decades(-3, 3) for penalty in penalties}}


def problems(penalties: tuple[Penalty, ...]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """z, kappa and a group: kappa over eight decades, and z such that it is thresholded now and then."""
    group, kappa = strengths(penalties), decades(-4, 4)
    z = torch.randn(N, dtype=torch.float64)
    near = kappa * torch.stack([group[penalty.name] for penalty in penalties]).amax(0)
    return torch.where(torch.arange(N) % 2 == 0, z * near, z * decades(-3, 3)), kappa, group


def prox_of(penalties: tuple[Penalty, ...], z: torch.Tensor, kappa: Any, group: dict[str, Any]) -> torch.Tensor:
    for penalty in penalties:
        z = penalty.prox(z, kappa, group)
    return z


def elements(group: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: value[i] if isinstance(value, torch.Tensor) else value for key, value in group.items()}


def test_the_penalties_are_options_in_their_order() -> None:
    names = [penalty.name for penalty in PENALTIES]
    assert len(set(names)) == len(names)
    assert [option.name for option in OPTIONS if option.name in names] == names


@every_set
def test_the_prox_is_the_minimiser(penalties) -> None:
    """scipy finds no lower value of (x - z)^2 / (2 kappa) + the penalties, out to twice |z| or right beside x."""
    z, kappa, group = problems(penalties)
    x = prox_of(penalties, z, kappa, group)
    for i in range(N):
        own, z_, kappa_ = elements(group, i), z[i].item(), kappa[i].item()

        def objective(at: float, own=own, z_=z_, kappa_=kappa_) -> float:
            w = torch.tensor(at, dtype=torch.float64)
            return (at - z_) ** 2 / (2 * kappa_) + sum(penalty.value(w, own).item() for penalty in penalties)

        value, width = objective(x[i].item()), 2 * abs(z_) + 1e-300
        # A rounding of x, z or of a threshold is worth this much.
        slack = 8 * EPSILON * (value + z_**2 / kappa_)
        places = [objective(at) for at in np.linspace(-width, width, 41)]
        near = [objective(x[i].item() * (1 + share)) for share in (-1e-3, 1e-3)]
        found = minimize_scalar(objective, bounds=(-width, width), method="bounded", options={"xatol": 1e-9 * width})
        assert value <= min(found.fun, *places, *near, objective(0.0)) + slack


@every_set
def test_the_subdifferential_contains_what_the_prox_has_left(penalties) -> None:
    """(z - x) / kappa is a subgradient at x: the condition of optimality, to a few roundings of z."""
    z, kappa, group = problems(penalties)
    x = prox_of(penalties, z, kappa, group)
    distance = distance_to_subdifferential(penalties, (x - z) / kappa, x, group)
    scale = z.abs() / kappa
    for penalty in penalties:
        low, high = penalty.subdifferential(x, group)
        assert (low <= high).all()
        scale = scale + torch.maximum(low.abs(), high.abs())
    assert (distance <= 4 * EPSILON * scale).all()
    # and away from there it does not
    moved = x + torch.where(x == 0, z.abs() + 1, 0.5 * x)
    distance = distance_to_subdifferential(penalties, (moved - z) / kappa, moved, group)
    assert (distance > 1e-3 * moved.abs() / kappa).all()


@every_penalty
def test_the_subdifferential_and_the_gradient_are_of_the_value(penalty) -> None:
    """Differences of the value on both sides lie beside it, and autograd's gradient of the value in it."""
    group = strengths((penalty,))
    w = torch.randn(N, dtype=torch.float64)
    w[::4] = 0
    low, high = penalty.subdifferential(w, group)
    step = 1e-6
    right = (penalty.value(w + step, group) - penalty.value(w, group)) / step
    left = (penalty.value(w, group) - penalty.value(w - step, group)) / step
    slack = 1e-5 * (group[penalty.name] + penalty.value(w, group))
    assert ((right - high).abs() <= slack).all()
    assert ((left - low).abs() <= slack).all()
    leaf = w.clone().requires_grad_()
    penalty.value(leaf, group).sum().backward()
    assert torch.allclose(penalty.gradient(w, group), leaf.grad, rtol=4 * EPSILON, atol=0)
    assert ((low <= leaf.grad) & (leaf.grad <= high)).all()


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_its_default_it_is_not_there(penalty, dtype) -> None:
    z = torch.cat([torch.randn(N, dtype=dtype), torch.tensor([0.0, math.inf, -math.inf, 1e-40, -3e38], dtype=dtype)])
    assert not penalty.is_on(DEFAULTS)
    assert penalty.is_on({**DEFAULTS, penalty.name: 0.1})
    kappa = torch.full_like(z, 0.7)
    assert_same_bits([penalty.prox(z, kappa, DEFAULTS)], [z])
    finite = z[:N]
    assert (penalty.value(finite, DEFAULTS) == 0).all()
    assert (penalty.gradient(finite, DEFAULTS) == 0).all()
    assert all((end == 0).all() for end in penalty.subdifferential(finite, DEFAULTS))


@every_penalty
def test_a_nan_stays_and_no_input_is_written(penalty) -> None:
    z, kappa, group = problems((penalty,))
    z[0] = math.nan
    before = z.clone()
    assert penalty.prox(z, kappa, group)[0].isnan()
    assert penalty.value(z, group)[0].isnan()
    penalty.subdifferential(z, group)
    penalty.gradient(z, group)
    assert_same_bits([z], [before])


# -- the value of all of them, of an optimizer


def by_hand(groups: list[dict[str, Any]]) -> float:
    total = 0.0
    for group in groups:
        for param in group["params"]:
            w = torch.view_as_real(param.detach().resolve_conj()) if param.is_complex() else param.detach()
            w = w.double()
            total += (group["l1"] * w.abs().sum() + group["l2"] / 2 * w.square().sum()).item()
    return total


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["proximal", "subgradient"])
def test_penalty_is_the_sum_by_hand(cls, mode) -> None:
    """Groups with their own strengths, after steps; neither mode nor decay changes it."""
    a, b, c = (make_params(dtype=torch.float64, seed=seed) for seed in range(3))
    optimizer = cls(
        [{"params": a, "l1": 0.3}, {"params": b, "l2": 0.7, "l1": 0.0}, {"params": c}],
        lr=0.01,
        l1=0.05,
        l2=0.2,
        penalty_mode=mode,
        weight_decay=0.1,
    )
    for _ in range(2):
        set_grads([*a, *b, *c], 5)
        optimizer.step()
    value = fusedreg.penalty(optimizer)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert not value.requires_grad
    assert value.item() == pytest.approx(by_hand(optimizer.param_groups), rel=1e-13)
    assert by_hand(optimizer.param_groups) > 1


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float64", "complex128"], torch.float64),
        (["float32"], torch.float32),
        (["bfloat16"], torch.float32),
        (["float64", "float32"], torch.float32),
        (["complex64", "float16"], torch.float32),
    ],
)
def test_penalty_in_every_dtype_without_gradients(dtypes, expected) -> None:
    groups = []
    for i, dtype in enumerate(getattr(torch, name) for name in dtypes):
        params = make_params(dtype=dtype, seed=i)
        groups.append({"params": params, "l1": 0.0 if dtype.is_complex else 0.3, "l2": 0.2 + i})
    value = fusedreg.penalty(FusedRegAdam(groups))
    assert value.dtype == expected
    # In float32 at least: bf16's sums would not be.
    assert value.item() == pytest.approx(by_hand(groups), rel=1e-13 if expected == torch.float64 else 1e-6)


def test_penalty_of_a_conjugated_parameter_and_of_nothing() -> None:
    param = torch.randn(5, dtype=torch.complex64).conj().requires_grad_()
    optimizer = FusedRegAdam([{"params": [param], "l2": 0.4}])
    assert fusedreg.penalty(optimizer).item() == pytest.approx(0.2 * param.abs().square().sum().item(), rel=1e-6)
    assert fusedreg.penalty(FusedRegAdam(make_params())).item() == 0


def test_penalty_with_strengths_that_are_tensors() -> None:
    params = make_params(dtype=torch.float64)
    optimizer = FusedRegAdam(params, l1=torch.tensor(0.3, dtype=torch.float64), l2=torch.tensor([0.2]))
    assert fusedreg.penalty(optimizer).shape == ()
    l2 = torch.tensor(0.2).item()
    expected = by_hand([{"params": params, "l1": 0.3, "l2": l2}])
    assert fusedreg.penalty(optimizer).item() == pytest.approx(expected, rel=1e-7)


def test_the_value_in_one_process_needs_no_float64(monkeypatch) -> None:
    """Some devices do not have it."""
    optimizer = FusedRegAdam(make_params(), l1=0.1, l2=0.2)
    expected = fusedreg.penalty(optimizer)
    asked_for = []
    to, zeros = torch.Tensor.to, torch.zeros
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **kw: (asked_for.extend(args), to(self, *args, **kw))[1]
    )
    monkeypatch.setattr(torch, "zeros", lambda *args, **kw: (asked_for.append(kw.get("dtype")), zeros(*args, **kw))[1])
    assert fusedreg.penalty(optimizer).equal(expected)
    assert torch.float32 in asked_for
    assert torch.float64 not in asked_for
