"""Steps of the CUDA backend on real threads, under ThreadSanitizer: what test_cuda_threads.py runs in a process of its
own, and talks to line by line. A request is a scenario, and a fault to put in. Each runs in a fork of this process,
which ThreadSanitizer ends at the first race.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_emulation import EmulatedCudaBackend, build_for_thread_sanitizer
from helpers import assert_same_bits, set_grads, snapshot
from torch import Tensor

from fusedreg import FusedRegAdam, FusedRegSGD, backends
from fusedreg.backends import cuda, device_plan, device_units
from fusedreg.parity import REGULARIZED, STAGES

LONGEST = 240.0  # seconds of a scenario: seconds, but on a machine that others keep busy

CHUNK = 512  # of SMALL
# Several chunks, a tail, and the smallest.
SHAPES = ((3 * CHUNK + 5,), (CHUNK,), (7, 13), ())


def make_params(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    """And one that is not aligned to 16 bytes."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    made.append(torch.randn(2 * CHUNK + 77, generator=generator, dtype=torch.float64).to(dtype)[1:])
    return [tensor.requires_grad_() for tensor in made]


def take_steps(cls: type, params: list[Tensor], steps: int, backend: str, **options: Any) -> list[Tensor]:
    """In two groups, so that there are several scalar sets; the second one's parameters skip the first step."""
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.01}]
    optimizer = cls(groups, backend=backend, **options)
    for step in range(steps):
        set_grads(params, step)
        if step == 0:
            for param in params[1::2]:
                param.grad = None
        optimizer.step()
    return [*snapshot(optimizer), optimizer.grad_norm]


