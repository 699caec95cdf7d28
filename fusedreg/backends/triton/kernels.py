"""The kernels: a step is squares (where the norm is asked for), prepare, update. docs/triton.md walks through them.

What they are given is tables in device memory, made by device_plan.py. A program of squares or update works on a chunk,
at most CHUNK elements of a row; one of prepare on a scalar set: the parameters of a group that share their scalar
states. ``constants`` are StepConstants and then the rule's, in float64, for each scalar set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import tables
from .maths import clamp, divide, maximum, sign, soft_threshold
from .scalars import (
    CLIP_VALUE,
    DECOUPLED,
    DECOUPLED_WEIGHT_DECAY,
    FOUND_INF,
    FREEZE_ZEROS,
    GRAD_SCALE,
    L0,
    L1,
    L2,
    LOWER,
    LR,
    MAX_GRAD_NORM,
    MAXIMIZE,
    MCP_GAMMA,
    PENALTY_MODE,
    PROXIMAL,
    STEP_SCALARS,
    SUBGRADIENT,
    UPPER,
    WEIGHT_DECAY,
    as_stored,
    read,
    write,
)
from .unit_maths import UNIT_CONSTANTS, make_unit_constants

# The columns of rows.
W, G, STATE, NUMEL, SET = (tl.constexpr(i) for i in (tables.W, tables.G, tables.STATE, tables.NUMEL, tables.SET))
SET_WIDTH = tl.constexpr(tables.SET_WIDTH)
MAX_SCALAR_STATES = tl.constexpr(tables.MAX_SCALAR_STATES)


class StepConstants(NamedTuple):
    """What an element's step reads, but for the rule's own constants. Switches are 0 or 1."""

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
    shrink: Any
    # its further stages, where objectives are multiplied by 2 * tau: see ProxConstants in csrc/maths/prox.h
    has_stages: Any
    inv_gamma: Any
    tau_over_gamma: Any
    least_d: Any
    knee: Any
    height: Any
    firm_up_to: Any
    firm_shrink: Any
    l0: Any
    lower: Any
    upper: Any
    freezes: Any


SKIP = tl.constexpr(0)  # its place in StepConstants
STEP_CONSTANTS = tl.constexpr(len(StepConstants._fields))


# -- the stages, for one element


@triton.jit
def clip_gradient_value(g, inv_grad_scale, clip_value):
    """Stages 1 and 2; `maximize` is the sign of inv_grad_scale. The norm is taken over what this returns."""
    return clamp(g * inv_grad_scale, clip_value)


@triton.jit
def transform_gradient(g, w, c):
    """Stages 1 to 4: what happens to a gradient before a rule sees it."""
    g = clip_gradient_value(g, c.inv_grad_scale, c.clip_value) * c.clip_coef
    # switches: 0 * w would turn an infinite weight into a NaN
    decay = tl.where(c.l2_gradient != 0, c.l2_gradient * w, 0.0)
    return tl.where(c.is_penalized != 0, g + decay + c.l1_gradient * sign(w), g)


@triton.jit
def prox(z, w_old, d, floor_ratio, c, STAGES: tl.constexpr):
    """Stage 6: soft(z, tau * l1) / (1 + tau * l2); in a metric, where tau becomes tau / d, multiplied out by d."""
    # The floor keeps a weight that never saw a gradient (d = eps) from vanishing at once.
    unguarded_d = d
    floor = 0.5 * (c.l1 + c.l2 * tl.abs(w_old))
    d = maximum(d, floor * floor_ratio)
    metric = tl.where(c.in_metric != 0, d, 1.0)
    thresholded = soft_threshold(metric * z, c.tau * c.l1)
    w = tl.where(c.in_metric != 0, divide(thresholded, metric + c.tau * c.l2), thresholded * c.shrink)
    w = tl.where(c.has_prox != 0, w, z)
    if STAGES:
        w = tl.where(c.has_stages != 0, prox_with_stages(z, w_old, unguarded_d, floor_ratio, c), w)
    return w


@triton.jit
def prox_with_stages(z, w_old, d, floor_ratio, c):
    """With the minimax concave penalty, the box, the L0 penalty and frozen zeros. First the best x that is not zero, by
    the firm threshold; then whether zero is better."""
    # The floor is half of the penalty's slope at w_old; and the metric that keeps the problem convex.
    fading = c.l1 - c.inv_gamma * tl.abs(w_old)
    floor = 0.5 * (tl.where(fading > 0, fading, 0.0) + c.l2 * tl.abs(w_old))
    d = maximum(d, floor * floor_ratio)
    d = tl.where(d < c.least_d, c.least_d, d)
    metric = tl.where(c.in_metric != 0, d, 1.0)
    scaled, ridge = metric * z, metric + c.tau * c.l2
    threshold, curvature = c.tau * c.l1, ridge - c.tau_over_gamma
    is_flat = tl.abs(scaled) > c.firm_up_to * ridge
    pulled = tl.where(is_flat, scaled, soft_threshold(scaled, threshold))
    by_product = pulled * tl.where(is_flat, c.shrink, c.firm_shrink)
    x = tl.where(c.in_metric != 0, divide(pulled, tl.where(is_flat, ridge, curvature)), by_product)
    x = tl.where(is_flat, tl.where(c.l2 != 0, x, z), x)  # to the bit: d * z / d is not always z
    x = tl.where(x < c.lower, c.lower, x)
    x = tl.where(x > c.upper, c.upper, x)
    size, pull = tl.abs(x), 2 * tl.abs(scaled)
    beyond = size * (pull - size * ridge) - c.height
    within = size * (pull - 2 * threshold - size * curvature)
    is_zero = tl.where(size > c.knee, beyond, within) <= c.l0  # not where one is a NaN
    is_frozen = (w_old == 0) & (z == z)  # a NaN is to be seen
    return tl.where(tl.where(c.freezes != 0, is_zero | is_frozen, is_zero), 0.0, x)


# -- scalars, for one scalar set


@triton.jit
def inverse_grad_scale(scalars, group):
    inverse = 1 / read(scalars, GRAD_SCALE)
    return tl.where(read(group, MAXIMIZE) != 0, -inverse, inverse)


@triton.jit
def group_of_set(scalars, sets, set_index, GROUP_FIELDS: tl.constexpr):
    return scalars + 2 * (STEP_SCALARS + tl.load(sets + SET_WIDTH * set_index) * GROUP_FIELDS)


@triton.jit(
    do_not_specialize=["partial_sum_count"],
    do_not_specialize_on_alignment=["scalars", "sets", "constants", "partial_sums", "norm_at"],
)
def prepare_kernel(
    scalars,
    sets,
    constants,
    partial_sums,
    partial_sum_count,
    norm_at,
    next_scalars: tl.constexpr,
    fill: tl.constexpr,
    HAS_METRIC: tl.constexpr,
    GROUP_FIELDS: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns a set's scalars into what its elements' steps read, and moves the scalar states that the device keeps."""
    set_index = tl.program_id(0)
    group = group_of_set(scalars, sets, set_index, GROUP_FIELDS)
    states_at = sets + SET_WIDTH * set_index + 1
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
        tl.store(norm_at, norm, mask=(set_index == 0) & (skip == 0))

    lr, weight_decay, l1, l2 = read(group, LR), read(group, WEIGHT_DECAY), read(group, L1), read(group, L2)
    l0, lower, upper, freezes = read(group, L0), read(group, LOWER), read(group, UPPER), read(group, FREEZE_ZEROS)
    penalty_mode = read(group, PENALTY_MODE)
    is_subgradient = penalty_mode == SUBGRADIENT
    is_decoupled_decay = read(group, DECOUPLED_WEIGHT_DECAY) != 0
    l1_gradient, l2_gradient = tl.where(is_subgradient, l1, 0.0), tl.where(is_subgradient, l2, 0.0)
    is_penalized = (l1_gradient != 0) | (l2_gradient != 0) | ((weight_decay != 0) & (is_decoupled_decay == 0))
    l1, l2 = l1 - l1_gradient, l2 - l2_gradient  # what is left for the prox
    has_prox = ((l1 != 0) | (l2 != 0) | (l0 != 0)) & (lr != 0)
    fades = (l1 != 0) & (read(group, MCP_GAMMA) != float("inf"))
    is_boxed = (lower != float("-inf")) | (upper != float("inf"))
    has_stages = (fades | is_boxed | (l0 != 0) | (freezes != 0)) & (lr != 0)
    before = ()
    for i in tl.static_range(MAX_SCALAR_STATES):
        before = before + (read(states_at, i),)
    moved_on = next_scalars(group, before, states_at)
    after = ()
    for i in tl.static_range(len(moved_on)):
        after = after + (as_stored(states_at, i, moved_on[i]),)
    rule_constants, rule_tau = fill(group, before, after)
    # An infinite one times no penalty would be a NaN.
    tau = tl.where(has_prox, tl.where(penalty_mode == DECOUPLED, lr, rule_tau), 0.0)
    inv_gamma = tl.where(fades, 1 / read(group, MCP_GAMMA), 0.0)
    knee = tl.where(fades, read(group, MCP_GAMMA) * l1, float("inf"))
    shrink = 1 / (1 + tau * l2)
    curvature = 1 + tau * (l2 - inv_gamma)
    # With one step size for all, the penalty may be more concave than the quadratic is convex: then there is nothing
    # between zero and the flat part. In a metric, least_d sees to it.
    in_metric = (penalty_mode == PROXIMAL) & HAS_METRIC
    is_firm = in_metric | (curvature > 0)
    c = StepConstants(
        skip=skip.to(tl.float64),
        inv_grad_scale=inverse_grad_scale(scalars, group),
        clip_value=read(group, CLIP_VALUE),
        clip_coef=clip_coef,
        is_penalized=is_penalized.to(tl.float64),
        l1_gradient=l1_gradient,
        l2_gradient=l2_gradient + tl.where(is_decoupled_decay, 0.0, weight_decay),
        w_scale=tl.where(is_decoupled_decay, 1 - lr * weight_decay, 1.0),
        has_prox=has_prox.to(tl.float64),
        in_metric=in_metric.to(tl.float64),
        tau=tau,
        l1=l1,
        l2=l2,
        shrink=shrink,
        has_stages=has_stages.to(tl.float64),
        inv_gamma=inv_gamma,
        tau_over_gamma=tau * inv_gamma,
        least_d=2 * tau * inv_gamma,
        knee=knee,
        height=tl.where(fades, tau * knee * l1, 0.0),
        firm_up_to=tl.where((l1 != 0) & is_firm, knee, -1.0),
        firm_shrink=tl.where(is_firm, 1 / curvature, shrink),
        # Where the problem is convex, x is not worse than zero.
        l0=tl.where((l0 != 0) | (is_firm == 0), 2 * tau * l0, float("nan")),
        lower=lower,
        upper=upper,
        freezes=freezes,
    )
    units = make_unit_constants(group, rule_tau, HAS_METRIC)
    its = constants + set_index * (len(c) + len(rule_constants) + len(units))
    for i in tl.static_range(len(c)):
        tl.store(its + i, c[i])
    for i in tl.static_range(len(rule_constants)):
        tl.store(its + len(c) + i, rule_constants[i])
    for i in tl.static_range(len(units)):
        tl.store(its + len(c) + len(rule_constants) + i, units[i])
    # The update reads the constants alone, so the scalar states may move on before it.
    for i in tl.static_range(len(after)):
        write(states_at, i, after[i], mask=skip == 0)


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


