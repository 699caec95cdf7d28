"""Adam and AdamW: they differ in stage 4 alone."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, lerp, maximum, square_root
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("beta1", "beta2", "eps")
BETA1, BETA2, EPS = places(FIELDS)
PLAIN, AMSGRAD = (tl.constexpr(mask) for mask in (0b011, 0b111))


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, _, _, _, _, inv_sqrt_bias_correction2, eps = constants
    second_moment = state[1]
    if STATES == AMSGRAD:
        second_moment = state[2]
    return square_root(second_moment) * inv_sqrt_bias_correction2 + eps, 1.0


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, _, _ = constants
    exp_avg = lerp(state[0], g, one_minus_beta1, beta1)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * g * g
    max_exp_avg_sq = state[2]
    if STATES == AMSGRAD:
        max_exp_avg_sq = maximum(exp_avg_sq, max_exp_avg_sq)
    state = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    d, floor_ratio = metric(state, constants, STATES)
    w = w - step_size * divide(exp_avg, d)
    return w, state, d, floor_ratio


@triton.jit
def fill(group, before, after):
    lr, beta1, beta2, eps = read(group, LR), read(group, BETA1), read(group, BETA2), read(group, EPS)
    t = after[0]
    bias_correction1 = 1 - tl.exp2(t * tl.log2(beta1))
    bias_correction2 = 1 - tl.exp2(t * tl.log2(beta2))
    step_size = lr / bias_correction1
    constants = (step_size, beta1, 1 - beta1, beta2, 1 - beta2, 1 / tl.sqrt(bias_correction2), eps)
    # tau is over d, in the prox: m_hat is unbiased already, so without its bias correction
    return constants, lr


RULE = Rule(
    step,
    fill,
    constants=7,
    metric=metric,
    field_names=FIELDS,
    state_names=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    scalar_state_names=("step",),
    variants=(PLAIN.value, AMSGRAD.value),
)
