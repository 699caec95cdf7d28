"""The kernel of stage 7: the penalties on units, behind the update's. See csrc/cuda/units.h, which is built alike.

A program takes panels, UNITS units next to each other in memory, a tile of their weights at a time: TILE of each unit,
ALONG of them in a run, the others in the slices behind. Where a panel is in parts (device_units.py), each pass over it
is a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .. import device_units
from .kernels import SET, SKIP, STATE, STEP_CONSTANTS, W
from .maths import divide
from .unit_maths import FIRST, NORM, NOTHING, UNIT_CONSTANTS, UnitConstants, newton_terms, take, unit_prox

LAYOUT_WIDTH, ITEM_WIDTH, ROOT_WIDTH, UNIT_SUMS = (
    tl.constexpr(i)
    for i in (
        device_units.LAYOUT_WIDTH,
        device_units.ITEM_WIDTH,
        device_units.ROOT_WIDTH,
        device_units.UNIT_SUMS,
    )
)
WHOLE = tl.constexpr(device_units.WHOLE)
FINISH, APPLY = tl.constexpr(device_units.PASSES), tl.constexpr(device_units.PASSES + 1)
PARTS_AT_ONCE = tl.constexpr(64)


@triton.jit
def over_tile(of_units, ALONG: tl.constexpr):
    """A vector over units, for a tile of their weights: what lies together in memory is last."""
    if ALONG == 1:
        return of_units[None, :]
    else:
        return of_units[:, None]


@triton.jit
def over_units(of_tile, ALONG: tl.constexpr):
    """A vector over a tile's weights, for all units."""
    if ALONG == 1:
        return of_tile[:, None]
    else:
        return of_tile[None, :]


@triton.jit
def sum_of_units(tile, ALONG: tl.constexpr):
    if ALONG == 1:
        return tl.sum(tile, axis=0)
    else:
        return tl.sum(tile, axis=1)