# A chunk's sum of squares in float32. From SMALLEST_SUM on, squares that underflow are too small to be seen. Below it,
# LIFT makes every number's square a normal number, and no sum of a chunk's infinite; nor, with LOWER_BY, the largest.
SMALLEST_SUM, LIFT, LOWER_BY = tl.constexpr(2.0**-80), tl.constexpr(2.0**100), tl.constexpr(2.0**-80)


@triton.jit
def add_squares(sums, lost, values):
    """A pack's squares, for each lane. Of float32 with what the roundings lose (Knuth's two-sum)."""
    squares = tl.sum(values * values, axis=1)
    after = sums + squares
    if squares.dtype == tl.float32:
        added = after - sums
        lost += (sums - (after - added)) + (squares - added)
    return after, lost


@triton.jit
def squares_of_chunk(
    g,
    count,
    inv_grad_scale,
    clip_value,
    power,
    A: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
):
    """Of its values after stages 1 and 2, times a power of two: the sum of squares, in float64; and for each lane, the
    largest magnitude. A lane adds up in the arithmetic dtype: many GPUs have few units for float64."""
    LANES: tl.constexpr = BLOCK // PACK
    lane, of_pack = tl.arange(0, LANES)[:, None], tl.arange(0, PACK)[None, :]
    # A thread has whole packs: what it loads at once, or, where that is one element, neighbours of its neighbours'.
    element = lane * PACK + of_pack if ALIGNED else of_pack * LANES + lane
    sums = tl.zeros([LANES], A)
    lost, largest = sums, sums
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        values = clip_gradient_value(tl.load(g + start + element).to(A), inv_grad_scale, clip_value) * power
        sums, lost = add_squares(sums, lost, values)
        largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1))
    if full < count:
        mask = full + element < count
        values = tl.load(g + full + element, mask=mask, other=0.0).to(A)
        values = clip_gradient_value(values, inv_grad_scale, clip_value) * power
        # not `other` alone: 0 times a scale that has no inverse in float32 is NaN
        values = tl.where(mask, values, 0.0)
        sums, lost = add_squares(sums, lost, values)
        largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1))
    sums_of_lanes = sums.to(tl.float64)
    # What an infinite sum has lost is a NaN.
    return tl.sum(sums_of_lanes + tl.where(sums < float("inf"), lost, 0.0).to(tl.float64)), largest


