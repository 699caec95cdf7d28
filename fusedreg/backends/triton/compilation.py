"""What is compiled: every launch is a ``Launcher``'s, and the compile-time constants of each are listed here.

Never a hyperparameter, and never a number that grows with the model, so neither compiles anything anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ..device_plan import CHUNK, Launch, StepTables
from . import kernels, units
from .rules import Rule
from .scalars import COMMON_FIELDS

THREADS_OF_WARP = 32
WIDEST_LOAD = 16
"""Bytes: of a pack, whose squares are added up before they meet a sum."""

# The block of the norm is not searched for, as the update's is (tuning.py): the order of a sum decides its last bits.
# Reasoned, not measured: a thread has 64 bytes of float32 on their way, as CUDA's; see csrc/cuda/block.h.
NORM_BLOCK, NORM_BYTES = 4096, 16 * 1024
NORM_WARPS = 8
# A thread's, where a compiler can be told: SUMS_PER_MULTIPROCESSOR programs then have room at once.
NORM_REGISTERS = 64
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


class Launcher:
    """A kernel and its constants, on one device.

    Triton's own way to a compiled kernel looks in every launch for what it must be compiled for: 25 us of Python. Ours
    hangs on no argument (the kernels say so), so it is asked once, and then launched as it is.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], warps: int, registers: int | None = None) -> None:
        self.kernel, self.constants, self.warps = kernel, constants, warps
        self._options = options(warps, registers)
        self._compiled: Any = None
        self._values: list[Any] = []
        self._runner: Any = None
        self._programs = 0  # of the runner

    def compile(self, arguments: tuple[Any, ...]) -> None:
        """And loads it. What may fail about a launch has failed then."""
        if self._compiled is None and isinstance(self.kernel, JITFunction):  # not in the interpreter
            compiled = self.kernel.warmup(*arguments, grid=(1,), **self.constants, **self._options)
            if hasattr(type(compiled), "__getitem__"):  # else it is none yet, but is being compiled meanwhile
                compiled[1, 1, 1]
                self._compiled = compiled
                self._values = [self.constants[name] for name in self.kernel.arg_names[len(arguments) :]]

    def __call__(self, programs: int, arguments: tuple[Any, ...], stream: int) -> None:
        """On the current device, whose stream it is."""
        if self._compiled is None:
            self.compile(arguments)
        if self._compiled is None:
            self.kernel[(programs,)](*arguments, **self.constants, **self._options)
        else:
            if programs != self._programs:
                self._runner, self._programs = self._compiled[programs, 1, 1], programs
            self._runner(*arguments, *self._values, stream=stream)


def options(warps: int, registers: int | None = None) -> dict[str, Any]:
    # Said, because its default is about to change: a product and a sum may be one instruction, with one rounding.
    found = dict(num_warps=warps, enable_fp_fusion=True)
    if registers is not None and torch.version.hip is None:
        found["maxnreg"] = registers
    return found


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


# -- launchers, and what each is called with


def squares(rule: Rule, dtype: torch.dtype, is_aligned: bool) -> Launcher:
    constants = squares_constants(rule, dtype, is_aligned)
    return Launcher(kernels.squares_kernel, constants, NORM_WARPS, NORM_REGISTERS)


def prepare(rule: Rule, clips: bool) -> Launcher:
    return Launcher(kernels.prepare_kernel, prepare_constants(rule, clips), PREPARE_WARPS)


def update(
    rule: Rule, dtype: torch.dtype, states: int, is_aligned: bool, has_stages: bool, block: int, warps: int
) -> Launcher:
    constants = update_constants(rule, dtype, states, is_aligned, has_stages, block)
    return Launcher(kernels.update_kernel, constants, warps)


def unit_prox(rule: Rule, dtype: torch.dtype, states: int, tile: units.Tile) -> Launcher:
    return Launcher(units.units_kernel, units_constants(rule, dtype, states, tile), UNITS_WARPS)


def chunks_of(launch: Launch, tables: StepTables) -> Tensor:
    return tables.chunks[2 * launch.first_chunk :] if launch.first_chunk else tables.chunks


def run_update(launcher: Launcher, launch: Launch, tables: StepTables) -> None:
    arguments = (tables.rows, tables.row_count, chunks_of(launch, tables), tables.constants)
    launcher(launch.chunks, arguments, tables.stream)
