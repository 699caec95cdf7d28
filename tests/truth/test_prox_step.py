"""Proves that one step of the public optimizers ends at the minimiser of the problem that defines it.

That is  c / 2 * (x - z)^2 + l1 |x| + l2 / 2 * x^2,  with z where torch's twin would have put the weight, and c =
d_prox / tau for the rules with a metric, 1 / tau for SGD. The conditions of optimality decide, to rounding; scipy's
minimize_scalar, which knows nothing of a soft-threshold, must find no lower value and no other place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from figures import at_most
from helpers import TWINS, FusedRegAdagrad, FusedRegAdam, FusedRegAdamW, FusedRegRMSprop, FusedRegSGD
from scipy.optimize import minimize_scalar

Array = np.ndarray
N_GROUPS, N_WEIGHTS = 24, 16
T = 4  # the step number that a state pretends to: both bias corrections still count
BETAS, EPS = (0.9, 0.999), 1e-8


def decades(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return 10 ** rng.uniform(low, high, shape)


def penalties(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(l1, l2) of each group, from 1e-4 to 1e4; each is 0 in some of them."""
    l1, l2 = decades(rng, -4, 4, N_GROUPS), decades(rng, -4, 4, N_GROUPS)
    l1[::5], l2[1::5] = 0, 0
    return l1, l2


