"""The kernels: a step is squares (where the norm is asked for), prepare, update. docs/triton.md walks through them.

What they are given is tables in device memory, made by plan.py:
- rows: a parameter each, as columns: pointers to w, g and state, the number of elements, the slot.
- chunks: (row, first element) each; a program of squares or update works on CHUNK elements of a row.
- scalars: those of the step, then those of each group (scalars.py).
- slots: (group, clock) each: the parameters that share both share a slot.
- hyper: HYPER_WIDTH float64 for each slot, made by prepare and read by update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .maths import clamp, divide, maximum, sign, soft_threshold
from .scalars import (
    CLIP_VALUE,
    DECOUPLED,
    DECOUPLED_WEIGHT_DECAY,
    FOUND_INF,
    GRAD_SCALE,
    L1,
    L1_MODE,
    L2,
    LR,
    MAX_GRAD_NORM,
    MAXIMIZE,
    PROXIMAL,
    STEP_SCALARS,
    SUBGRADIENT,
    WEIGHT_DECAY,
    read,
    write,
)

# The columns of rows.
W, G, STATE, NUMEL, SLOT, COLUMNS = (tl.constexpr(i) for i in (0, 1, 2, 5, 6, 7))
MAX_STATES = 3
SLOT_WIDTH = tl.constexpr(3)


class Hyper(NamedTuple):
    """What an element's step reads, but for the rule's own scalars. Switches are 0 or 1."""

    skip: Any
    # stages 1 to 4
    inv_grad_scale: Any
    clip_value: Any
    clip_coef: Any
    is_penalized: Any
    l1_gradient: Any
    l2_gradient: Any
    w_scale: Any
    # stage 6
    has_prox: Any
    in_metric: Any
    tau: Any
    l1: Any
    l2: Any


SKIP = tl.constexpr(0)  # its place in Hyper
HYPER_FIELDS = tl.constexpr(len(Hyper._fields))
HYPER_WIDTH = tl.constexpr(24)  # Hyper, then the rule's scalars


# -- the stages, for one element


@triton.jit
def clip_gradient_value(g, inv_grad_scale, clip_value):
    """Stages 1 and 2; `maximize` is the sign of inv_grad_scale. The norm is taken over what this returns."""
    return clamp(g * inv_grad_scale, clip_value)


@triton.jit
def transform_gradient(g, w, h):
    """Stages 1 to 4: what happens to a gradient before a rule sees it."""
    g = clip_gradient_value(g, h.inv_grad_scale, h.clip_value) * h.clip_coef
    # switches: 0 * w would turn an infinite weight into a NaN
    decay = tl.where(h.l2_gradient != 0, h.l2_gradient * w, 0.0)
    return tl.where(h.is_penalized != 0, g + decay + h.l1_gradient * sign(w), g)


@triton.jit
def prox(z, w_old, d, h):
    """Stage 6: soft(z, tau * l1) / (1 + tau * l2), multiplied out by the metric where tau = lr / d_prox."""
    d_prox = maximum(d, 0.5 * (h.l1 + h.l2 * tl.abs(w_old)))
    metric = tl.where(h.in_metric != 0, d_prox, 1.0)
    w = divide(soft_threshold(metric * z, h.tau * h.l1), metric + h.tau * h.l2)
    return tl.where(h.has_prox != 0, w, z)


# -- scalars, for one slot


@triton.jit
def inverse_grad_scale(scalars, group):
    inverse = 1 / read(scalars, GRAD_SCALE)
    return tl.where(read(group, MAXIMIZE) != 0, -inverse, inverse)


@triton.jit
def slots_group(scalars, slots, slot, GROUP_SCALARS: tl.constexpr):
    return scalars + 2 * (STEP_SCALARS + tl.load(slots + SLOT_WIDTH * slot) * GROUP_SCALARS)


@triton.jit(do_not_specialize=["partial_sum_count"])
def prepare_kernel(
    scalars,
    slots,
    hyper,
    partial_sums,
    partial_sum_count,
    norm_at,
    fill: tl.constexpr,
    HAS_METRIC: tl.constexpr,
    GROUP_SCALARS: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns a slot's scalars into what its elements' steps read, and moves its clock, if the device keeps it."""
    slot = tl.program_id(0)
    group = slots_group(scalars, slots, slot, GROUP_SCALARS)
    clock_at = slots + SLOT_WIDTH * slot + 1
    skip = read(scalars, FOUND_INF) != 0  # any value: it is a sum over devices, so it can be 2; NaN too

    clip_coef = 1.0
    if CLIP:
        # Every program adds them up, in the same order.
        sums = tl.zeros([BLOCK], tl.float64)
        for start in range(0, partial_sum_count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            sums += tl.load(partial_sums + i, mask=i < partial_sum_count, other=0.0)
        norm = tl.sqrt(tl.sum(sums))
        max_grad_norm = read(scalars, MAX_GRAD_NORM)
        coefficient = max_grad_norm / (norm + 1e-6)
        # Infinity measures, also what is not finite. Otherwise a NaN stays.
        clip_coef = tl.where((coefficient > 1) | (max_grad_norm == float("inf")), 1.0, coefficient)
        tl.store(norm_at, norm, mask=(slot == 0) & (skip == 0))

    lr, weight_decay, l1, l2 = read(group, LR), read(group, WEIGHT_DECAY), read(group, L1), read(group, L2)
    l1_mode = read(group, L1_MODE)
    is_subgradient = l1_mode == SUBGRADIENT
    is_decoupled_decay = read(group, DECOUPLED_WEIGHT_DECAY) != 0
    has_penalty = (l1 != 0) | (l2 != 0)
    rule_scalars, rule_tau, next_clock = fill(group, read(clock_at, 0))
    h = Hyper(
        skip=skip.to(tl.float64),
        inv_grad_scale=inverse_grad_scale(scalars, group),
        clip_value=read(group, CLIP_VALUE),
        clip_coef=clip_coef,
        is_penalized=((is_subgradient & has_penalty) | ((weight_decay != 0) & (is_decoupled_decay == 0))).to(
            tl.float64
        ),
        l1_gradient=tl.where(is_subgradient, l1, 0.0),
        l2_gradient=tl.where(is_subgradient, l2, 0.0) + tl.where(is_decoupled_decay, 0.0, weight_decay),
        w_scale=tl.where(is_decoupled_decay, 1 - lr * weight_decay, 1.0),
        has_prox=(has_penalty & (lr != 0) & (is_subgradient == 0)).to(tl.float64),
        in_metric=((l1_mode == PROXIMAL) & HAS_METRIC).to(tl.float64),
        tau=tl.where(l1_mode == DECOUPLED, lr, rule_tau),
        l1=l1,
        l2=l2,
    )
    row = hyper + slot * HYPER_WIDTH
    for i in tl.static_range(len(h)):
        tl.store(row + i, h[i])
    for i in tl.static_range(len(rule_scalars)):
        tl.store(row + HYPER_FIELDS + i, rule_scalars[i])
    # The update reads hyper alone, so the clock may move on before it.
    write(clock_at, 0, next_clock, mask=skip == 0)


# -- the passes over the elements


@triton.jit
def read_chunk(rows, row_count, chunks, i, CHUNK: tl.constexpr):
    """Of chunk i: its row's place in a column, its first element, how many elements it has."""
    row = tl.load(chunks + 2 * i)
    begin = tl.multiple_of(tl.load(chunks + 2 * i + 1), CHUNK)
    count = tl.minimum(tl.load(rows + NUMEL * row_count + row) - begin, CHUNK).to(tl.int32)
    return rows + row, begin, count


@triton.jit
def pointer(column, begin, T: tl.constexpr, ALIGNED: tl.constexpr):
    """To the chunk's first element of what a column points to."""
    first = tl.load(column).to(tl.pointer_type(T))
    if ALIGNED:
        first = tl.multiple_of(first, 16)  # bytes: what 128-bit loads and stores need
    return first + begin


@triton.jit
def add_squares(sums, values):
    values = values.to(tl.float64)
    return sums + values * values


# The partial sums of a second launch begin at any place.
@triton.jit(do_not_specialize=["row_count", "chunk_count"], do_not_specialize_on_alignment=["partial_sums"])
def squares_kernel(
    rows,
    row_count,
    chunks,
    chunk_count,
    scalars,
    slots,
    partial_sums,
    GROUP_SCALARS: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of the gradients after stages 1 and 2, one partial sum a program, without atomics."""
    program = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(program, chunk_count, tl.num_programs(0)):
        row, begin, count = read_chunk(rows, row_count, chunks, i, CHUNK)
        g = pointer(row + G * row_count, begin, T, ALIGNED)
        group = slots_group(scalars, slots, tl.load(row + SLOT * row_count), GROUP_SCALARS)
        inv_grad_scale = inverse_grad_scale(scalars, group).to(A)
        clip_value = read(group, CLIP_VALUE).to(A)
        full = count // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            values = tl.load(g + start + element).to(A)
            sums = add_squares(sums, clip_gradient_value(values, inv_grad_scale, clip_value))
        if full < count:
            mask = full + element < count
            values = tl.load(g + full + element, mask=mask, other=0.0).to(A)
            values = clip_gradient_value(values, inv_grad_scale, clip_value)
            # not `other` alone: 0 times a scale that has no inverse in float32 is NaN
            sums = add_squares(sums, tl.where(mask, values, 0.0))
    tl.store(partial_sums + program, tl.sum(sums))


@triton.jit
def update_block(w_at, g_at, state_at, mask, h, rule_scalars, step, prox, A: tl.constexpr):
    """Stages 1 to 6 for a block of elements: load, maths, store."""
    w_old = tl.load(w_at, mask=mask).to(A)
    g = tl.load(g_at, mask=mask).to(A)
    state = ()
    for i in tl.static_range(len(state_at)):
        state = state + (tl.load(state_at[i], mask=mask).to(A),)

    g = transform_gradient(g, w_old, h)  # 1 to 4
    w = w_old * h.w_scale  # 4, decoupled decay
    w, state, d = step(w, g, state, rule_scalars)  # 5
    w = prox(w, w_old, d, h)  # 6

    tl.store(w_at, w, mask=mask)
    for i in tl.static_range(len(state_at)):
        tl.store(state_at[i], state[i], mask=mask)


@triton.jit
def offset(pointers, i):
    moved = ()
    for k in tl.static_range(len(pointers)):
        moved = moved + (pointers[k] + i,)
    return moved


@triton.jit(do_not_specialize=["row_count"])
def update_kernel(
    rows,
    row_count,
    chunks,
    hyper,
    step: tl.constexpr,
    prox: tl.constexpr,
    RULE_SCALARS: tl.constexpr,
    STATES: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk's step."""
    row, begin, count = read_chunk(rows, row_count, chunks, tl.program_id(0).to(tl.int64), CHUNK)
    w = pointer(row + W * row_count, begin, T, ALIGNED)
    g = pointer(row + G * row_count, begin, T, ALIGNED)
    state = ()
    for i in tl.static_range(STATES):
        state = state + (pointer(row + (STATE + i) * row_count, begin, T, ALIGNED),)

    scalars = ()
    rule_scalars = ()
    its = hyper + tl.load(row + SLOT * row_count) * HYPER_WIDTH
    for i in tl.static_range(HYPER_FIELDS):
        scalars = scalars + (tl.load(its + i).to(A),)
    for i in tl.static_range(RULE_SCALARS):
        rule_scalars = rule_scalars + (tl.load(its + HYPER_FIELDS + i).to(A),)
    h = Hyper(*scalars)
    if h.skip != 0:
        count = 0

    # Full blocks without a mask, which would keep the loads from being vectors; then the tail.
    element = tl.arange(0, BLOCK)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        at = start + element
        update_block(w + at, g + at, offset(state, at), None, h, rule_scalars, step, prox, A)
    if full < count:
        at = full + element
        update_block(w + at, g + at, offset(state, at), at < count, h, rule_scalars, step, prox, A)
