"""The block size and warps of the update kernel: timed once for each kernel on each kind of device, and kept.

The choice is kept in the process, and beside Triton's compiled kernels for the processes to come. It changes no bits:
an element's step does not know its block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

from .. import tables
from ..device_plan import CHUNK, Launch, StepTables
from . import kernels
from .compilation import THREADS_OF_WARP, WIDEST_LOAD, Launcher, constants_width, run_update, update
from .rules import RULES


class Config(NamedTuple):
    """Elements in a block, and the warps that share them."""

    block: int
    warps: int


DEFAULT = Config(1024, 4)
CANDIDATES = (Config(512, 4), DEFAULT, Config(1024, 8), Config(2048, 8))


def candidates(dtype: torch.dtype) -> tuple[Config, ...]:
    """Whose threads have a widest load or more of each tensor."""
    return tuple(
        config
        for config in CANDIDATES
        if config.block // (config.warps * THREADS_OF_WARP) * dtype.itemsize >= WIDEST_LOAD
    )


# The interpreter pays for each operation, whatever its size.
INTERPRETED = Config(4096, 4)

# A trial's elements, in chunks: enough to fill a device, and more than its caches hold.
TRIAL_CHUNKS = 1024


class Kernel(NamedTuple):
    """A compiled update kernel, but for its config."""

    rule: str
    dtype: torch.dtype
    states: int
    is_aligned: bool
    has_stages: bool


Timer = Callable[[Callable[[], None]], float]
"""From a trial, which it runs as often as it likes, to milliseconds."""


def milliseconds(trial: Callable[[], None]) -> float:
    return triton.testing.do_bench(trial, warmup=5, rep=20, return_mode="median")


class Tuner:
    def __init__(self, timer: Timer = milliseconds) -> None:
        self._timer = timer
        self._chosen: dict[Any, Config] = {}

    def config(self, kernel: Kernel, device: torch.device, capturing: bool) -> Config:
        what = (*kernel, device_name(device))
        if what not in self._chosen:
            kept = read(what)
            if kept is None and capturing:  # a graph would capture the trials
                return DEFAULT
            self._chosen[what] = kept or self._search(kernel, what, device)
        return self._chosen[what]

    def _search(self, kernel: Kernel, what: tuple[Any, ...], device: torch.device) -> Config:
        times: dict[Config, float] = {}
        possible = candidates(kernel.dtype)
        waiting = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        try:
            if waiting:  # this once, a step waits for the device; who forbids it means every other step
                torch.cuda.set_sync_debug_mode("default")
            trial = make_trial(kernel, device)
            for config in possible:
                try:
                    times[config] = self._timer(lambda config=config: trial(config))  # type: ignore[misc]
                except OutOfResources:  # a device with fewer registers or threads
                    continue
        except torch.OutOfMemoryError:
            pass
        finally:
            if waiting:
                torch.cuda.set_sync_debug_mode(waiting)
        if len(times) < len(possible):
            # Good for this process; another may have the memory to time all.
            return min(times, key=times.__getitem__, default=DEFAULT)
        best = min(times, key=times.__getitem__)
        write(what, best)
        return best


TUNER = Tuner()


def update_config(kernel: Kernel, device: torch.device, capturing: bool) -> Config:
    return INTERPRETED if device.type == "cpu" else TUNER.config(kernel, device, capturing)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make_trial(kernel: Kernel, device: torch.device) -> Callable[[Config], None]:
    """One update of memory of its own: a trial on the parameters would take steps. Of normal numbers, as zeros and
    denormals may take another path."""
    rule = RULES[kernel.rule]
    used = [tables.W, tables.G, *(tables.STATE + i for i in range(len(rule.state_names)) if kernel.states >> i & 1)]
    memory = torch.empty(len(used), TRIAL_CHUNKS * CHUNK, dtype=kernel.dtype, device=device).uniform_(0.5, 1.5)
    row = [0] * tables.ROW_COLUMNS
    for column, tensor in zip(used, memory, strict=True):
        row[column] = tensor.data_ptr()
    row[tables.NUMEL] = TRIAL_CHUNKS * CHUNK
    begins = torch.arange(TRIAL_CHUNKS, device=device) * CHUNK
    constants = torch.ones(constants_width(rule), dtype=torch.float64, device=device)
    constants[kernels.SKIP.value] = 0
    rows = torch.tensor(row, device=device)
    step = StepTables(
        rows=rows,
        chunks=torch.stack((torch.zeros_like(begins), begins), 1).flatten(),
        sets=rows,
        scalars=rows,
        constants=constants,
        row_count=1,
        set_count=1,
        capturing=False,
        stream=0,
        kept=memory,
    )
    launch = Launch(kernel.dtype, kernel.states, kernel.is_aligned, kernel.has_stages, 0, TRIAL_CHUNKS)
    launchers: dict[Config, Launcher] = {}

    def trial(config: Config) -> None:
        if config not in launchers:
            launchers[config] = update(rule, *launch[:4], *config)
        run_update(launchers[config], launch, step)

    return trial


# -- on disk


def _file(what: tuple[Any, ...]) -> tuple[Any, str]:
    # The key of a JIT function changes with its source.
    key = (kernels.update_kernel.cache_key, RULES[what[0]].step.cache_key, triton.__version__, what, CANDIDATES, CHUNK)
    return get_cache_manager(hashlib.sha256(repr(key).encode()).hexdigest()), "fusedreg_update.json"


def read(what: tuple[Any, ...]) -> Config | None:
    """What another process has found; None too where it cannot be read."""
    try:
        manager, name = _file(what)
        path = manager.get_file(name)
        if path is None:
            return None
        with open(path) as file:
            config = Config(*json.load(file))
    except (OSError, ValueError, TypeError):
        return None
    return config if config in candidates(what[1]) else None


def write(what: tuple[Any, ...], config: Config) -> None:
    try:
        manager, name = _file(what)
        manager.put(json.dumps(config), name, binary=False)
    except OSError:
        pass  # a cache that cannot be written is no reason to take no step
