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
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, eps = constants
    sum_of_squares = state[0] + g * g
    d = square_root(sum_of_squares) + eps
    return w - step_size * divide(g, d), (sum_of_squares,), d, 1.0


@triton.jit
def fill(group, before, after):
    decayed_lr = read(group, LR) / (1 + before[0] * read(group, LR_DECAY))  # the state is t - 1
    return (decayed_lr, read(group, EPS)), decayed_lr


RULE = Rule(
    step,
    fill,
    constants=2,
    has_metric=True,
    field_names=FIELDS,
    state_names=("sum",),
    scalar_state_names=("step",),
    variants=(0b1,),
)
