"""The gain of momentum: what its recurrence, run on a constant 1, has come to. See docs/formulas.md."""

from __future__ import annotations

import triton
import triton.language as tl

# The smallest positive float64. A gain of 0 is before the first step; dampening can bring it there later, too.
SMALLEST = tl.constexpr(5e-324)


@triton.jit
def next_momentum_gain(before, momentum, dampening):
    """After a step. ``before`` is 0 before the first one; NaN where nobody counted, which takes the stationary gain."""
    stationary = tl.where(momentum < 1, (1 - dampening) / tl.where(momentum < 1, 1 - momentum, 1.0), 1.0)
    counted = momentum * before + 1 - dampening
    gain = tl.where(before == before, tl.where(counted != 0, counted, SMALLEST), stationary)
    return tl.where(before == 0, 1.0, gain)
