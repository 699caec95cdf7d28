"""Stage 7's maths: the constants of a scalar set, and the root of each of several units. As csrc/maths/units.h has it.

For one unit, with y what stage 6 has left and e = d + tau * l2: x = y * e * r / (e * r + m). One of r and m is sought,
by Newton's steps; the sums over the unit that a step needs are asked for, and taken, one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .maths import divide
from .scalars import DECOUPLED, GROUP_L1, L2, LR, MAX_UNIT_NORM, PENALTY_MODE, PROXIMAL, SUBGRADIENT, read


class UnitConstants(NamedTuple):
    """Of a group's penalties on units, in float64. Switches are 0 or 1."""

    acts: Any
    in_metric: Any
    threshold: Any
    """tau * group_l1"""
    ridge: Any
    """tau * l2"""
    furthest: Any
    """How far group_l1 may move a weight in a step: the safeguard."""
    max_norm: Any


UNIT_CONSTANTS = tl.constexpr(len(UnitConstants._fields))


@triton.jit
def make_unit_constants(group, rule_tau, HAS_METRIC: tl.constexpr):
    lr, l2, group_l1, max_norm = read(group, LR), read(group, L2), read(group, GROUP_L1), read(group, MAX_UNIT_NORM)
    mode = read(group, PENALTY_MODE)
    tau = tl.where(mode == DECOUPLED, lr, rule_tau)
    shrinks = mode != SUBGRADIENT
    return UnitConstants(
        acts=((lr != 0) & ((group_l1 != 0) | (max_norm != float("inf")))).to(tl.float64),
        in_metric=((mode == PROXIMAL) & HAS_METRIC).to(tl.float64),
        threshold=tl.where(shrinks & (group_l1 != 0), tau * group_l1, 0.0),
        ridge=tl.where(shrinks & (l2 != 0), tau * l2, 0.0),
        furthest=2 * tau,
        max_norm=max_norm,
    )


# What a root wants: the squares of ||y|| and ||e y||; the sums of a step towards r, or towards m; the square of ||x||.
FIRST, SHRINKING, NORM, PROJECTING, NOTHING = (tl.constexpr(i) for i in range(5))
MOST_STEPS = tl.constexpr(64)


@triton.jit
def take(root, sums, c, PRECISION: tl.constexpr):
    """The roots of some units, each with the sums that it wanted. A root is r, m, the norm of y, what it wants, its
    steps, and whether it is the identity, and guarded; all but ``wants`` in float64."""
    r, m, y_norm, wants, steps, is_identity, is_guarded = root
    first, second, third = sums
    norm = tl.sqrt(first)

    is_first = wants == FIRST
    scaled = tl.sqrt(second)
    y_norm = tl.where(is_first, norm, y_norm)
    is_usual = (norm < float("inf")) & (scaled < float("inf")) & (norm != 0)  # a NaN is to be seen
    shrinks = is_first & is_usual & (c.threshold != 0)
    vanishes = shrinks & (scaled <= c.threshold)
    guess = norm - c.threshold * norm / tl.where(vanishes | (shrinks == 0), 1.0, scaled)  # exact for one e everywhere
    guess = tl.where((vanishes == 0) & (guess > 0), guess, 0.0)
    begins = shrinks & (vanishes == 0)

    is_projecting = wants == PROJECTING
    is_step = is_projecting | (wants == SHRINKING)
    ratio = tl.where(is_projecting, norm / c.max_norm, norm)
    slope = tl.where(is_step, tl.where(is_projecting, third, second), 1.0)
    before = tl.where(is_projecting, m, r)
    next_one = before + first * (ratio - 1) / slope
    is_number = next_one < float("inf")
    sought = tl.where(is_number, tl.where(next_one > 0, next_one, 0.0), before)
    steps = tl.where(is_step, steps + 1, steps)
    # Steps are quadratic: the next one would be about the square of this. And no step mends what the sums' roundings
    # make of the ratio: of a unit that is just over its largest norm, that is all there is.
    is_near = (tl.abs(sought - before) <= PRECISION * sought) | (tl.abs(ratio - 1) <= 32 * PRECISION * PRECISION)
    is_done = is_step & ((is_number == 0) | is_near | (steps >= MOST_STEPS))

    is_beyond = norm > c.max_norm
    projects = ((is_first & is_usual & (c.threshold == 0)) | (wants == NORM)) & is_beyond
    looks_at_norm = (vanishes | (is_done & (is_projecting == 0))) & (y_norm > c.max_norm)

    is_identity = tl.where(is_first & (shrinks == 0), 1.0, is_identity)
    is_identity = tl.where(projects, 0.0, is_identity)
    is_guarded = tl.where(shrinks, 1.0, tl.where(projects, 0.0, is_guarded))
    r = tl.where(shrinks, guess, tl.where(projects, 1.0, tl.where(is_step & (is_projecting == 0), sought, r)))
    m = tl.where(shrinks, c.threshold, tl.where(projects, 0.0, tl.where(is_projecting, sought, m)))
    goes_on = is_step & (is_done == 0)
    wants = tl.where(goes_on, wants, NOTHING)
    wants = tl.where(begins, SHRINKING, tl.where(projects, PROJECTING, tl.where(looks_at_norm, NORM, wants)))
    steps = tl.where(goes_on, steps, 0.0)
    return r, m, y_norm, wants, steps, is_identity, is_guarded


@triton.jit
def newton_terms(y, e, r, m):
    """What a weight adds to the sums of a step: with t = 1 / (e r + m) and q = e y t, q^2, q^2 e t and q^2 t."""
    t = divide(tl.full(e.shape, 1.0, e.dtype), e * r + m)
    share = e * t
    q = (y * share).to(tl.float64)
    square = q * q
    return square, square * share.to(tl.float64), square * t.to(tl.float64)


@triton.jit
def unit_prox(y, e, furthest, r, m):
    """A weight, from the root. ``furthest`` is the safeguard's bound."""
    product = e * r
    shrunk = y * divide(product, product + m)
    nearest = tl.abs(y) - furthest
    x = tl.where(nearest > tl.abs(shrunk), tl.where(y < 0, -nearest, nearest), shrunk)
    return tl.where(x == 0, 0.0, x)
