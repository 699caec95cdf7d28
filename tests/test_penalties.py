"""Each penalty's declaration holds together: its prox is the minimiser, its subdifferential and gradient its value's.

Every registered penalty is tested, and all of them together. scipy, which knows only the value, is the judge.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import OPTIMIZERS, FusedRegAdam, assert_same_bits, known, make_params, set_grads
from scipy.optimize import minimize_scalar

import fusedreg
from fusedreg.penalties import OPTIONS, PENALTIES, Penalty, Prox
from fusedreg.penalties.spec import distance_to_subdifferential

N = 200
EPSILON = torch.finfo(torch.float64).eps
DEFAULTS = {option.name: option.default for option in OPTIONS}


def decades(low: float, high: float) -> torch.Tensor:
    return 10 ** torch.empty(N, dtype=torch.float64).uniform_(low, high)


STRENGTHS = {
    "l1": lambda: decades(-3, 3),
    "l2": lambda: decades(-3, 3),
    "mcp_gamma": lambda: decades(-3, 3),
    "lower": lambda: -decades(-3, 3),
    "upper": lambda: decades(-3, 3),
    "l0": lambda: decades(-6, 3),
    "freeze_zeros": lambda: True,
}
"""Values of each penalty's option: tensors have one for each element."""

every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
# One after the other, and then all at once.
SETS: list[tuple[str, ...]] = [
    *((name,) for name in STRENGTHS if name != "mcp_gamma"),
    ("l1", "l2"),
    ("l1", "mcp_gamma"),
    ("l1", "l2", "mcp_gamma"),
    ("l1", "mcp_gamma", "upper"),
    ("l1", "l2", "lower", "upper"),
    ("l1", "l2", "l0"),
    ("lower", "upper", "l0"),
    tuple(STRENGTHS),
]
every_set = pytest.mark.parametrize("names", SETS, ids="+".join)


def test_every_penalty_is_drawn() -> None:
    names = [penalty.name for penalty in PENALTIES]
    assert list(STRENGTHS) == names, "give the new penalty values in STRENGTHS, in the order of PENALTIES"
    assert len(set(names)) == len(names)
    assert [option.name for option in OPTIONS if option.name in names] == names


def strengths(names: tuple[str, ...]) -> dict[str, Any]:
    """A group in which these penalties are on."""
    return {**DEFAULTS, **{name: STRENGTHS[name]() for name in names}}


def problems(names: tuple[str, ...]) -> Prox:
    """kappa over eight decades, and z such that it is thresholded now and then."""
    group, kappa = strengths(names), decades(-4, 4)
    z = torch.randn(N, dtype=torch.float64)
    near = kappa * torch.as_tensor(group["l1"]) + (kappa * torch.as_tensor(group["l0"])).sqrt()
    z = torch.where(torch.arange(N) % 2 == 0, z * torch.where(near == 0, 1.0, near), z * decades(-3, 3))
    w_old = torch.randn(N, dtype=torch.float64)
    w_old[::7] = 0
    return Prox(z, kappa, w_old, group)


def solve(names: tuple[str, ...], problem: Prox) -> torch.Tensor:
    x = problem.z
    for penalty in PENALTIES:
        if penalty.name in names:
            x = penalty.prox(x, problem)
    return x


def objective(names: tuple[str, ...], at: torch.Tensor, problem: Prox) -> torch.Tensor:
    """Of stage 6, with the penalties alone and not a word of their proxes; ``at`` has an element for each problem."""
    z, kappa, w_old, group = problem[:4]
    total = (at - z).square() / (2 * kappa)
    for penalty in PENALTIES:
        if penalty.name in names:
            total = total + penalty.value(at, group)
    frozen = (w_old == 0) & bool(group["freeze_zeros"]) & (at != 0)
    return torch.where(frozen, math.inf, total)


@every_set
def test_the_prox_is_the_minimiser(names) -> None:
    """No lower value of (x - z)^2 / (2 kappa) + the penalties: on a grid out to twice |z|, at what may be a corner, and
    where scipy's search around the best of these ends."""
    problem = problems(names)
    x, z = solve(names, problem), problem.z
    value = objective(names, x, problem)
    # A rounding of x, z or of a threshold is worth this much.
    slack = 8 * EPSILON * (value + z.square() / problem.kappa)
    assert value.isfinite().all()
    shares = torch.cat([torch.linspace(-2, 2, 161), 10 ** torch.linspace(-6, 0, 61)]).double()
    corners = [torch.full_like(z, 0.0), x * (1 - 1e-3), x * (1 + 1e-3)]
    places = torch.cat([z * shares[:, None], torch.stack(corners)])
    values = torch.stack([objective(names, at, problem) for at in places])
    lowest, where = values.min(0)
    assert (value <= lowest + slack).all()
    for i in range(0, N, 10):
        own = Prox(*(elements(part, i) for part in problem))
        middle, width = places[where[i], i].item(), 0.02 * abs(z[i].item())
        low, high = max(middle - width, float(own.group["lower"])), min(middle + width, float(own.group["upper"]))
        if low >= high or (own.group["freeze_zeros"] and own.w_old == 0):
            continue
        found = minimize_scalar(
            lambda at, own=own: objective(names, torch.tensor(at, dtype=torch.float64), own).item(),
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-9 * width},
        )
        assert value[i] <= found.fun + slack[i]


