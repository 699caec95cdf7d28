"""Adagrad."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, square_root
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("lr_decay", "eps")
LR_DECAY, EPS = places(FIELDS)


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, eps = constants
    return square_root(state[0]) + eps, 1.0


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, _ = constants
    state = (state[0] + g * g,)
    d, floor_ratio = metric(state, constants, STATES)
    return w - step_size * divide(g, d), state, d, floor_ratio


@triton.jit
def fill(group, before, after):
    decayed_lr = read(group, LR) / (1 + before[0] * read(group, LR_DECAY))  # the state is t - 1
    return (decayed_lr, read(group, EPS)), decayed_lr


RULE = Rule(
    step,
    fill,
    constants=2,
    metric=metric,
    field_names=FIELDS,
    state_names=("sum",),
    scalar_state_names=("step",),
    variants=(0b1,),
)
