"""Rprop."""

from __future__ import annotations

import triton
import triton.language as tl

from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("etaminus", "etaplus", "step_size_min", "step_size_max")
ETAMINUS, ETAPLUS, STEP_SIZE_MIN, STEP_SIZE_MAX = places(FIELDS)


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    etaminus, etaplus, smallest, largest = constants
    product = g * state[0]
    turns = product < 0
    size = state[1] * tl.where(product > 0, etaplus, tl.where(turns, etaminus, 1.0))
    size = tl.where(size < smallest, smallest, size)
    size = tl.where(size > largest, largest, size)
    g = tl.where(turns, 0.0, g)  # after a turn, the next step is taken whatever its sign
    direction = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g)).to(w.dtype)  # a NaN is to be seen
    return w - size * direction, (g, size), 1.0, 1.0


@triton.jit
def fill(group, before, after):
    minus, plus, smallest = read(group, ETAMINUS), read(group, ETAPLUS), read(group, STEP_SIZE_MIN)
    return (minus, plus, smallest, read(group, STEP_SIZE_MAX)), read(group, LR)


RULE = Rule(
    step,
    fill,
    constants=4,
    field_names=FIELDS,
    state_names=("prev", "step_size"),
    scalar_state_names=("step",),
    variants=(0b11,),
)
