"""The scalars of a step in device memory: hyperparameters, AMP's scalars, clocks.

A scalar is two int64: its kind, and its value or its address. So a step takes a number from the host and one that only
the device knows (a learning rate that is a tensor, AMP's ``found_inf``, a clock under a CUDA graph) alike, and waits
for neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

VALUE, FLOAT32_AT, FLOAT64_AT = (tl.constexpr(i) for i in range(3))

# The scalars of the step itself, at the head of the table. Then those of each group: COMMON_SCALARS of optimizer.py,
# and from RULE_SCALARS on those that the rule names.
GRAD_SCALE, FOUND_INF, MAX_GRAD_NORM = (tl.constexpr(i) for i in range(3))
STEP_SCALARS = tl.constexpr(3)
LR, WEIGHT_DECAY, MAXIMIZE, DECOUPLED_WEIGHT_DECAY, L1, L2, L1_MODE, CLIP_VALUE = (tl.constexpr(i) for i in range(8))
RULE_SCALARS = 8

PROXIMAL, DECOUPLED, SUBGRADIENT = (tl.constexpr(i) for i in range(3))  # the order of L1_MODES


@triton.jit
def read(scalars, i):
    kind = tl.load(scalars + 2 * i)
    value_or_address = tl.load(scalars + 2 * i + 1)
    # Masks, not branches: the loads of all scalars are on their way at once.
    single = tl.load(value_or_address.to(tl.pointer_type(tl.float32)), mask=kind == FLOAT32_AT, other=0.0)
    double = tl.load(value_or_address.to(tl.pointer_type(tl.float64)), mask=kind == FLOAT64_AT, other=0.0)
    value = tl.where(kind == VALUE, value_or_address.to(tl.float64, bitcast=True), double)
    return tl.where(kind == FLOAT32_AT, single.to(tl.float64), value)


@triton.jit
def write(scalars, i, value, mask):
    """Where the scalar is on the device; what came from the host, the host keeps."""
    kind = tl.load(scalars + 2 * i)
    address = tl.load(scalars + 2 * i + 1)
    tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=mask & (kind == FLOAT32_AT))
    tl.store(address.to(tl.pointer_type(tl.float64)), value, mask=mask & (kind == FLOAT64_AT))