@triton.jit(
    do_not_specialize=["row_count", "chunk_count"],
    do_not_specialize_on_alignment=["rows", "chunks", "scalars", "sets", "partial_sums"],
)
def squares_kernel(
    rows,
    row_count,
    chunks,
    chunk_count,
    scalars,
    sets,
    partial_sums,
    GROUP_FIELDS: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
):
    """The sum of squares of the gradients after stages 1 and 2, one partial sum a program, without atomics."""
    program = tl.program_id(0)
    its_sum = tl.zeros([], tl.float64)
    for i in range(program, chunk_count, tl.num_programs(0)):
        row, begin, count = read_chunk(rows, row_count, chunks, i, CHUNK)
        g = pointer(row + G * row_count, begin, T, ALIGNED)
        group = group_of_set(scalars, sets, tl.load(row + SET * row_count), GROUP_FIELDS)
        scale, clip_value = inverse_grad_scale(scalars, group).to(A), read(group, CLIP_VALUE).to(A)
        total, largest = squares_of_chunk(g, count, scale, clip_value, 1.0, A, ALIGNED, BLOCK, PACK)
        if tl.float32 == A:
            # Where float32 has no room for squares, which is rare, once more, with a power of two that makes room.
            is_small = total < SMALLEST_SUM
            again = total == float("inf")
            if is_small:
                again = tl.max(largest, axis=0) > 0
            if again:
                power = tl.where(is_small, LIFT, LOWER_BY).to(tl.float32)
                total, _largest = squares_of_chunk(g, count, scale, clip_value, power, A, ALIGNED, BLOCK, PACK)
                inverse = 1 / power.to(tl.float64)
                total *= inverse * inverse
        its_sum += total
    tl.store(partial_sums + program, its_sum)


