"""Real processes, joined by gloo, that run a function and hand back what it returns."""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

# Every world has new processes. They are forks of a server that has loaded what most of them need: half a second, not
# five. torch loads its compiler when an optimizer is made or a DTensor met, which alone is three seconds.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_START)
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "fusedreg"]
)


class RankError(AssertionError):
    """A rank of a world raised, died or did not end; the message has its traceback."""


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Calls ``function(*args)`` in ``world_size`` processes, in each of which ``torch.distributed`` is initialized.

    Args:
        function: of a module's top level, so that it can be pickled. ``distributed.get_rank()`` says who it is.
        args: pickled too, and so the same on each rank.
        timeout: in seconds, for everything.

    Returns:
        What each rank's function returned, in their order. It is pickled; tensors are copied.

    Raises:
        RankError: a rank raised, died or ran into the timeout. The others are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = pickle.dumps((function, args))
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, world_size, work, folder, timeout, pipes[rank][1]), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for _, writer in pipes:
                writer.close()  # so that the end of a process ends its pipe
            return _results([reader for reader, _ in pipes], processes, folder, timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _results(readers: list[Connection], processes: list[Any], folder: str, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout + 2.0  # the ranks write their stacks at the timeout
    open_readers = {reader: rank for rank, reader in enumerate(readers)}
    while open_readers:
        ready = wait(list(open_readers), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            rank = open_readers.pop(reader)
            try:
                is_good, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join(5.0)
                is_good, value = False, f"died with exit code {processes[rank].exitcode}"
            (results if is_good else errors)[rank] = value
        if errors:  # the others may wait for it forever; those that fail for the same reason may still say so
            deadline = min(deadline, time.monotonic() + 1.0)
    for rank in open_readers.values():
        if not errors or _stack(folder, rank):
            errors[rank] = f"did not end in {timeout:g} s; its stacks then:\n{_stack(folder, rank)}"
    if errors:
        raise RankError("\n".join(f"rank {rank} of {len(processes)}: {errors[rank]}" for rank in sorted(errors)))
    return [results[rank] for rank in range(len(processes))]


def _stack(folder: str, rank: int) -> str:
    return Path(folder, f"stack-{rank}").read_text() if Path(folder, f"stack-{rank}").exists() else ""


def _rank(rank: int, world_size: int, work: bytes, folder: str, timeout: float, writer: Connection) -> None:
    torch.set_num_threads(1)
    with open(Path(folder, f"stack-{rank}"), "w") as stack:
        faulthandler.dump_traceback_later(timeout, file=stack)
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            function, args = pickle.loads(work)
            message = pickle.dumps((True, function(*args)))
            distributed.barrier()  # nobody leaves while another still reads from it
            distributed.destroy_process_group()
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        writer.send_bytes(message)
        writer.close()