def values(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.stack([tensor.detach().double().cpu() for tensor in tensors]).numpy()


def assert_minimises(x, z, c, l1, l2, summands, epsilon) -> None:
    """`summands` bounds the size of what was added up to z: a rounding there is one of the result."""
    scale = epsilon * (c * summands + l1 + l2 * np.abs(x))
    slope = c * (x - z) + l2 * x
    violation = np.where(x != 0, np.abs(slope + l1 * np.sign(x)), np.abs(slope) - l1)
    at_most(4, (violation / scale).max(), f"one prox step, eps {epsilon:.0e}: optimality, in roundings")


def assert_scipy_finds_nothing_better(x, z, c, l1, l2, summands) -> None:
    """Near its minimum f is flat: scipy cannot tell places apart between which f changes by less than its rounding."""

    def f(at: float, z: float, c: float, l1: float, l2: float) -> float:
        return c / 2 * (at - z) ** 2 + l1 * abs(at) + l2 / 2 * at**2

    epsilon = np.finfo(float).eps
    for args in np.broadcast(x, z, c, l1, l2, summands):
        x_, z_, c_, l1_, l2_, size = map(float, args)
        # z itself is known to a few roundings of its summands.
        bounds = sorted((0.0, z_))
        found = minimize_scalar(
            f, args=(z_, c_, l1_, l2_), bounds=bounds, method="bounded", options={"xatol": 1e-13 * abs(z_) + 1e-300}
        )
        value = f(x_, z_, c_, l1_, l2_)
        slack = 16 * epsilon * size * (c_ * abs(x_ - z_) + l1_ + l2_ * abs(x_))
        assert value <= found.fun * (1 + 16 * epsilon) + slack
        resolution = np.sqrt(2 * epsilon * found.fun / (c_ + l2_))
        assert abs(x_ - found.x) <= 4 * resolution + 1e-7 * abs(z_) + 16 * epsilon * size


every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A rule with a metric: a state in which the next step has the metric that is wanted, and what it says after it.

    Arrays have a row for each group. `d` is the metric wanted, and `g` the gradient of the step.
    """

    cls: type
    options: dict[str, Any]
    state: Callable[[dict[str, Any], Array, Array, np.random.Generator], dict[str, Array | float]]
    after: Callable[[dict[str, Any], dict[str, Array], Array], tuple[Array, Array, Array, float]]
    """d, what the floor is held against, the direction that the weight goes times d, and tau / lr."""


def adam_state(options: dict[str, Any], d: Array, g: Array, rng: np.random.Generator) -> dict[str, Array | float]:
    second_moment = d**2 * (1 - BETAS[1] ** T)
    v = (second_moment - (1 - BETAS[1]) * g**2) / BETAS[1]
    state = {"step": T - 1, "exp_avg": rng.standard_normal(d.shape) * d / 3, "exp_avg_sq": v}
    if options.get("amsgrad"):
        # The metric wanted stands in the maximum, and the second moment is a tenth of it.
        state |= {"max_exp_avg_sq": second_moment, "exp_avg_sq": v / 10}
    return state


def adam_after(options: dict[str, Any], state: dict[str, Array], g: Array) -> tuple[Array, Array, Array, float]:
    second_moment = state["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"]
    d = np.sqrt(second_moment / (1 - BETAS[1] ** T)) + EPS
    return d, d, state["exp_avg"] / (1 - BETAS[0] ** T), 1.0


GAIN = 2.5  # of the momentum, before the step


def rmsprop_state(options: dict[str, Any], d: Array, g: Array, rng: np.random.Generator) -> dict[str, Array | float]:
    alpha, square, state = options["alpha"], d**2, {"step": T - 1}
    if options.get("centered"):
        # Of any size from nothing to a few times d
        grad_avg = rng.uniform(-3, 3, d.shape) * d
        state["grad_avg"] = (grad_avg - (1 - alpha) * g) / alpha
        square = square + grad_avg**2
    state["square_avg"] = (square - (1 - alpha) * g**2) / alpha
    if options.get("momentum"):
        state |= {"momentum_buffer": rng.standard_normal(d.shape), "momentum_gain": GAIN}
    return state


def rmsprop_after(options: dict[str, Any], state: dict[str, Array], g: Array) -> tuple[Array, Array, Array, float]:
    d = uncentered = np.sqrt(state["square_avg"]) + EPS
    if options.get("centered"):
        d = np.sqrt(state["square_avg"] - state["grad_avg"] ** 2) + EPS
    if options.get("momentum"):
        return d, uncentered, state["momentum_buffer"] * d, options["momentum"] * GAIN + 1
    return d, uncentered, g, 1.0


def adagrad_state(options: dict[str, Any], d: Array, g: Array, rng: np.random.Generator) -> dict[str, Array | float]:
    return {"step": T - 1, "sum": d**2 - g**2}


def adagrad_after(options: dict[str, Any], state: dict[str, Array], g: Array) -> tuple[Array, Array, Array, float]:
    d = np.sqrt(state["sum"]) + EPS
    decayed = 1 / (1 + (T - 1) * options.get("lr_decay", 0))
    return d, d, g * decayed, decayed


BETA, ALPHA = {"betas": BETAS}, {"alpha": BETAS[1]}
ADAPTIVE = {
    "adam": Adaptive(FusedRegAdam, BETA, adam_state, adam_after),
    "amsgrad": Adaptive(FusedRegAdam, {**BETA, "amsgrad": True}, adam_state, adam_after),
    "adamw-with-decay": Adaptive(FusedRegAdamW, {**BETA, "weight_decay": 0.3}, adam_state, adam_after),
    "adam-decoupled": Adaptive(FusedRegAdam, {**BETA, "penalty_mode": "decoupled"}, adam_state, adam_after),
    "rmsprop": Adaptive(FusedRegRMSprop, ALPHA, rmsprop_state, rmsprop_after),
    "rmsprop-momentum": Adaptive(FusedRegRMSprop, {**ALPHA, "momentum": 0.9}, rmsprop_state, rmsprop_after),
    "rmsprop-centered": Adaptive(FusedRegRMSprop, {**ALPHA, "centered": True}, rmsprop_state, rmsprop_after),
    "rmsprop-centered-momentum": Adaptive(
        FusedRegRMSprop, {**ALPHA, "centered": True, "momentum": 0.8}, rmsprop_state, rmsprop_after
    ),
    "adagrad": Adaptive(FusedRegAdagrad, {}, adagrad_state, adagrad_after),
    "adagrad-lr_decay": Adaptive(FusedRegAdagrad, {"lr_decay": 0.3}, adagrad_state, adagrad_after),
}


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Array | float], dtype: torch.dtype) -> None:
    """Arrays have a row for each group's one parameter; numbers are scalar states of them all."""

    def tensor(name: str, value: Array | float, row: int) -> torch.Tensor:
        if isinstance(value, np.ndarray):
            return torch.tensor(value[row], dtype=dtype, device=torch.get_default_device())
        return torch.tensor(float(value), dtype=torch.float32 if name == "step" else torch.float64, device="cpu")

    rows = {i: {name: tensor(name, value, i) for name, value in state.items()} for i in range(N_GROUPS)}
    optimizer.load_state_dict({"state": rows, "param_groups": optimizer.state_dict()["param_groups"]})


@every_dtype
@pytest.mark.parametrize("flavour", ADAPTIVE)
def test_rules_with_a_metric(flavour, dtype, backend) -> None:
    """The state is set so that the metric d goes over 12 decades, on both sides of the safeguard's floor."""
    rule = ADAPTIVE[flavour]
    rng = np.random.default_rng(1)
    shape = (N_GROUPS, N_WEIGHTS)
    l1, l2 = penalties(rng)
    lr = decades(rng, -1, 0.3, N_GROUPS)
    wanted_d = decades(rng, -6, 6, *shape)
    w_old, g = rng.standard_normal((2, *shape)) * [np.ones(shape), wanted_d / 3]
    g = np.clip(g, -0.9 * wanted_d, 0.9 * wanted_d)  # Adagrad's d is never below |g|
    params = [torch.nn.Parameter(torch.tensor(row, dtype=dtype, device=torch.get_default_device())) for row in w_old]
    groups = [{"params": [p], "lr": a, "l1": b, "l2": c} for p, a, b, c in zip(params, lr, l1, l2, strict=True)]
    optimizer = rule.cls(groups, eps=EPS, backend=backend, **rule.options)
    load_state(optimizer, rule.state(rule.options, wanted_d, g, rng), dtype)
    for param, gradient in zip(params, g, strict=True):
        param.grad = torch.tensor(gradient, dtype=dtype, device=param.device)
    w_old, g = values(params), values([param.grad for param in params])  # as rounded to the dtype
    optimizer.step()

    l1, l2, lr = l1[:, None], l2[:, None], lr[:, None]
    x = values(params)
    names = rule.cls.spec.needed_states(optimizer.param_groups[0])
    state = {name: values([optimizer.state[param][name] for param in params]) for name in names}
    d, held_against, direction, gain = rule.after(rule.options, state, g)
    np.testing.assert_allclose(d, wanted_d + EPS, rtol=1e-5)
    floor = (l1 + l2 * np.abs(w_old)) / 2
    d_prox = d * np.maximum(1, floor / held_against)
    if rule.options.get("penalty_mode") == "decoupled":
        d_prox, gain = np.ones(shape), 1.0
    step = lr * direction / d
    z = w_old * (1 - lr * rule.options.get("weight_decay", 0.0)) - step
    # A variance has the rounding errors of what it is the difference of.
    size = np.abs(w_old) + np.abs(step) * (held_against / d) ** 2
    c = d_prox / (lr * gain)
    assert_minimises(x, z, c, l1, l2, size, torch.finfo(dtype).eps)
    if dtype == torch.float64:
        assert_scipy_finds_nothing_better(x, z, c, l1, l2, size)
    # Both cases come up often: the floor acting or not, a weight thresholded or not.
    for share in ((floor > held_against).mean(), (x == 0).mean()):
        assert 0.1 < share < 0.9


SGD_FLAVOURS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


def gain_of_sgd(t: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    """In closed form: the first buffer is the gradient itself, and each step keeps momentum of the rest. At infinity:
    the stationary one."""
    stationary = (1 - dampening) / (1 - momentum)
    return momentum ** (t - 1) + stationary * (1 - momentum ** (t - 1))


def step_of_sgd(optimizer, params, w_old, g, lr, gain, momentum=0.0, dampening=0.0, nesterov=False):
    """After a step: where it would have ended without a prox, its tau, and the size of what was added up."""
    direction, tau = g, lr
    if momentum:
        buffer = values([optimizer.state[param]["momentum_buffer"] for param in params])
        direction, tau = buffer, lr * gain
        if nesterov:
            direction, tau = g + momentum * buffer, lr * (1 + momentum * gain)
    size = np.abs(w_old) + lr * np.abs(direction) + (lr * np.abs(g) if nesterov else 0)
    return w_old - lr * direction, tau, size


def draw_gradients(params: list[torch.nn.Parameter], rng: np.random.Generator, lr: Array) -> Array:
    """Of SGD: they go with the inverse of lr."""
    for param, row in zip(params, 3 * rng.standard_normal((N_GROUPS, N_WEIGHTS)) / lr, strict=True):
        param.grad = torch.tensor(row, dtype=param.dtype, device=param.device)
    return values([param.grad for param in params])


@every_dtype
@pytest.mark.parametrize("start", ["first-steps", "from-torch"])
@pytest.mark.parametrize("flavour", SGD_FLAVOURS)
def test_sgd(flavour, start, dtype, backend) -> None:
    """lr, the inverse of SGD's metric, goes over 12 decades; gradients and penalties go with it. Three steps.

    They are the first, or the first after steps of torch's SGD: nobody counted the gain of that buffer, and it is taken
    as the stationary one.
    """
    options = SGD_FLAVOURS[flavour]
    rng = np.random.default_rng(2)
    lr = decades(rng, -6, 6, N_GROUPS)
    l1, l2 = (strength**0.25 / lr for strength in penalties(rng))  # tau * l1 from 0.1 to 10
    params = [
        torch.nn.Parameter(torch.tensor(row, dtype=dtype, device=torch.get_default_device()))
        for row in 3 * rng.standard_normal((N_GROUPS, N_WEIGHTS))
    ]
    groups = [{"params": [p], "lr": a, "l1": b, "l2": c} for p, a, b, c in zip(params, lr, l1, l2, strict=True)]
    optimizer = FusedRegSGD(groups, backend=backend, **options)
    l1, l2, lr = l1[:, None], l2[:, None], lr[:, None]
    if start == "from-torch":
        twin = TWINS[FusedRegSGD]([{"params": [p], "lr": a.item()} for p, a in zip(params, lr, strict=True)], **options)
        for _ in range(2):
            draw_gradients(params, rng, lr)
            twin.step()
        optimizer.load_state_dict(twin.state_dict())
    n_zeros = 0
    for t in range(1, 4):
        w_old = values(params)
        g = draw_gradients(params, rng, lr)
        optimizer.step()
        gain = gain_of_sgd(t if start == "first-steps" else np.inf, **options)
        x, (z, tau, size) = values(params), step_of_sgd(optimizer, params, w_old, g, lr, gain, **options)
        assert_minimises(x, z, 1 / tau, l1, l2, size, torch.finfo(dtype).eps)
        if dtype == torch.float64:
            assert_scipy_finds_nothing_better(x, z, 1 / tau, l1, l2, size)
        n_zeros += (x == 0).sum()
    assert 0.1 < n_zeros / (3 * N_GROUPS * N_WEIGHTS) < 0.9
