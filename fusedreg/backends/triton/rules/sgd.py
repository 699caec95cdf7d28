"""SGD, with and without (Nesterov) momentum."""

from __future__ import annotations

import triton
import triton.language as tl

from ..scalars import LR, read
from .momentum_gain import next_momentum_gain
from .rule import Rule, places

FIELDS = ("momentum", "dampening", "nesterov")
MOMENTUM, DAMPENING, NESTEROV = places(FIELDS)
PLAIN, WITH_MOMENTUM = (tl.constexpr(mask) for mask in (0b0, 0b1))


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, momentum, one_minus_dampening, nesterov = constants
    if STATES == WITH_MOMENTUM:
        momentum_buffer = momentum * state[0] + one_minus_dampening * g
        direction = tl.where(nesterov != 0, g + nesterov * momentum_buffer, momentum_buffer)
        return w - step_size * direction, (momentum_buffer,), 1.0, 1.0
    else:
        return w - step_size * g, state, 1.0, 1.0


@triton.jit
def next_scalars(group, before, states_at):
    return (next_momentum_gain(before[0], read(group, MOMENTUM), read(group, DAMPENING)),)


@triton.jit
def fill(group, before, after):
    lr, momentum, dampening = read(group, LR), read(group, MOMENTUM), read(group, DAMPENING)
    is_first = before[0] == 0
    gain = tl.where(momentum != 0, after[0], 1.0)
    nesterov = tl.where(read(group, NESTEROV) != 0, momentum, 0.0)
    step_gain = tl.where(read(group, NESTEROV) != 0, 1 + momentum * gain, gain)
    tau = lr * tl.where(step_gain > 0, step_gain, 0.0)  # with dampening above 1 it can be negative
    # the first buffer is the gradient itself, undamped
    constants = (lr, tl.where(is_first, 0.0, momentum), tl.where(is_first, 1.0, 1 - dampening), nesterov)
    return constants, tau


RULE = Rule(
    step,
    fill,
    constants=4,
    field_names=FIELDS,
    state_names=("momentum_buffer",),
    scalar_state_names=("momentum_gain",),
    variants=(PLAIN.value, WITH_MOMENTUM.value),
    next_scalars=next_scalars,
)
