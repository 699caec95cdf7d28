"""Lion."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import lerp
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("beta1", "beta2")
BETA1, BETA2 = places(FIELDS)


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2 = constants
    mixed = lerp(state[0], g, one_minus_beta1, beta1)
    direction = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed)).to(w.dtype)  # a NaN is to be seen
    return w - step_size * direction, (lerp(state[0], g, one_minus_beta2, beta2),), 1.0, 1.0


@triton.jit
def next_scalars(group, before, states_at):
    return ()


@triton.jit
def fill(group, before, after):
    lr, beta1, beta2 = read(group, LR), read(group, BETA1), read(group, BETA2)
    return (lr, beta1, 1 - beta1, beta2, 1 - beta2), lr


RULE = Rule(
    step,
    fill,
    constants=5,
    field_names=FIELDS,
    state_names=("exp_avg",),
    scalar_state_names=(),
    variants=(0b1,),
    next_scalars=next_scalars,
)
