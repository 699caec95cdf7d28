"""Proves that one step ends at the global minimiser of stage 6 with any element penalty or constraint, by every rule.

The problem is that of docs/formulas.md: argmin over x of (x - z)^2 / (2 kappa) + penalties(x) in the box, with z where
torch's twin would have put the weight. It is not convex: a grid and scipy's minimize_scalar look for something lower.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FusedRegSGD
from scipy.optimize import minimize_scalar
from test_prox_step import (
    ADAPTIVE,
    EPS,
    N_GROUPS,
    N_WEIGHTS,
    SGD_FLAVOURS,
    Array,
    decades,
    draw_gradients,
    every_dtype,
    gain_of_sgd,
    load_state,
    step_of_sgd,
    values,
)

SHAPE = (N_GROUPS, N_WEIGHTS)


@dataclasses.dataclass
class Strengths:
    """A column each, with a row for each group."""

    l1: Array = 0.0
    l2: Array = 0.0
    l0: Array = 0.0
    mcp_gamma: Array = np.inf
    lower: Array = -np.inf
    upper: Array = np.inf

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, np.broadcast_to(getattr(self, field.name), (N_GROUPS, 1)).copy())

    def options(self, i: int) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)[i, 0]) for field in dataclasses.fields(self)}

    def penalty(self, x: Array) -> Array:
        """Zhang's minimax concave penalty by its integral's definition, and the others."""
        size = np.abs(x)
        with np.errstate(invalid="ignore", over="ignore"):
            knee = self.mcp_gamma * self.l1
            fades = np.isfinite(self.mcp_gamma) & (self.l1 > 0)
            minimax = np.where(size > knee, knee * self.l1 / 2, self.l1 * size - size**2 / (2 * self.mcp_gamma))
        total = np.where(fades, minimax, self.l1 * size) + self.l2 / 2 * x**2 + self.l0 * (x != 0)
        return np.where((x < self.lower) | (x > self.upper), np.inf, total)


def draw(what: str, rng: np.random.Generator, per_kappa: Array | float = 1.0) -> Strengths:
    """Strengths over many decades; l1, l2 and l0 are times `per_kappa`, the inverse of a step size, gamma over it."""
    own = Strengths()
    if what in ("mcp", "all"):
        own.l1, own.mcp_gamma = decades(rng, -3, 2, *SHAPE)[:, :1] * per_kappa, decades(rng, -2, 2, *SHAPE)[:, :1]
        own.mcp_gamma = own.mcp_gamma / per_kappa
    if what in ("l0", "all"):
        own.l0 = decades(rng, -4, 4, *SHAPE)[:, :1] * per_kappa
    if what in ("elastic-net-in-a-box", "all"):
        own.l1 = decades(rng, -3, 1, *SHAPE)[:, :1] * per_kappa if what != "all" else own.l1
        own.l2 = decades(rng, -3, 1, *SHAPE)[:, :1] * per_kappa
    if what in ("elastic-net-in-a-box", "box", "all"):
        own.lower, own.upper = -decades(rng, -2, 0.5, *SHAPE)[:, :1], decades(rng, -2, 0.5, *SHAPE)[:, :1]
        own.lower[::3], own.upper[1::4] = 0, np.inf
    return own


def assert_nothing_is_lower(
    x: Array, z: Array, kappa: Array, own: Strengths, slack_of: Array, dtype: torch.dtype
) -> None:
    """`slack_of` is the size of what was added up to z. A rounding there moves the problem by as much."""
    bound = {name: getattr(own, name).astype(str(dtype)[6:]).astype(float) for name in ("lower", "upper")}
    own = dataclasses.replace(own)
    own.lower, own.upper = bound["lower"], bound["upper"]

    def objective(at: Array) -> Array:
        return (at - z) ** 2 / (2 * kappa) + own.penalty(at)

    epsilon = torch.finfo(dtype).eps
    value = objective(x)
    slack = 8 * epsilon * (value + slack_of * np.maximum(np.abs(x - z), np.abs(z)) / kappa)
    shares = np.concatenate([np.linspace(-1.5, 1.5, 121), 10.0 ** np.linspace(-8, 0, 81)])
    places = [share * z for share in shares]
    places += [np.zeros(SHAPE), z / (1 + kappa * own.l2), x * (1 - 1e-4), x * (1 + 1e-4)]
    places += [np.broadcast_to(np.nan_to_num(bound[name], posinf=0, neginf=0), SHAPE) for name in bound]
    all_values = np.stack([objective(at) for at in places])
    assert (value <= all_values.min(0) + slack).all()
    best = np.stack(np.broadcast_arrays(*places))[(all_values.argmin(0), *np.indices(SHAPE))]
    for i, j in zip(range(N_GROUPS), np.arange(N_GROUPS) % N_WEIGHTS, strict=True):
        width = 0.03 * abs(z[i, j])
        low, high = max(best[i, j] - width, own.lower[i, 0]), min(best[i, j] + width, own.upper[i, 0])
        if low < high:
            alone = dataclasses.replace(own)
            for field in dataclasses.fields(own):
                setattr(alone, field.name, getattr(own, field.name)[i, 0])
            found = minimize_scalar(
                lambda at, alone=alone, i=i, j=j: (at - z[i, j]) ** 2 / (2 * kappa[i, j]) + alone.penalty(at),
                bounds=(low, high),
                method="bounded",
                options={"xatol": 1e-12 * width},
            )
            assert value[i, j] <= found.fun + slack[i, j]


SETS = ["mcp", "l0", "box", "elastic-net-in-a-box", "all"]


@every_dtype
@pytest.mark.parametrize("what", SETS)
@pytest.mark.parametrize("flavour", ADAPTIVE)
def test_rules_with_a_metric(flavour, what, dtype, backend) -> None:
    """The metric goes over 12 decades, on both sides of the safeguard."""
    rule = ADAPTIVE[flavour]
    rng = np.random.default_rng(3)
    own = draw(what, rng)
    lr = decades(rng, -1, 0.3, N_GROUPS)
    wanted_d = decades(rng, -6, 6, *SHAPE)
    w_old, g = rng.standard_normal((2, *SHAPE)) * [np.ones(SHAPE), wanted_d / 3]
    g = np.clip(g, -0.9 * wanted_d, 0.9 * wanted_d)  # Adagrad's d is never below |g|
    params = [torch.nn.Parameter(torch.tensor(row, dtype=dtype, device=torch.get_default_device())) for row in w_old]
    groups = [{"params": [p], "lr": lr[i], **own.options(i)} for i, p in enumerate(params)]
    optimizer = rule.cls(groups, eps=EPS, backend=backend, **rule.options)
    load_state(optimizer, rule.state(rule.options, wanted_d, g, rng), dtype)
    for param, gradient in zip(params, g, strict=True):
        param.grad = torch.tensor(gradient, dtype=dtype, device=param.device)
    w_old, g = values(params), values([param.grad for param in params])
    optimizer.step()

    lr, x = lr[:, None], values(params)
    names = rule.cls.spec.needed_states(optimizer.param_groups[0])
    state = {name: values([optimizer.state[param][name] for param in params]) for name in names}
    d, held_against, direction, gain = rule.after(rule.options, state, g)
    step = lr * direction / d
    z = w_old * (1 - lr * rule.options.get("weight_decay", 0.0)) - step
    size = np.abs(w_old) + np.abs(step) * (held_against / d) ** 2
    fades = np.isfinite(own.mcp_gamma) & (own.l1 > 0)
    slope = own.l2 * np.abs(w_old) + np.where(fades, np.maximum(own.l1 - np.abs(w_old) / own.mcp_gamma, 0), own.l1)
    d_prox = d * np.maximum(1, slope / 2 / held_against)
    d_prox = np.where(fades, np.maximum(d_prox, 2 * lr * gain / own.mcp_gamma), d_prox)
    if rule.options.get("penalty_mode") == "decoupled":
        d_prox, gain = np.ones(SHAPE), 1.0
    assert_nothing_is_lower(x, z, lr * gain / d_prox, own, size, dtype)
    assert 0.05 < (x == 0).mean() < 0.95 or what in ("box",)
    for name in ("lower", "upper"):
        bound = getattr(own, name)
        assert what in ("mcp", "l0") or (np.isclose(x, bound) & (x != 0)).mean() > 0.01


@every_dtype
@pytest.mark.parametrize("what", SETS)
@pytest.mark.parametrize("flavour", SGD_FLAVOURS)
def test_sgd(flavour, what, dtype, backend) -> None:
    """lr, the inverse of SGD's metric, goes over 12 decades; gradients and penalties go with it. Three steps."""
    options = SGD_FLAVOURS[flavour]
    rng = np.random.default_rng(4)
    lr = decades(rng, -6, 6, N_GROUPS)
    own = draw(what, rng, 1 / lr[:, None])
    params = [
        torch.nn.Parameter(torch.tensor(row, dtype=dtype, device=torch.get_default_device()))
        for row in 3 * rng.standard_normal(SHAPE)
    ]
    groups = [{"params": [p], "lr": lr[i], **own.options(i)} for i, p in enumerate(params)]
    optimizer = FusedRegSGD(groups, backend=backend, **options)
    lr = lr[:, None]
    for t in range(1, 4):
        w_old = values(params)
        g = draw_gradients(params, rng, lr)
        optimizer.step()
        gain = gain_of_sgd(t, **options)
        x, (z, tau, size) = values(params), step_of_sgd(optimizer, params, w_old, g, lr, gain, **options)
        assert_nothing_is_lower(x, z, np.broadcast_to(tau, SHAPE), own, size, dtype)
    if what in ("mcp", "all"):  # the penalty was more concave than the quadratic is convex, and was not
        assert 0.2 < (tau / (1 + tau * own.l2) >= own.mcp_gamma).mean() < 0.8
