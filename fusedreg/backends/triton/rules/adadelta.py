"""Adadelta."""

from __future__ import annotations

import triton
import triton.language as tl

from ..maths import divide, square_root
from ..scalars import LR, read
from .rule import Rule, places

FIELDS = ("rho", "eps")
RHO, EPS = places(FIELDS)
# Where eps is 0 nothing has moved yet and nothing will, and the metric would be infinite: a prox that moves nothing.
LARGEST_METRIC = tl.constexpr(1e18)


@triton.jit
def metric(state, constants, STATES: tl.constexpr):
    _, _, _, eps = constants
    of_gradients = square_root(state[0] + eps)
    d = divide(of_gradients, square_root(state[1] + eps))
    d = tl.where(d > LARGEST_METRIC, LARGEST_METRIC, d)
    # the floor is a gradient, and d is a gradient over a step
    return d, divide(d, of_gradients)


@triton.jit
def step(w, g, state, constants, STATES: tl.constexpr):
    step_size, rho, one_minus_rho, eps = constants
    square_avg = rho * state[0] + one_minus_rho * g * g
    of_gradients, of_steps = square_root(square_avg + eps), square_root(state[1] + eps)
    delta = divide(of_steps, of_gradients) * g
    acc_delta = rho * state[1] + one_minus_rho * delta * delta
    d, floor_ratio = metric((square_avg, state[1]), constants, STATES)  # of the steps before this one
    return w - step_size * delta, (square_avg, acc_delta), d, floor_ratio


@triton.jit
def fill(group, before, after):
    lr, rho = read(group, LR), read(group, RHO)
    return (lr, rho, 1 - rho, read(group, EPS)), lr


RULE = Rule(
    step,
    fill,
    constants=4,
    metric=metric,
    field_names=FIELDS,
    state_names=("square_avg", "acc_delta"),
    scalar_state_names=("step",),
    variants=(0b11,),
)
