"""ASGD."""

from __future__ import annotations

import triton
import triton.language as tl

from ..scalars import LR, as_stored, read
from .rule import Rule, places

FIELDS = ("lambd", "alpha", "t0")
LAMBD, ALPHA, T0 = places(FIELDS)


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, shrink, _ = constants
    return w * shrink - step_size * g, state, 1.0, 1.0


@triton.jit
def finish(w, z, state, constants, STATES: tl.constexpr):
    _, _, share = constants
    return (tl.where(share == 1, w, state[0] + share * (w - state[0])),)


@triton.jit
def next_scalars(group, before, states_at):
    lr, alpha, t = read(group, LR), read(group, ALPHA), before[0] + 1
    power = tl.exp2(alpha * tl.log2(1 + read(group, LAMBD) * lr * t))
    steps_averaged = t - read(group, T0)
    eta, mu = lr / tl.where(alpha == 0, 1.0, power), 1 / tl.where(steps_averaged > 1, steps_averaged, 1.0)
    # torch makes both in its default dtype, as the count of steps is, also where they are stored in a wider one
    return t, as_stored(states_at, 0, eta), as_stored(states_at, 0, mu)


@triton.jit
def fill(group, before, after):
    eta = before[1]  # as the step before has left it
    return (eta, 1 - read(group, LAMBD) * eta, before[2]), eta


RULE = Rule(
    step,
    fill,
    constants=3,
    field_names=FIELDS,
    state_names=("ax",),
    scalar_state_names=("step", "eta", "mu"),
    variants=(0b1,),
    next_scalars=next_scalars,
    finish=finish,
)
