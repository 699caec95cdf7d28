"""RMSprop, centered or not, with and without momentum."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, lerp, maximum, square_root
from ..scalars import LR, read
from .momentum_gain import next_momentum_gain
from .rule import Rule, places

FIELDS = ("alpha", "eps", "momentum")
ALPHA, EPS, MOMENTUM = places(FIELDS)
WITH_MOMENTUM, CENTERED = (tl.constexpr(mask) for mask in (0b010, 0b100))


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, _, _, eps, _ = constants
    d = square_root(state[0]) + eps
    floor_ratio = 1.0
    if CENTERED & STATES:
        # A variance below zero is a rounding error; its root, a NaN, is what torch makes of it.
        uncentered = d
        d = square_root(maximum(0.0, state[0] - state[2] * state[2])) + eps
        # At a solution the gradient stands still and the variance goes: the uncentered moment says whether the prox's
        # floor acts, and then the floor goes as the metric does.
        floor_ratio = divide(d, uncentered)
    return d, floor_ratio


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, alpha, one_minus_alpha, _, momentum = constants
    momentum_buffer, grad_avg = state[1], state[2]
    square_avg = alpha * state[0] + one_minus_alpha * g * g
    if CENTERED & STATES:
        grad_avg = lerp(grad_avg, g, one_minus_alpha, alpha)
    d, floor_ratio = metric((square_avg, momentum_buffer, grad_avg), constants, STATES)
    direction = divide(g, d)
    if WITH_MOMENTUM & STATES:
        direction = momentum * momentum_buffer + direction
        momentum_buffer = direction
    return w - step_size * direction, (square_avg, momentum_buffer, grad_avg), d, floor_ratio


@triton.jit
def next_scalars(group, before, states_at):
    return (before[0] + 1, next_momentum_gain(before[1], read(group, MOMENTUM), 0.0))


@triton.jit
def fill(group, before, after):
    lr, alpha, momentum = read(group, LR), read(group, ALPHA), read(group, MOMENTUM)
    tau = lr * tl.where(momentum != 0, after[1], 1.0)
    return (lr, alpha, 1 - alpha, read(group, EPS), momentum), tau


RULE = Rule(
    step,
    fill,
    constants=5,
    metric=metric,
    field_names=FIELDS,
    state_names=("square_avg", "momentum_buffer", "grad_avg"),
    scalar_state_names=("step", "momentum_gain"),
    variants=(0b001, 0b011, 0b101, 0b111),
    next_scalars=next_scalars,
)
