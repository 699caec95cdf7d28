"""The few functions that the kernels are made of. Each keeps a NaN a NaN, and rounds as IEEE 754 has it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    # Triton's `/` on float32 is an approximation.
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def maximum(a, b):
    """The larger one, or the NaN: what the hardware's maximum does with a NaN differs from one to the next."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def lerp(a, b, weight, one_minus_weight):
    """a + weight * (b - a), as torch's: from the nearer end. From the far one a large a would swallow a small b."""
    change = b - a
    return tl.where(weight < 0.5, a + weight * change, b - one_minus_weight * change)


@triton.jit
def clamp(x, bound):
    """x, or the bound that it exceeds; an infinite bound is the identity."""
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def soft_threshold(z, t):
    """sign(z) * max(|z| - t, 0); its zeros are +0.0."""
    return tl.where(tl.abs(z) <= t, 0.0, z - tl.where(z < 0, -t, t))
