"""Clocks, memory, and what machine this is.

Absolute times mean nothing between machines, so what counts are ratios. They are taken in one process, in rounds: each
round times one step of every contender, in a new random order, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fusedreg

Step = Callable[[], Any]
Seconds = dict[str, list[float]]

MIN_ROUNDS, MAX_ROUNDS = 5, 3000
STREAM_ELEMENTS = 100_000_000
LONGEST_SLEEP, MOST_CYCLES_A_SECOND = 0.2, 2e9
"""Of the GPU before it is timed: seconds, and what its clock does not exceed."""


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_in_rounds(steps: dict[str, Step], budget: float, clock: Callable[[Step], float] | None = None) -> Seconds:
    """Seconds of each step in each round, for as many rounds as fit into ``budget`` seconds, after a warm-up."""
    take = clock or wall_time
    order = list(steps)
    shuffle = random.Random(0).shuffle

    def play_round() -> dict[str, float]:
        # A step may leave the caches as the next one likes them; a fixed order would favour one contender.
        shuffle(order)
        return {name: take(steps[name]) for name in order}

    with no_garbage_collection():
        play_round()  # makes state, compiles
        begin = time.perf_counter()
        play_round()
        one = time.perf_counter() - begin
        rounds = int(min(max(budget / one, MIN_ROUNDS), MAX_ROUNDS))
        for _ in range(rounds // 10):
            play_round()
        played = [play_round() for _ in range(rounds)]
    return {name: [times[name] for times in played] for name in steps}


def wall_time(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


class GpuClock:
    """Seconds of device time of a step, in a row of ``repeats`` where one is too short to tell.

    The GPU sleeps until the host has handed all over: an idle one would begin at once, and wait for the host in what is
    timed.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._host_seconds: dict[Step, float] = {}

    def __call__(self, step: Step) -> float:
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Half as long again as the host took the last time; a step that waits for the GPU waits for this first.
        torch.cuda._sleep(
            int(min(1.5 * self._host_seconds.get(step, 0.0) + 1e-4, LONGEST_SLEEP) * MOST_CYCLES_A_SECOND)
        )
        before = time.perf_counter()
        begin.record()
        for _ in range(self.repeats):
            step()
        end.record()
        self._host_seconds[step] = time.perf_counter() - before
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.repeats


def host_time(step: Step) -> float:
    """What the host takes to hand a step over to an idle GPU."""
    torch.cuda.synchronize()
    taken = wall_time(step)
    torch.cuda.synchronize()
    return taken


# -- memory


def stream_step() -> tuple[Step, int]:
    """An in-place stream, which no step can outrun, and the bytes that it moves."""
    x = torch.ones(STREAM_ELEMENTS)
    return lambda: x.mul_(1.0), 2 * x.numel() * x.element_size()


def copy_bandwidth(numel: int) -> float:
    """Bytes a second of a copy on the GPU, read and written."""
    source = torch.empty(numel, device="cuda").normal_()
    target = torch.empty_like(source)
    seconds = time_in_rounds({"copy": lambda: target.copy_(source)}, 1.0, GpuClock(1))["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def _status_mib(field_name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field_name} in the process status")


def peak_extra_mib(step: Step) -> float | None:
    """How far a step's peak of resident memory is above what stood there before it; None where Linux does not tell."""
    # The allocator's freed pages go back first: a step that got those again would seem to need no memory.
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to what is resident now
        before = _status_mib("VmHWM")
        step()
        return _status_mib("VmHWM") - before
    except OSError:
        return None


# -- the machine


def stamp(device: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "fusedreg": fusedreg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
    }
    if device == "cpu":
        from fusedreg import _C

        return about | {"threads": torch.get_num_threads(), "instruction_set": _C.instruction_set()}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    about |= {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": driver.stdout.strip().partition("\n")[0],
    }
    try:
        about["triton"] = importlib.import_module("triton").__version__
    except ImportError:
        about["triton"] = None
    return about


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# Each addition waits for the one before it, for a cycle; of a variable, as some processors rename a constant's away.
COUNT_CYCLES = r"""
#define ADD x += step; __asm__ volatile("" : "+r"(x));
#define ADD_4 ADD ADD ADD ADD
void count_cycles(unsigned long times, unsigned long step) {
  unsigned long x = 0;
  for (unsigned long i = 0; i < times; i += 16) { ADD_4 ADD_4 ADD_4 ADD_4 }
}
"""


def clock_hz(times: int = 160_000) -> float | None:
    """Cycles a second of the thread that asks, as fast as the processor runs now. None without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "cycles.c", Path(folder) / "cycles.so"
        source.write_text(COUNT_CYCLES)
        try:
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        count_cycles = ctypes.CDLL(str(library)).count_cycles
    count_cycles.argtypes, count_cycles.restype = [ctypes.c_ulong, ctypes.c_ulong], None
    return times / min(wall_time(lambda: count_cycles(times, 3)) for _ in range(1000))
