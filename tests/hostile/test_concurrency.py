"""Threads and processes: any number of threads gives the same bits, optimizers do not disturb each other, forks go on.

Two optimizers step at the same time, other threads set gradients meanwhile, a process forks between two steps.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import needs_cpp
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    variant_of,
)

import fusedreg

pytestmark = needs_cpp

# Several chunks, tasks of many tensors, and one that is copied because of its gaps
SHAPES = ((151, 307), (77,), (33_003,), (64, 64), (), (0, 3), (5,))
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIPS = {
    "clips": {},
    "no-clip": {"clip_value": None, "max_grad_norm": None},
    "norm": {"clip_value": None},
    "value": {"max_grad_norm": None},
}


def make(cls, seed=1, dtype=torch.float32, shapes=SHAPES, **options):
    params = make_params(shapes, dtype, seed)
    params.append(torch.zeros(9000, 2, dtype=dtype)[:, 0].fill_(0.5).requires_grad_())
    return cls(params, backend="cpp", **{**regularized(cls), **options}), params


def results(optimizer) -> list[torch.Tensor]:
    norm = optimizer.grad_norm
    return snapshot(optimizer) + ([] if norm is None else [norm])


@pytest.mark.parametrize(
    ("dtype", "clip"), [(dtype, "clips") for dtype in DTYPES] + [("fp32", clip) for clip in CLIPS if clip != "clips"]
)
@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)
def test_any_number_of_threads_gives_the_same_bits(cls, flags, dtype, clip, two_threads) -> None:
    found = []
    for threads in (1, 2, 5) if dtype == "fp32" and clip == "clips" else (1, 2):
        torch.set_num_threads(threads)
        optimizer, params = make(cls, dtype=DTYPES[dtype], **variant_of(cls, flags), **CLIPS[clip])
        run(optimizer, params, 2)
        found.append(results(optimizer))
    for other in found[1:]:
        assert_same_bits(found[0], other)


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_optimizers_that_step_at_the_same_time(cls, two_threads) -> None:
    """The GIL is released while a kernel runs, and torch's thread pool is shared."""
    alone = []
    for seed in range(4):
        optimizer, params = make(cls, seed)
        run(optimizer, params, 6, first_seed=10 * seed)
        alone.append(results(optimizer))

    pairs = [make(cls, seed) for seed in range(4)]
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait(timeout=60)
        run(*pairs[seed], 6, first_seed=10 * seed)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, seed) for seed in range(4)]:
            future.result(timeout=120)
    for (optimizer, _), expected in zip(pairs, alone, strict=True):
        assert_same_bits(results(optimizer), expected)


def test_an_optimizer_that_moves_between_threads(two_threads) -> None:
    """Made in one, stepped in others: nothing of a plan belongs to a thread."""
    optimizer, params = make(FusedRegAdam)
    run(optimizer, params, 4)
    moved, its_params = make(FusedRegAdam)
    for i in range(4):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run, moved, its_params, 1, 100 + i).result(timeout=60)
    assert_same_bits(results(moved), results(optimizer))


def test_gradients_that_another_thread_replaces_meanwhile() -> None:
    """Which gradient counts is then chance, as with torch. But memory that is being read must not be freed.

    In a process of its own, for a crash is what it looks for. The arrays are large enough to be unmapped when freed.
    """
    script = """
        import threading, torch
        from fusedreg import FusedRegSGD
        torch.set_num_threads(1)
        param = torch.zeros(2_000_000).requires_grad_()
        param.grad = torch.ones_like(param)
        optimizer = FusedRegSGD([param], lr=1.0, momentum=0.9, max_grad_norm=1e9, backend="cpp")
        done = threading.Event()
        def replace():
            while not done.is_set():
                param.grad = torch.ones_like(param)
        thread = threading.Thread(target=replace)
        thread.start()
        for _ in range(60):
            optimizer.step()
        done.set()
        thread.join()
        assert (param == param[0]).all() and param[0] <= -60
    """
    run_script(script)


def run_script(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(fusedreg.__file__).parents[1],  # the same package as here, whichever that is
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr[-2000:]}"


# -- processes


def in_a_fork(work) -> bytes:
    """What work() returns in a forked child; a child that hangs or dies is a failure, not a test run that hangs."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_end, work())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        for _ in range(600):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0
                with os.fdopen(read_end, "rb", closefd=False) as pipe:
                    return pipe.read()
            time.sleep(0.05)
        pytest.fail("the child hangs")
    finally:
        os.close(read_end)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def digest(optimizer) -> bytes:
    import hashlib

    total = hashlib.sha256()
    for tensor in results(optimizer):
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.digest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_a_child_goes_on_where_its_parent_was(cls, threads, two_threads) -> None:
    """A plan survives a fork, and parent and child do not see each other's steps.

    GNU's OpenMP does not survive one: a child that uses more than one thread hangs, with torch.optim as with us. So the
    child sets one thread, as torch's own DataLoader workers do.
    """
    torch.set_num_threads(threads)
    optimizer, params = make(cls)
    run(optimizer, params, 2)
    set_grads(params, 7)

    def child() -> bytes:
        torch.set_num_threads(1)
        optimizer.step()
        return digest(optimizer)

    its_digest = in_a_fork(child)
    optimizer.step()
    assert its_digest == digest(optimizer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_weights_in_shared_memory_take_the_steps_of_a_child() -> None:
    """share_memory_() moves the storage, which a plan must see; then another process steps it."""
    param = torch.nn.Parameter(torch.ones(50_000))
    optimizer = FusedRegSGD([param], lr=0.5, backend="cpp")
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.share_memory_()

    def child() -> bytes:
        torch.set_num_threads(1)
        optimizer.step()
        return b"done"

    assert in_a_fork(child) == b"done"
    assert (param == 0.0).all()
    optimizer.step()
    assert (param == -0.5).all()