def elements(part: Any, i: int) -> Any:
    if isinstance(part, dict):
        return {key: elements(value, i) for key, value in part.items()}
    return part[i] if isinstance(part, torch.Tensor) and part.ndim else part


@every_set
def test_the_subdifferential_contains_what_the_prox_has_left(names) -> None:
    """(z - x) / kappa is a subgradient at x: the condition of optimality, to a few roundings of z."""
    problem = problems(names)
    x, (z, kappa, _, group) = solve(names, problem), problem[:4]
    penalties = tuple(penalty for penalty in PENALTIES if penalty.name in names)
    distance = distance_to_subdifferential(penalties, (x - z) / kappa, x, group)
    scale = z.abs() / kappa
    for penalty in penalties:
        low, high = penalty.subdifferential(x, group)
        assert (low <= high).all()
        finite = torch.maximum(low.abs(), high.abs())
        scale = scale + torch.where(finite.isinf(), 0.0, finite)
    assert (distance <= 4 * EPSILON * scale).all()
    if set(names) <= {"l1", "l2"}:  # strictly convex: and away from there it does not
        moved = x + torch.where(x == 0, z.abs() + 1, 0.5 * x)
        distance = distance_to_subdifferential(penalties, (moved - z) / kappa, moved, group)
        assert (distance > 1e-3 * moved.abs() / kappa).all()


@every_penalty
def test_the_subdifferential_and_the_gradient_are_of_the_value(penalty) -> None:
    """Differences of the value on both sides lie beside it, and autograd's gradient of the value in it."""
    if penalty.is_constraint:
        pytest.skip("a constraint has a value of 0 or infinity")
    group = strengths(tuple({"l1", penalty.name}))
    group["mcp_gamma"] = group["mcp_gamma"] + 0.1  # the difference below sees its curvature
    w = torch.randn(N, dtype=torch.float64)
    w[::4] = 0
    low, high = penalty.subdifferential(w, group)
    step = 1e-6
    right = (penalty.value(w + step, group) - penalty.value(w, group)) / step
    left = (penalty.value(w, group) - penalty.value(w - step, group)) / step
    slack = 1e-5 * (1 + group[penalty.name] + penalty.value(w, group).abs())
    at_jump = high.isinf()
    assert (right > 1 / step * 0.999 * penalty.value(w + step, group))[at_jump].all()
    assert ((right - high).abs() <= slack)[~at_jump].all()
    assert ((left - low).abs() <= slack)[~at_jump].all()
    if penalty.gradient is not None:
        leaf = w.clone().requires_grad_()
        penalty.value(leaf, group).sum().backward()
        assert torch.allclose(penalty.gradient(w, group), leaf.grad, rtol=4 * EPSILON, atol=0)
        assert ((low <= leaf.grad) & (leaf.grad <= high)).all()


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_its_default_it_is_not_there(penalty, dtype) -> None:
    z = torch.cat([torch.randn(N, dtype=dtype), torch.tensor([0.0, math.inf, -math.inf, 1e-40, -3e38], dtype=dtype)])
    assert not penalty.is_on(DEFAULTS)
    assert penalty.is_on(on(penalty))
    finite = z[:N]
    assert (penalty.value(finite, DEFAULTS) == 0).all()
    assert all((end == 0).all() for end in penalty.subdifferential(finite, DEFAULTS))
    if penalty.gradient is not None:
        assert (penalty.gradient(finite, DEFAULTS) == 0).all()


def on(penalty: Penalty) -> dict[str, Any]:
    value = STRENGTHS[penalty.name]()
    return {**DEFAULTS, penalty.name: value[0].item() if isinstance(value, torch.Tensor) else value}


@every_penalty
def test_a_nan_stays_and_no_input_is_written(penalty) -> None:
    names = tuple({"l1", penalty.name})
    problem = problems(names)
    problem.z[0] = math.nan
    before = problem.z.clone()
    assert penalty.prox(problem.z, problem)[0].isnan()
    if not penalty.is_constraint:
        assert penalty.value(problem.z, problem.group)[0].isnan()
    penalty.subdifferential(problem.z, problem.group)
    assert_same_bits([problem.z], [before])


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
        **known(cls, weight_decay=0.1),
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
