"""RAdam."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, lerp, square_root
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("beta1", "beta2", "eps")
BETA1, BETA2, EPS = places(FIELDS)


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, _, _, _, _, inv_sqrt_bias_correction2, eps, is_rectified = constants
    d = tl.where(is_rectified != 0, (square_root(state[1]) + eps) * inv_sqrt_bias_correction2, 1.0)
    # Without a metric there is no floor either: below zero, it never acts.
    return d, tl.where(is_rectified != 0, 1.0, -1.0)


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, _, _, _ = constants
    exp_avg = lerp(state[0], g, one_minus_beta1, beta1)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * g * g
    state = (exp_avg, exp_avg_sq)
    d, floor_ratio = metric(state, constants, STATES)
    return w - step_size * divide(exp_avg, d), state, d, floor_ratio


@triton.jit
def fill(group, before, after):
    lr, beta1, beta2, eps = read(group, LR), read(group, BETA1), read(group, BETA2), read(group, EPS)
    t = after[0]
    power2 = tl.exp2(t * tl.log2(beta2))
    # How many steps the average of squares stands for: in the limit, and now.
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * power2 / (1 - power2)
    is_rectified = length > 5
    square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    tau = lr * tl.where(is_rectified, tl.sqrt(tl.where(is_rectified, square, 1.0)), 1.0)
    step_size = tau / (1 - tl.exp2(t * tl.log2(beta1)))
    inv_sqrt_bias_correction2 = 1 / tl.sqrt(1 - power2)
    switch = tl.where(is_rectified, 1.0, 0.0)
    return (step_size, beta1, 1 - beta1, beta2, 1 - beta2, inv_sqrt_bias_correction2, eps, switch), tau


RULE = Rule(
    step,
    fill,
    constants=8,
    metric=metric,
    field_names=FIELDS,
    state_names=("exp_avg", "exp_avg_sq"),
    scalar_state_names=("step",),
    variants=(0b11,),
)
