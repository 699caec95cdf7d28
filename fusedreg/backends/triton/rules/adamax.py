"""Adamax."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, lerp, maximum
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("beta1", "beta2", "eps")
BETA1, BETA2, EPS = places(FIELDS)


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    return state[1], 1.0


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, beta1, one_minus_beta1, beta2, eps = constants
    exp_avg = lerp(state[0], g, one_minus_beta1, beta1)
    state = (exp_avg, maximum(beta2 * state[1], tl.abs(g) + eps))
    d, floor_ratio = metric(state, constants, STATES)
    return w - step_size * divide(exp_avg, d), state, d, floor_ratio


@triton.jit
def fill(group, before, after):
    lr, beta1 = read(group, LR), read(group, BETA1)
    step_size = lr / (1 - tl.exp2(after[0] * tl.log2(beta1)))
    return (step_size, beta1, 1 - beta1, read(group, BETA2), read(group, EPS)), lr


RULE = Rule(
    step,
    fill,
    constants=5,
    metric=metric,
    field_names=FIELDS,
    state_names=("exp_avg", "exp_inf"),
    scalar_state_names=("step",),
    variants=(0b11,),
)
