"""NAdam."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, lerp, square_root
from ..scalars import LR, as_stored, read
from .rule import Rule, places

FIELDS = ("beta1", "beta2", "eps", "momentum_decay")
BETA1, BETA2, EPS, MOMENTUM_DECAY = places(FIELDS)
LOG2_OF_0_96 = tl.constexpr(-0.058893689053568565)


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, _, _, _, _, _, inv_bias_correction2, eps = constants
    return square_root(state[1] * inv_bias_correction2) + eps, 1.0


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    share_of_g, share_of_m, beta1, one_minus_beta1, beta2, one_minus_beta2, _, _ = constants
    exp_avg = lerp(state[0], g, one_minus_beta1, beta1)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * g * g
    state = (exp_avg, exp_avg_sq)
    d, floor_ratio = metric(state, constants, STATES)
    return w - divide(share_of_g * g + share_of_m * exp_avg, d), state, d, floor_ratio


@triton.jit
def momentum_at(group, t):
    return read(group, BETA1) * (1 - 0.5 * tl.exp2(t * read(group, MOMENTUM_DECAY) * LOG2_OF_0_96))


@triton.jit
def next_scalars(group, before, states_at):
    return (
        before[0] + 1,
        before[1] * as_stored(states_at, 1, momentum_at(group, before[0] + 1)),
    )  # torch rounds the factor, too


@triton.jit
def fill(group, before, after):
    lr, beta1, beta2, eps = read(group, LR), read(group, BETA1), read(group, BETA2), read(group, EPS)
    t, mu_product, next_mu = after[0], after[1], momentum_at(group, after[0] + 1)
    bias_correction1 = 1 - tl.exp2(t * tl.log2(beta1))
    bias_correction2 = 1 - tl.exp2(t * tl.log2(beta2))
    share_of_g = lr * (1 - momentum_at(group, t)) / (1 - mu_product)
    share_of_m = lr * next_mu / (1 - mu_product * next_mu)
    constants = (share_of_g, share_of_m, beta1, 1 - beta1, beta2, 1 - beta2, 1 / bias_correction2, eps)
    # tau is what a constant gradient of 1 moves, times d
    return constants, share_of_g + share_of_m * bias_correction1


RULE = Rule(
    step,
    fill,
    constants=8,
    metric=metric,
    field_names=FIELDS,
    state_names=("exp_avg", "exp_avg_sq"),
    scalar_state_names=("step", "mu_product"),
    variants=(0b11,),
    next_scalars=next_scalars,
)
