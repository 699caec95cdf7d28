"""What is compiled: every launch goes through ``run``, and its compile-time constants are listed here.

Never a hyperparameter, and never a number that grows with the model, so neither compiles anything anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from ..device_plan import CHUNK, Launch, StepTables
from . import kernels, units
from .rules import Rule
from .scalars import COMMON_FIELDS

# The block of the norm is not searched for, as the update's is (tuning.py): the order of a sum decides its last bits.
# Reasoned, not measured: a thread has 64 bytes of float32 on their way, as CUDA's; see csrc/cuda/block.h.
NORM_BLOCK, NORM_BYTES = 4096, 16 * 1024
NORM_WARPS = 8
WIDEST_LOAD = 16
"""Bytes: of a pack, whose squares are added up before they meet a sum."""
# Prepare's, which adds up the partial sums.
PREPARE_BLOCK = 1024
PREPARE_WARPS = 4
# Of stage 7 neither, for the same reason.
UNITS_WARPS = 4

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], warps: int) -> None:
    kernel[(programs,)](*arguments, **constants, **options(warps))


def options(warps: int) -> dict[str, Any]:
    # Said, because its default is about to change: a product and a sum may be one instruction, with one rounding.
    return dict(num_warps=warps, enable_fp_fusion=True)


def element_constants(dtype: torch.dtype, is_aligned: bool, block: int) -> dict[str, Any]:
    arithmetic = tl.float64 if dtype == torch.float64 else tl.float32
    return dict(T=ELEMENTS[dtype], A=arithmetic, ALIGNED=is_aligned, CHUNK=CHUNK, BLOCK=block)


def update_constants(
    rule: Rule, dtype: torch.dtype, states: int, is_aligned: bool, has_stages: bool, block: int
) -> dict[str, Any]:
    return dict(
        step=rule.step,
        prox=kernels.prox,
        finish=rule.finish,
        RULE_CONSTANTS=rule.constants,
        RULE_STATES=len(rule.state_names),
        STATES=states,
        STAGES=has_stages,
        **element_constants(dtype, is_aligned, block),
    )


def squares_constants(rule: Rule, dtype: torch.dtype, is_aligned: bool) -> dict[str, Any]:
    pack, block = WIDEST_LOAD // dtype.itemsize, min(NORM_BLOCK, NORM_BYTES // dtype.itemsize)
    return dict(GROUP_FIELDS=group_fields(rule), **element_constants(dtype, is_aligned, block), PACK=pack)


def prepare_constants(rule: Rule, clips: bool) -> dict[str, Any]:
    return dict(
        next_scalars=rule.next_scalars,
        fill=rule.fill,
        HAS_METRIC=rule.has_metric,
        GROUP_FIELDS=group_fields(rule),
        CLIP=clips,
        BLOCK=PREPARE_BLOCK,
    )


def units_constants(rule: Rule, dtype: torch.dtype, states: int, tile: units.Tile) -> dict[str, Any]:
    return dict(
        metric=rule.metric,
        HAS_METRIC=rule.has_metric,
        RULE_CONSTANTS=rule.constants,
        RULE_STATES=len(rule.state_names),
        STATES=states if rule.has_metric else 0,
        T=ELEMENTS[dtype],
        A=tl.float64 if dtype == torch.float64 else tl.float32,
        UNITS=tile.units,
        TILE=tile.weights,
        ALONG=tile.along,
        # Half of the digits: the root then has them all, as Newton's steps are quadratic.
        PRECISION=1e-8 if dtype == torch.float64 else 1e-4,  # unit_precision in csrc/maths/units.h
    )


def group_fields(rule: Rule) -> int:
    return len(COMMON_FIELDS) + len(rule.field_names)


def constants_width(rule: Rule) -> int:
    return kernels.STEP_CONSTANTS.value + rule.constants + units.UNIT_CONSTANTS.value


def run_update(rule: Rule, launch: Launch, tables: StepTables, block: int, warps: int) -> None:
    run(
        kernels.update_kernel,
        launch.chunks,
        (tables.rows, tables.row_count, tables.chunks[2 * launch.first_chunk :], tables.constants),
        update_constants(rule, launch.dtype, launch.states, launch.is_aligned, launch.has_stages, block),
        warps,
    )
