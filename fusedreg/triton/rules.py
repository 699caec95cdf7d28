"""Stage 5 of a step: the rules. A rule is what it does to an element, and what it needs to know for that.

``fill`` runs once for a slot, a parameter group at one clock: in float64, from the group's scalars and the clock, it
makes the few numbers that ``step`` then takes for every element, and the next clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .maths import divide, maximum, square_root
from .scalars import LR, RULE_SCALARS, read

# -- Adam and AdamW: they differ in stage 4 alone

BETA1, BETA2, EPS, AMSGRAD = (tl.constexpr(RULE_SCALARS + i) for i in range(4))


@triton.jit
def adam(w, g, state, scalars):
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias_correction2, eps = scalars
    # torch's lerp, from the nearer end: with a small beta1 a large exp_avg would swallow a small gradient.
    change = g - state[0]
    exp_avg = tl.where(one_minus_beta1 < 0.5, state[0] + one_minus_beta1 * change, g - beta1 * change)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * g * g
    if len(state) == 3:  # amsgrad
        max_exp_avg_sq = maximum(exp_avg_sq, state[2])
        d = square_root(max_exp_avg_sq) * inv_sqrt_bias_correction2 + eps
        w = w - step_size * divide(exp_avg, d)
        return w, (exp_avg, exp_avg_sq, max_exp_avg_sq), d
    else:
        d = square_root(exp_avg_sq) * inv_sqrt_bias_correction2 + eps
        w = w - step_size * divide(exp_avg, d)
        return w, (exp_avg, exp_avg_sq), d


@triton.jit
def fill_adam(group, clock):
    lr, beta1, beta2, eps = read(group, LR), read(group, BETA1), read(group, BETA2), read(group, EPS)
    t = clock + 1
    bias_correction1 = 1 - tl.exp2(t * tl.log2(beta1))
    bias_correction2 = 1 - tl.exp2(t * tl.log2(beta2))
    step_size = lr / bias_correction1
    scalars = (step_size, beta1, 1 - beta1, beta2, 1 - beta2, 1 / tl.sqrt(bias_correction2), eps)
    # tau is over d, in the prox: m_hat is unbiased already, so without its bias correction
    return scalars, lr, t


def adam_next_clock(group: Mapping[str, float], clock: float) -> float:
    return clock + 1


# -- SGD, with and without (Nesterov) momentum

MOMENTUM, DAMPENING, NESTEROV = (tl.constexpr(RULE_SCALARS + i) for i in range(3))


@triton.jit
def sgd(w, g, state, scalars):
    step_size, momentum, one_minus_dampening, nesterov = scalars
    if len(state) == 1:
        momentum_buffer = momentum * state[0] + one_minus_dampening * g
        direction = tl.where(nesterov != 0, g + nesterov * momentum_buffer, momentum_buffer)
        return w - step_size * direction, (momentum_buffer,), 1.0
    else:
        return w - step_size * g, state, 1.0


# The smallest positive float64. A gain of 0 is before the first step; dampening can bring it there later, too.
SMALLEST = tl.constexpr(5e-324)


@triton.jit
def fill_sgd(group, clock):
    """The clock is the momentum's gain s_t: its recurrence, run on a constant 1 (docs/formulas.md)."""
    lr, momentum, dampening = read(group, LR), read(group, MOMENTUM), read(group, DAMPENING)
    is_first = clock == 0
    stationary = tl.where(momentum < 1, (1 - dampening) / tl.where(momentum < 1, 1 - momentum, 1.0), 1.0)
    counted = momentum * clock + 1 - dampening
    gain = tl.where(clock == clock, tl.where(counted != 0, counted, SMALLEST), stationary)  # NaN: nobody counted
    gain = tl.where(is_first, 1.0, gain)
    # without momentum the gain waits, with the buffer, for momentum to come back
    next_clock = tl.where(momentum != 0, gain, clock)
    gain = tl.where(momentum != 0, gain, 1.0)
    nesterov = tl.where(read(group, NESTEROV) != 0, momentum, 0.0)
    step_gain = tl.where(read(group, NESTEROV) != 0, 1 + momentum * gain, gain)
    tau = lr * tl.where(step_gain > 0, step_gain, 0.0)  # with dampening above 1 it can be negative
    # the first buffer is the gradient itself, undamped
    scalars = (lr, tl.where(is_first, 0.0, momentum), tl.where(is_first, 1.0, 1 - dampening), nesterov)
    return scalars, tau, next_clock


def sgd_next_clock(group: Mapping[str, float], clock: float) -> float:
    momentum, dampening = group["momentum"], group["dampening"]
    if momentum == 0:
        return clock
    if clock == 0:
        return 1.0
    if clock == clock:
        return momentum * clock + 1 - dampening or SMALLEST.value
    return (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0


# -- the list


class Rule(NamedTuple):
    step: Any
    """``step(w, g, state, scalars)``: the moved weight, its new state, the metric d (1 for a rule without one)."""
    fill: Any
    """``fill(group, clock)``: ``step``'s scalars, the prox's step size tau, the next clock."""
    step_scalars: int
    """How many scalars ``step`` takes."""
    has_metric: bool
    state_names: tuple[str, ...]
    scalar_names: tuple[str, ...]
    """As in the class, and in csrc/hyper.h."""
    state_count: Callable[[Mapping[str, float]], int]
    next_clock: Callable[[Mapping[str, float], float], float]
    """For clocks that the host keeps; what ``fill`` returns for those on the device."""


RULES: dict[str, Rule] = {
    "adam": Rule(
        adam,
        fill_adam,
        7,
        True,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        ("beta1", "beta2", "eps", "amsgrad"),
        lambda group: 3 if group["amsgrad"] else 2,
        adam_next_clock,
    ),
    "sgd": Rule(
        sgd,
        fill_sgd,
        4,
        False,
        ("momentum_buffer",),
        ("momentum", "dampening", "nesterov"),
        lambda group: 1 if group["momentum"] else 0,
        sgd_next_clock,
    ),
}
