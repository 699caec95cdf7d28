"""Launches, and the search for the fastest block size.

Every launch goes through ``run``. What it passes as a compile-time constant is listed there by its callers: never a
hyperparameter, and never a number that grows with the model, so neither compiles anything anew.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from . import kernels
from .rules import RULES, Rule

# Elements that a program works on. 16 Ki elements of fp32 Adam move 448 KiB: long enough to hide what a program does
# before its first load, short enough that the last programs of a launch do not keep the device waiting.
CHUNK = 16 * 1024

# The block of the norm is not searched for: the order of a sum decides its last bits.
NORM_BLOCK = 1024
NORM_WARPS = 4


class Config(NamedTuple):
    """Elements in a block, and the warps that share them."""

    block: int
    warps: int


DEFAULT = Config(1024, 4)
CANDIDATES = (Config(512, 4), DEFAULT, Config(1024, 8), Config(2048, 8))
# The interpreter pays for each operation, whatever its size.
INTERPRETED = Config(4096, 4)


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


def launch_update(rule: Rule, launch: Launch, tables: StepTables, row_count: int, config: Config) -> None:
    run(
        kernels.update_kernel,
        launch.chunks,
        (tables.rows, row_count, tables.chunks[launch.first_chunk :], tables.hyper),
        update_constants(rule, launch.element, launch.states, launch.is_aligned, config.block),
        config.warps,
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
            tables.chunks[launch.first_chunk :],
            launch.chunks,
            tables.scalars,
            tables.slots,
            partial_sums,
        ),
        squares_constants(launch.element, launch.is_aligned, group_scalars),
        NORM_WARPS,
    )


def launch_prepare(
    rule: Rule, tables: StepTables, slots: int, group_scalars: int, squares: Tensor | None, norm: Tensor | None
) -> None:
    run(
        kernels.prepare_kernel,
        slots,
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


# -- the search

_chosen: dict[Any, Config] = {}


def update_config(rule: str, element: tl.dtype, states: int, device: torch.device, capturing: bool) -> Config:
    """The fastest configuration of the update kernel on this device, measured once and kept beside Triton's kernels."""
    if device.type == "cpu":
        return INTERPRETED
    what = (rule, str(element), states, torch.cuda.get_device_name(device))
    if what not in _chosen:
        if capturing:  # a graph would capture the search
            return DEFAULT
        _chosen[what] = _stored(what) or _search(what, element, states, device)
    return _chosen[what]


def _file(what: tuple[Any, ...]) -> tuple[Any, str]:
    # The key of a JIT function changes with its source and with Triton's version.
    key = (kernels.update_kernel.cache_key, RULES[what[0]].step.cache_key, triton.__version__, what, CANDIDATES, CHUNK)
    return get_cache_manager(_digest(repr(key))), "fusedreg_update.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(what: tuple[Any, ...]) -> Config | None:
    manager, name = _file(what)
    path = manager.get_file(name)
    if path is None:
        return None
    with open(path) as file:
        return Config(*json.load(file))


def _search(what: tuple[Any, ...], element: tl.dtype, states: int, device: torch.device) -> Config:
    """Times each candidate on memory of its own: a trial on the parameters would take steps."""
    rule = RULES[what[0]]
    chunks, width = 1024, 8 if element == tl.float64 else 4
    tensors = 2 + states
    try:
        memory = torch.zeros(tensors, chunks * CHUNK * width, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError:
        return DEFAULT
    columns = [memory[i].data_ptr() if i < tensors else 0 for i in range(2 + kernels.MAX_STATES)]
    table = torch.tensor([*columns, chunks * CHUNK, 0], device=device)
    begins = torch.arange(chunks, device=device) * CHUNK
    hyper = torch.ones(kernels.HYPER_WIDTH.value, dtype=torch.float64, device=device)
    hyper[0] = 0  # skip
    tables = StepTables(table, torch.stack((torch.zeros_like(begins), begins), 1), table, table, hyper)
    launch = Launch(element, states, True, 0, chunks)

    def milliseconds(config: Config) -> float:
        return triton.testing.do_bench(
            lambda: launch_update(rule, launch, tables, 1, config), warmup=5, rep=20, return_mode="median"
        )

    best = min(CANDIDATES, key=milliseconds)
    manager, name = _file(what)
    manager.put(json.dumps(best), name, binary=False)
    return best
