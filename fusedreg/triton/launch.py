"""The launches of a step.

Every launch goes through ``run``. What it passes as a compile-time constant is listed there by its callers: never a
hyperparameter, and never a number that grows with the model, so neither compiles anything anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from . import kernels
from .rules import Rule

# Elements that a program works on. 16 Ki elements of fp32 Adam move 448 KiB: long enough to hide what a program does
# before its first load, short enough that the last programs of a launch do not keep the device waiting.
CHUNK = 16 * 1024

# The block of the norm is not searched for, as the update's is (tuning.py): the order of a sum decides its last bits.
NORM_BLOCK = 1024
NORM_WARPS = 4


class Launch(NamedTuple):
    """Chunks that one compiled kernel takes: of one dtype, rule variant and alignment."""

    element: tl.dtype
    states: int
    is_aligned: bool
    first_chunk: int
    chunks: int


class StepTables(NamedTuple):
    rows: Tensor
    chunks: Tensor
    slots: Tensor
    scalars: Tensor
    slot_count: int
    hyper: Tensor
    capturing: bool = False
    kept: Any = ()
    """What the tables have addresses of."""


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], warps: int) -> None:
    kernel[(programs,)](*arguments, **constants, **options(warps))


def options(warps: int) -> dict[str, Any]:
    # Said, because its default is about to change: a product and a sum may be one instruction, with one rounding.
    return dict(num_warps=warps, enable_fp_fusion=True)


def arithmetic(element: tl.dtype) -> tl.dtype:
    return tl.float64 if element == tl.float64 else tl.float32


def update_constants(rule: Rule, element: tl.dtype, states: int, is_aligned: bool, block: int) -> dict[str, Any]:
    return dict(
        step=rule.step,
        prox=kernels.prox,
        RULE_SCALARS=rule.step_scalars,
        STATES=states,
        T=element,
        A=arithmetic(element),
        ALIGNED=is_aligned,
        CHUNK=CHUNK,
        BLOCK=block,
    )


def squares_constants(element: tl.dtype, is_aligned: bool, group_scalars: int) -> dict[str, Any]:
    return dict(
        GROUP_SCALARS=group_scalars,
        T=element,
        A=arithmetic(element),
        ALIGNED=is_aligned,
        CHUNK=CHUNK,
        BLOCK=NORM_BLOCK,
    )


def prepare_constants(rule: Rule, clips: bool, group_scalars: int) -> dict[str, Any]:
    return dict(fill=rule.fill, HAS_METRIC=rule.has_metric, GROUP_SCALARS=group_scalars, CLIP=clips, BLOCK=NORM_BLOCK)


def launch_update(rule: Rule, launch: Launch, tables: StepTables, row_count: int, block: int, warps: int) -> None:
    run(
        kernels.update_kernel,
        launch.chunks,
        (tables.rows, row_count, tables.chunks[2 * launch.first_chunk :], tables.hyper),
        update_constants(rule, launch.element, launch.states, launch.is_aligned, block),
        warps,
    )


def launch_squares(
    launch: Launch, tables: StepTables, row_count: int, group_scalars: int, partial_sums: Tensor
) -> None:
    """One partial sum a program."""
    run(
        kernels.squares_kernel,
        partial_sums.numel(),
        (
            tables.rows,
            row_count,
            tables.chunks[2 * launch.first_chunk :],
            launch.chunks,
            tables.scalars,
            tables.slots,
            partial_sums,
        ),
        squares_constants(launch.element, launch.is_aligned, group_scalars),
        NORM_WARPS,
    )


def launch_prepare(
    rule: Rule, tables: StepTables, group_scalars: int, squares: Tensor | None, norm: Tensor | None
) -> None:
    run(
        kernels.prepare_kernel,
        tables.slot_count,
        (
            tables.scalars,
            tables.slots,
            tables.hyper,
            tables.hyper if squares is None else squares,
            0 if squares is None else squares.numel(),
            tables.hyper if norm is None else norm,
        ),
        prepare_constants(rule, squares is not None, group_scalars),
        NORM_WARPS,
    )
