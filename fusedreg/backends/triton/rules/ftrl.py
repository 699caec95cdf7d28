"""FTRL-Proximal."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import clamp, divide, sign, soft_threshold, square_root
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("beta", "l1_of_step")
BETA, L1_OF_STEP = places(FIELDS)


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, _, beta, _, _ = constants
    return square_root(state[1]) + beta, -1.0  # no floor: beta is what bounds the step of a prox


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, inv_step_size, _, l1_before, l1_after = constants
    sum_of_squares = state[1] + g * g
    d, floor_ratio = metric((state[0], sum_of_squares), constants, STATES)
    moved = w - step_size * divide(g, d)
    dual = tl.where(w == 0, state[0] - g, d * moved * inv_step_size + sign(w) * l1_before)
    # What crosses zero has to outweigh l1 on the other side, too.
    waits = (w == 0) | (sign(w) * moved < 0)
    z = tl.where(waits, step_size * divide(soft_threshold(dual, l1_before), d), moved)
    # What else holds a weight at zero is not summed up.
    return z, (clamp(dual, l1_after), sum_of_squares), d, floor_ratio


@triton.jit
def finish(w, z, state, constants, STATES: tl.constexpr):
    return (tl.where(w == 0, state[0], 0.0), state[1])


@triton.jit
def next_scalars(group, before, states_at):
    return (before[0] + read(group, L1_OF_STEP),)


@triton.jit
def fill(group, before, after):
    lr = read(group, LR)
    inverse = tl.where(lr != 0, 1 / lr, 0.0)
    return (lr, inverse, read(group, BETA), before[0], after[0]), lr


RULE = Rule(
    step,
    fill,
    constants=5,
    metric=metric,
    field_names=FIELDS,
    state_names=("held_back", "sum"),
    scalar_state_names=("l1_sum",),
    variants=(0b11,),
    next_scalars=next_scalars,
    finish=finish,
)