@triton.jit
def moved(pointers, i):
    result = ()
    for k in tl.static_range(len(pointers)):
        result = result + (pointers[k] + i,)
    return result


@triton.jit
def update_block(
    w_at,
    g_at,
    state_at,
    mask,
    c,
    rule_constants,
    step,
    prox,
    finish,
    STATES: tl.constexpr,
    STAGES: tl.constexpr,
    A: tl.constexpr,
):
    """Stages 1 to 6 for a block of elements: load, maths, store."""
    w_old = tl.load(w_at, mask=mask).to(A)
    g = tl.load(g_at, mask=mask).to(A)
    state = ()
    for i in tl.static_range(len(state_at)):
        state = state + (tl.load(state_at[i], mask=mask).to(A) if STATES >> i & 1 else 0.0,)

    g = transform_gradient(g, w_old, c)  # 1 to 4
    w = w_old * c.w_scale  # 4, decoupled decay
    z, state, d, floor_ratio = step(w, g, state, rule_constants, STATES)  # 5
    w = prox(z, w_old, d, floor_ratio, c, STAGES)  # 6
    state = finish(w, z, state, rule_constants, STATES)

    tl.store(w_at, w, mask=mask)
    for i in tl.static_range(len(state_at)):
        if STATES >> i & 1:
            tl.store(state_at[i], state[i], mask=mask)


@triton.jit(do_not_specialize=["row_count"], do_not_specialize_on_alignment=["rows", "chunks", "constants"])
def update_kernel(
    rows,
    row_count,
    chunks,
    constants,
    step: tl.constexpr,
    prox: tl.constexpr,
    finish: tl.constexpr,
    RULE_CONSTANTS: tl.constexpr,
    RULE_STATES: tl.constexpr,
    STATES: tl.constexpr,
    STAGES: tl.constexpr,
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
    for i in tl.static_range(RULE_STATES):
        # One that is not in STATES is null, and never looked at.
        state = state + (pointer(row + (STATE + i) * row_count, begin, T, ALIGNED),)

    step_constants = ()
    rule_constants = ()
    its = constants + tl.load(row + SET * row_count) * (STEP_CONSTANTS + RULE_CONSTANTS + UNIT_CONSTANTS)
    for i in tl.static_range(STEP_CONSTANTS):
        step_constants = step_constants + (tl.load(its + i).to(A),)
    for i in tl.static_range(RULE_CONSTANTS):
        rule_constants = rule_constants + (tl.load(its + STEP_CONSTANTS + i).to(A),)
    c = StepConstants(*step_constants)
    if c.skip != 0:
        count = 0

    # Full blocks without a mask, which would keep the loads from being vectors; then the tail.
    element = tl.arange(0, BLOCK)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        at = start + element
        update_block(w + at, g + at, moved(state, at), None, c, rule_constants, step, prox, finish, STATES, STAGES, A)
    if full < count:
        at = full + element
        some = at < count
        update_block(w + at, g + at, moved(state, at), some, c, rule_constants, step, prox, finish, STATES, STAGES, A)
