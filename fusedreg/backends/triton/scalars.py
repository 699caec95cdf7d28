"""The scalars of a step in device memory: hyperparameters, AMP's scalars, scalar states.

A scalar is two int64: its kind, and its value or its address. So a step takes a number from the host and one that only
the device knows (a learning rate that is a tensor, AMP's ``found_inf``, a step count under a CUDA graph) alike, and
waits for neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...penalties import OPTIONS, PENALTY_MODES, compiled_fields
from ...rules.spec import COMMON
from .. import device_plan, tables

VALUE, FLOAT32_AT, FLOAT64_AT, FLOAT32_VALUE = (
    tl.constexpr(i) for i in (tables.VALUE, tables.FLOAT32_AT, tables.FLOAT64_AT, tables.FLOAT32_VALUE)
)

# The scalars of the step itself, at the head of the table. Then those of each group.
GRAD_SCALE, FOUND_INF, MAX_GRAD_NORM, STEP_SCALARS = (
    tl.constexpr(i)
    for i in (device_plan.GRAD_SCALE, device_plan.FOUND_INF, device_plan.MAX_GRAD_NORM, device_plan.STEP_SCALARS)
)

# What a group has under every rule, in the order of compiled_field_names. From RULE_FIELDS on, the rule's own fields.
COMMON_FIELDS = (*(each.name for each in COMMON), *compiled_fields({each.name: each.default for each in OPTIONS}))
RULE_FIELDS = len(COMMON_FIELDS)
(
    LR,
    WEIGHT_DECAY,
    MAXIMIZE,
    DECOUPLED_WEIGHT_DECAY,
    CLIP_VALUE,
    PENALTY_MODE,
    L1,
    L2,
    MCP_GAMMA,
    LOWER,
    UPPER,
    L0,
    FREEZE_ZEROS,
    GROUP_L1,
    MAX_UNIT_NORM,
) = (
    tl.constexpr(COMMON_FIELDS.index(name))
    for name in (
        "lr",
        "weight_decay",
        "maximize",
        "decoupled_weight_decay",
        "clip_value",
        "penalty_mode",
        "l1",
        "l2",
        "mcp_gamma",
        "lower",
        "upper",
        "l0",
        "freeze_zeros",
        "group_l1",
        "max_unit_norm",
    )
)

PROXIMAL, DECOUPLED, SUBGRADIENT = (
    tl.constexpr(PENALTY_MODES.index(mode)) for mode in ("proximal", "decoupled", "subgradient")
)


@triton.jit
def read(scalars, i):
    kind = tl.load(scalars + 2 * i)
    value_or_address = tl.load(scalars + 2 * i + 1)
    # Masks, not branches: the loads of all scalars are on their way at once.
    single = tl.load(value_or_address.to(tl.pointer_type(tl.float32)), mask=kind == FLOAT32_AT, other=0.0)
    double = tl.load(value_or_address.to(tl.pointer_type(tl.float64)), mask=kind == FLOAT64_AT, other=0.0)
    is_value = (kind == VALUE) | (kind == FLOAT32_VALUE)
    value = tl.where(is_value, value_or_address.to(tl.float64, bitcast=True), double)
    return tl.where(kind == FLOAT32_AT, single.to(tl.float64), value)


@triton.jit
def as_stored(scalars, i, value):
    """A number as the scalar keeps it, in its own precision."""
    kind = tl.load(scalars + 2 * i)
    return tl.where((kind == FLOAT32_AT) | (kind == FLOAT32_VALUE), value.to(tl.float32).to(tl.float64), value)


@triton.jit
def write(scalars, i, value, mask):
    """Where the scalar is on the device; what came from the host, the host keeps."""
    kind = tl.load(scalars + 2 * i)
    address = tl.load(scalars + 2 * i + 1)
    tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=mask & (kind == FLOAT32_AT))
    tl.store(address.to(tl.pointer_type(tl.float64)), value, mask=mask & (kind == FLOAT64_AT))