@triton.jit
def load_tile(
    where,
    slice_begin,
    place_begin,
    metric: tl.constexpr,
    HAS_METRIC: tl.constexpr,
    STATES: tl.constexpr,
    A: tl.constexpr,
    TILE: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Weights of a panel with their ridges and what the floor goes by; where they are, and which of them are there."""
    w, states, origin, is_unit, of_slice, slice_end, place_end, c, rule_constants = where
    element = tl.arange(0, TILE)
    slices, places = slice_begin + element // ALONG, place_begin + element % ALONG
    mask = over_units((slices < slice_end) & (places < place_end), ALONG) & over_tile(is_unit, ALONG)
    at = over_units(slices * of_slice + places, ALONG) + over_tile(origin, ALONG)
    y = tl.load(w + at, mask=mask, other=0.0).to(A)
    e = tl.zeros_like(y) + (1 + c.ridge).to(A)
    floor_ratio = tl.zeros_like(y) - 1.0  # without a metric, no floor
    if HAS_METRIC:  # noqa: SIM102 (this is known when the kernel is compiled)
        if c.in_metric != 0:
            state = ()
            for i in tl.static_range(len(states)):
                state = state + (tl.load(states[i] + at, mask=mask, other=0.0).to(A) if STATES >> i & 1 else 0.0,)
            d, ratio = metric(state, rule_constants, STATES)
            e = tl.zeros_like(y) + (d + c.ridge.to(A))
            floor_ratio = tl.zeros_like(y) + ratio
    return y, e, floor_ratio, at, mask


@triton.jit
def furthest_of(floor_ratio, is_guarded, c, A: tl.constexpr):
    # Below zero there is no floor.
    bound = divide(c.furthest.to(A), tl.where(floor_ratio > 0, floor_ratio, 1.0))
    return tl.where((floor_ratio > 0) & (is_guarded != 0), bound, float("inf"))


@triton.jit
def add_up(
    where,
    root,
    part_of,
    metric: tl.constexpr,
    HAS_METRIC: tl.constexpr,
    STATES: tl.constexpr,
    A: tl.constexpr,
    UNITS: tl.constexpr,
    TILE: tl.constexpr,
    ALONG: tl.constexpr,
):
    """What the roots of a panel's units want."""
    r, m, _, wants, _, _, is_guarded = root
    slice_begin, place_begin = part_of
    _, _, _, _, _, slice_end, place_end, c, _ = where
    r, m = over_tile(r.to(A), ALONG), over_tile(m.to(A), ALONG)
    is_guarded, its_wants = over_tile(is_guarded, ALONG), over_tile(wants, ALONG)
    is_first, some_norm = tl.max((wants == FIRST).to(tl.int32), axis=0), tl.max((wants == NORM).to(tl.int32), axis=0)
    first = tl.zeros([TILE, UNITS] if ALONG == 1 else [UNITS, TILE], tl.float64)
    second, third = first, first
    for slices in range(slice_begin, slice_end, TILE // ALONG):
        for places in range(place_begin, place_end, ALONG):
            y, e, floor_ratio, _at, mask = load_tile(where, slices, places, metric, HAS_METRIC, STATES, A, TILE, ALONG)
            if is_first != 0:  # all of them at once
                weight = y.to(tl.float64)
                scaled = weight * e.to(tl.float64)
                first += tl.where(mask, weight * weight, 0.0)
                second += tl.where(mask, scaled * scaled, 0.0)
            else:
                square, by_r, by_m = newton_terms(y, e, r, m)
                if some_norm != 0:
                    x = unit_prox(y, e, furthest_of(floor_ratio, is_guarded, c, A), r, m).to(tl.float64)
                    square = tl.where(its_wants == NORM, x * x, square)
                first += tl.where(mask, square, 0.0)
                second += tl.where(mask, by_r, 0.0)
                third += tl.where(mask, by_m, 0.0)
    return sum_of_units(first, ALONG), sum_of_units(second, ALONG), sum_of_units(third, ALONG)


@triton.jit
def sums_of_parts(partial_sums, parts, UNITS: tl.constexpr):
    """What the parts of a panel have left in the pass before, added up in a fixed order."""
    unit = tl.arange(0, UNITS)
    first = tl.zeros([UNITS], tl.float64)
    second, third = first, first
    for begin in range(0, parts, PARTS_AT_ONCE):
        part = begin + tl.arange(0, PARTS_AT_ONCE)
        at = partial_sums + (part[:, None] * UNITS + unit[None, :]) * UNIT_SUMS
        mask = (part < parts)[:, None]
        first += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        second += tl.sum(tl.load(at + 1, mask=mask, other=0.0), axis=0)
        third += tl.sum(tl.load(at + 2, mask=mask, other=0.0), axis=0)
    return first, second, third


@triton.jit(
    do_not_specialize=["row_count", "number"],
    do_not_specialize_on_alignment=["rows", "layouts", "items", "constants", "scratch"],
)
def units_kernel(
    rows,
    row_count,
    layouts,
    items,
    constants,
    scratch,
    number,
    metric: tl.constexpr,
    HAS_METRIC: tl.constexpr,
    RULE_CONSTANTS: tl.constexpr,
    RULE_STATES: tl.constexpr,
    STATES: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    UNITS: tl.constexpr,
    TILE: tl.constexpr,
    ALONG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An item: some panels as a whole, or a part of one. ``number`` is the launch's, of those of device_units.py."""
    item = items + ITEM_WIDTH * tl.program_id(0).to(tl.int64)
    first_unit, part = tl.load(item + 1), tl.load(item + 2)
    layout = layouts + LAYOUT_WIDTH * tl.load(item)
    row, count, outer, run = tl.load(layout), tl.load(layout + 1), tl.load(layout + 2), tl.load(layout + 3)
    slices_of_part, places_of_part, parts = tl.load(layout + 7), tl.load(layout + 8), tl.load(layout + 9)
    panels = tl.minimum(tl.load(layout + 6), tl.cdiv(count - first_unit, UNITS))

    its = constants + tl.load(rows + SET * row_count + row) * (STEP_CONSTANTS + RULE_CONSTANTS + UNIT_CONSTANTS)
    unit_constants = ()
    rule_constants = ()
    for i in tl.static_range(UNIT_CONSTANTS):
        unit_constants = unit_constants + (tl.load(its + STEP_CONSTANTS + RULE_CONSTANTS + i),)
    for i in tl.static_range(RULE_CONSTANTS):
        rule_constants = rule_constants + (tl.load(its + STEP_CONSTANTS + i).to(A),)
    c = UnitConstants(*unit_constants)
    w = tl.load(rows + W * row_count + row).to(tl.pointer_type(T))
    states = ()
    for i in tl.static_range(RULE_STATES):
        states = states + (tl.load(rows + (STATE + i) * row_count + row).to(tl.pointer_type(T)),)

    in_parts = number != WHOLE
    is_one_pass = in_parts & (number < FINISH)
    is_part = in_parts & (number != FINISH)
    if (tl.load(its + SKIP) != 0) | (c.acts == 0) | ((number == FINISH) & (part != 0)):
        panels = panels * 0
    in_run = tl.cdiv(run, places_of_part)
    slice_begin = tl.where(is_part, part // in_run * slices_of_part, 0)
    place_begin = tl.where(is_part, part % in_run * places_of_part, 0)
    slice_end = tl.where(is_part, tl.minimum(outer, slice_begin + slices_of_part), outer)
    place_end = tl.where(is_part, tl.minimum(run, place_begin + places_of_part), run)

    unit = tl.arange(0, UNITS)
    read, written = (number + 1) % 2, (number + 2) % 2
    scratch = scratch + tl.load(item + 3)
    roots_read = scratch + (read * UNITS + unit) * ROOT_WIDTH
    roots_written = scratch + (written * UNITS + unit) * ROOT_WIDTH
    partial_sums = scratch + 2 * UNITS * ROOT_WIDTH
    for panel in range(0, panels):
        panel_begin = first_unit + panel * UNITS
        is_unit = panel_begin + unit < count
        origin = (panel_begin + unit) * run
        where = w, states, origin, is_unit, count * run, slice_end, place_end, c, rule_constants
        is_old = is_unit & (number > 0)
        r = tl.load(roots_read, mask=is_old, other=1.0)
        m = tl.load(roots_read + 1, mask=is_old, other=0.0)
        y_norm = tl.load(roots_read + 2, mask=is_old, other=0.0)
        wants = tl.load(roots_read + 3, mask=is_old, other=0.0).to(tl.int32)
        wants = tl.where(is_unit, tl.where(is_old, wants, FIRST), NOTHING)
        steps = tl.load(roots_read + 4, mask=is_old, other=0.0)
        is_identity = tl.load(roots_read + 5, mask=is_old, other=0.0)
        is_guarded = tl.load(roots_read + 6, mask=is_old, other=0.0)

        has_sums = (number > 0) & (number <= FINISH)
        first, second, third = sums_of_parts(
            partial_sums + read * parts * UNITS * UNIT_SUMS, tl.where(has_sums, parts, 0), UNITS
        )
        goes_on = number != APPLY
        while goes_on:
            if has_sums:
                root = r, m, y_norm, wants, steps, is_identity, is_guarded
                r, m, y_norm, wants, steps, is_identity, is_guarded = take(root, (first, second, third), c, PRECISION)
            goes_on = tl.max((wants != NOTHING).to(tl.int32), axis=0) != 0
            if goes_on:
                root = r, m, y_norm, wants, steps, is_identity, is_guarded
                first, second, third = add_up(
                    where, root, (slice_begin, place_begin), metric, HAS_METRIC, STATES, A, UNITS, TILE, ALONG
                )
            has_sums = goes_on
            goes_on = goes_on & (is_one_pass == 0)

        of_part = partial_sums + (((written * parts + part) * UNITS) + unit) * UNIT_SUMS
        is_left = is_unit & is_one_pass
        tl.store(of_part, first, mask=is_left)
        tl.store(of_part + 1, second, mask=is_left)
        tl.store(of_part + 2, third, mask=is_left)
        is_kept = is_unit & in_parts & (number != APPLY) & (part == 0)
        tl.store(roots_written, r, mask=is_kept)
        tl.store(roots_written + 1, m, mask=is_kept)
        tl.store(roots_written + 2, y_norm, mask=is_kept)
        tl.store(roots_written + 3, wants.to(tl.float64), mask=is_kept)
        tl.store(roots_written + 4, steps, mask=is_kept)
        tl.store(roots_written + 5, is_identity, mask=is_kept)
        tl.store(roots_written + 6, is_guarded, mask=is_kept)

        moves = is_unit & (is_identity == 0)
        if ((number == WHOLE) | (number == APPLY)) & (tl.max(moves.to(tl.int32), axis=0) != 0):
            its_r, its_m = over_tile(r.to(A), ALONG), over_tile(m.to(A), ALONG)
            for slices in range(slice_begin, slice_end, TILE // ALONG):
                for places in range(place_begin, place_end, ALONG):
                    y, e, floor_ratio, at, mask = load_tile(
                        where, slices, places, metric, HAS_METRIC, STATES, A, TILE, ALONG
                    )
                    furthest = furthest_of(floor_ratio, over_tile(is_guarded, ALONG), c, A)
                    x = unit_prox(y, e, furthest, its_r, its_m)
                    tl.store(w + at, x, mask=mask & over_tile(moves, ALONG))


class Tile(NamedTuple):
    """What a program works on at once."""

    units: int
    weights: int
    """Of each unit."""
    along: int
    """How many of them are in one run; a power of two, as the others."""


def tile_of(layout: device_units.UnitLayout) -> Tile:
    """Few, as each is a kernel of its own."""
    if layout.outer == 1:
        return Tile(32, 16, 16) if layout.run <= 16 else Tile(4, 128, 128) if layout.run <= 128 else Tile(1, 512, 512)
    return Tile(8, 64, 1) if layout.run < 8 else Tile(1, 512, 16) if layout.run < 512 else Tile(1, 512, 512)