def sgd(backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Whose momentum's gain is a scalar state, which prepare reads and moves on."""
    options = dict(momentum=0.9, dampening=0.1, **REGULARIZED)
    return take_steps(FusedRegSGD, make_params(dtype), 3, backend, **options)


def adam(backend: str, dtype: torch.dtype) -> list[Tensor]:
    options = {**REGULARIZED, **STAGES}
    return take_steps(FusedRegAdam, make_params(dtype), 3, backend, amsgrad=True, **options)


def amp(backend: str, dtype: torch.dtype) -> list[Tensor]:
    """A step, one that found_inf skips, and one with a scale."""
    params = make_params(dtype)
    optimizer = FusedRegAdam(params, backend=backend, group_l1=0.3, unit="tensor", **REGULARIZED)
    for step, found_inf in enumerate((0.0, 1.0, 0.0)):
        set_grads(params, step)
        before = [*snapshot(optimizer), optimizer.grad_norm]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        optimizer.step()
        if found_inf != 0:
            assert_same_bits(before, [*snapshot(optimizer), optimizer.grad_norm])
    return [*snapshot(optimizer), optimizer.grad_norm]


def take_steps_with_units(
    backend: str,
    dtype: torch.dtype,
    cls: type = FusedRegAdam,
    shapes: tuple[tuple[int, int], ...] = ((9, 70), (40, 3)),
    **sizes: Any,
) -> list[Tensor]:
    """Some units are zero, some are cut to the largest norm, some only shrink."""
    found = []
    with sizes_of_units(**sizes):
        for unit, most in (("rows", 0.7), ("columns", 0.7), ("tensor", 0.9)):
            params = make_params(dtype, shapes)[: len(shapes)]
            size = {"rows": shapes[0][1], "columns": shapes[0][0], "tensor": params[0].numel()}[unit]
            options = dict(lr=0.02, l1=0.3, l2=0.2, group_l1=6.0, max_unit_norm=most * size**0.5, unit=unit)
            found += take_steps(cls, params, len(shapes), backend, **options)[:-1]
    return found


@contextmanager
def sizes_of_units(**sizes: Any) -> Iterator[None]:
    """Of device_units: how much a block takes of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(device_units, name, size)
        yield


def take_a_step(backend: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    params = make_params(dtype, ((2 * CHUNK + 5,),))[:1]
    return take_steps(FusedRegSGD, params, 1, backend, momentum=0.9, **options)


def take_a_step_with_units(backend: str, dtype: torch.dtype, **sizes: Any) -> list[Tensor]:
    """Four rows that are the same, of which a block takes two at a time."""
    param = torch.linspace(-1, 1, 70, dtype=dtype).repeat(4, 1).requires_grad_()
    with sizes_of_units(**sizes):
        optimizer = FusedRegAdam([param], backend=backend, lr=0.1, group_l1=0.5, max_unit_norm=2.0, unit="rows")
        param.grad = param.detach().square()
        optimizer.step()
    return [param.detach()]


# A panel is a few parts then, for each unit; and the passes after which one block finishes.
IN_PARTS = dict(PANEL=32, PART=32)
FEW = dict(**IN_PARTS, IN_PARTS=(0, 1, device_units.PASSES, device_units.PASSES + 1))
SCENARIOS: dict[str, Callable[[str, torch.dtype], list[Tensor]]] = {
    "sgd": sgd,
    "adam": adam,
    "amp": amp,
    "units": take_steps_with_units,
    "units of sgd": functools.partial(take_steps_with_units, cls=FusedRegSGD),
    "several panels an item": functools.partial(take_steps_with_units, ITEM=1024),
    "units in parts": functools.partial(take_steps_with_units, shapes=((6, 24),), **IN_PARTS),
    "units that one block finishes": functools.partial(take_steps_with_units, shapes=((6, 24),), **FEW),
    # For faults: short, and always with as many barriers.
    "a step": functools.partial(take_a_step, max_grad_norm=1.0),
    "a step without a norm": take_a_step,
    "a step with units": functools.partial(take_a_step_with_units, ITEM=1),
    "a step with two panels an item": take_a_step_with_units,
    "a step with units in parts": functools.partial(take_a_step_with_units, PANEL=32, PART=64),
}


@functools.cache
def of_the_reference(scenario: str) -> list[Tensor]:
    return SCENARIOS[scenario]("reference", torch.float64)


def run_scenario(scenario: str, kernel: str = "", hidden: Sequence[int] = (), twice: bool = False) -> int:
    """Compares with the reference, and two orders of blocks with each other. How many barriers a block of the kernel
    has passed.

    Args:
        kernel: the one that has a fault.
        hidden: its barriers that nobody sees.
        twice: whether each of its blocks runs twice at once.
    """
    library = ctypes.CDLL(build_for_thread_sanitizer().__file__)
    for barrier in hidden:
        library.fusedreg_hide_barrier(kernel.encode(), barrier)
    if twice:
        library.fusedreg_run_twice(kernel.encode())
    results = []
    for seed, dtype, tolerance in ((0, torch.float64, 1e-12), (1, torch.float64, 1e-12), (2, torch.float32, 5e-7)):
        library.fusedreg_draw(seed)
        results.append(SCENARIOS[scenario]("cuda", dtype))
        for ours, truth in zip(results[-1], of_the_reference(scenario), strict=True):
            torch.testing.assert_close(ours.double(), truth.double(), rtol=tolerance, atol=tolerance)
    assert_same_bits(*results[:2])
    return library.fusedreg_barriers(kernel.encode())


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the scenario. Its exit status, and what it has printed: at last, what it returned."""
    of_the_reference(request["scenario"])  # which the children then have
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                print(run_scenario(**request), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        deadline = time.monotonic() + LONGEST
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:  # some wait at a barrier, and others do not come
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        output.seek(0)
        return {"status": os.waitstatus_to_exitcode(ended[1]), "output": output.read().decode(errors="replace")}


def main() -> None:
    os.environ.pop("LD_PRELOAD")  # the compiler is to run without
    torch.set_num_threads(1)
    extension = build_for_thread_sanitizer()
    backends.BACKENDS["cuda"] = EmulatedCudaBackend(scalars_on_host=False, build=build_for_thread_sanitizer)
    cuda.THREADS, device_plan.CHUNK = extension.FORMAT["THREADS"], extension.FORMAT["CHUNK"]
    assert device_plan.CHUNK == CHUNK
    device_plan.MAX_PARTIAL_SUMS = 4  # fewer than chunks
    for module in ("optimizer", "hyperparameters", "penalties", "penalties.spec", "rules.spec"):
        sys.modules[f"fusedreg.{module}"].on_gpu = lambda value: isinstance(value, Tensor)  # type: ignore[attr-defined]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
