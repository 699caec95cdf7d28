"""A GPU, pretended on the CPU, for the tests that need one (test_gpu.py): streams, CUDA graphs, uploads, and what torch
warns of on a real one.

Tensors are the CPU's, kernels are those that cuda_emulation.py runs. What it knows of a GPU:

- Work on a stream must have been waited for by the stream that comes next to work; else it raises.
- A graph that is captured keeps its launches by the numbers that they are given, addresses among them, and runs them
  only when it is replayed.
- A call that waits for the device raises where ``torch.cuda.set_sync_debug_mode`` says so.
"""

from __future__ import annotations

import ctypes
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from cuda_emulation import EmulatedCudaBackend
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedreg import backends
from fusedreg.backends import device_plan

WAITS = {"item", "tolist", "cpu", "numpy", "equal", "nonzero", "__bool__", "__float__", "__int__", "__index__"}

# As torch 2.11 to 2.13 have them: csrc/cuda/Module.cpp, ATen/cuda/CUDAGraph.cpp.
PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
EMPTY = (
    "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on wrong device or stream."
)


class Memory(bytearray):
    """Of the host, pinned: gone when nobody holds it."""


class Stream:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self.cuda_stream = next(gpu.numbers)
        self.seen = 0  # of all work, in the order that the host handed it over

    def wait_stream(self, other: Stream) -> None:
        self.seen = max(self.seen, other.seen)

    def is_capturing(self) -> bool:
        return self._gpu.capture is not None


class Event:
    """Behind an upload, whose memory nobody may have written until the device has got there. It is done when
    ``uploads_behind`` more have been asked for."""

    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        gpu.events.append(self)
        self.record()

    def record(self) -> None:
        self._memory, self._content, self._number = self._gpu.last_upload

    def is_done(self) -> bool:
        return self._gpu.last_upload[2] - self._number >= self._gpu.uploads_behind

    def query(self) -> bool:
        assert self._gpu.capture is None  # CUDA forbids it
        return self.is_done()

    def check(self) -> None:
        assert self.is_done() or self._memory.startswith(self._content)


class Graph:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self.nodes: list[Callable[[], None]] = []
        self.pool: list[Tensor] = []

    def replay(self) -> None:
        self._gpu.work()
        for node in self.nodes:
            node()


class Launches:
    """The kernels of an extension: launched, or captured. What they are given are numbers, addresses among them."""

    def __init__(self, gpu: PretendGpu, extension: Any) -> None:
        self._gpu, self._extension = gpu, extension

    def __getattr__(self, name: str) -> Any:
        its = getattr(self._extension, name)
        if name not in ("squares", "prepare", "update", "units"):
            return its
        return lambda *args: self._gpu.launch(lambda: its(*args))


class Backend(EmulatedCudaBackend):
    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__(scalars_on_host=False)
        self._gpu = gpu

    def make_plan(self, *args: Any) -> Any:
        plan = super().make_plan(*args)
        plan._kernels._extension = Launches(self._gpu, plan._kernels._extension)
        return plan


class PretendGpu(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        self.did: Counter[str] = Counter()
        """How many tables were uploaded, how often pinned memory was asked for; in a capture under other names."""
        self.capture: Graph | None = None
        self.uploads_behind = 0
        """How many the host is ahead of the device."""
        self.events: list[Event] = []
        self.last_upload: tuple[Memory, bytes, int] = Memory(), b"", 0
        self._pinned: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._work = 0
        self._current = self._default = Stream(self)
        self._sync_debug_mode = 0
        self._has_warned = False

    # -- work and its order

    def work(self) -> None:
        if self._current.seen < self._work:
            raise AssertionError("a stream goes on with what another one may still be working on")
        self._work += 1
        self._current.seen = self._work

    def launch(self, kernel: Callable[[], None]) -> None:
        if self.capture is not None:
            self.capture.nodes.append(kernel)
        else:
            self.work()
            kernel()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # What is not of floating point is a table in the host's memory.
        if name in WAITS and args[0].is_floating_point():
            if self._sync_debug_mode == 2:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.capture is not None:
                raise RuntimeError("operation not permitted when stream is capturing")
        if name not in ("__get__", "__set__") and self.capture is None:
            self.work()
        result = func(*args, **(kwargs or {}))
        if self.capture is not None and isinstance(result, Tensor) and name not in ("copy_", "__getitem__"):
            self.capture.pool.append(result)  # what is made in a capture lives as long as the graph
        return result

    # -- in place of torch.cuda's

    def stream(self, stream: Stream) -> Any:
        @contextmanager
        def on_stream() -> Any:
            before, self._current = self._current, stream
            try:
                yield
            finally:
                self._current = before

        return on_stream()

    def synchronize(self) -> None:
        self._current.seen = self._default.seen = self._work

    @contextmanager
    def graph(self, graph: Graph) -> Any:
        self.synchronize()
        side = Stream(self)
        side.seen = self._work
        with self.stream(side):
            self.capture = graph
            try:
                yield
            finally:
                self.capture = None
                if not (graph.nodes or graph.pool):
                    warnings.warn(EMPTY, UserWarning, stacklevel=2)

    def set_sync_debug_mode(self, mode: str | int) -> None:
        self._sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[arg-type, assignment]
        if not self._has_warned:  # after the mode is set, as torch's C++ functions do
            self._has_warned = True
            warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)

    # -- in place of what device_plan.py asks of a GPU

    def _count(self, what: str) -> None:
        self.did[what if self.capture is None else f"{what} in a capture"] += 1

    def pinned(self, numel: int) -> Tensor:
        self._count("pinned")
        memory = Memory(8 * numel)
        numbers = torch.frombuffer(memory, dtype=torch.int64)
        self._pinned[numbers.data_ptr()] = memory
        return numbers

    def new_event(self) -> Event:
        return Event(self)

    def upload(self, numbers: Tensor, device: torch.device) -> Tensor:
        self._count("upload")
        on_device = torch.full_like(numbers, -1)
        to, source, size = on_device.data_ptr(), numbers.data_ptr(), numbers.nbytes
        memory = weakref.ref(self._pinned[source])
        for event in self.events:
            event.check()
        self.last_upload = self._pinned[source], bytes(self._pinned[source][:size]), self.last_upload[2] + 1

        def copy() -> None:
            if memory() is None:
                raise AssertionError("an upload is replayed from memory that has been freed")
            ctypes.memmove(to, source, size)

        self.launch(copy)
        return on_device


@contextmanager
def pretend_gpu() -> Any:
    """A GPU meanwhile: backend "cuda", and torch.cuda's functions as the tests use them. All tensors are on it."""
    gpu = PretendGpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "cuda", Backend(gpu))
        for name in ("is_gpu", "pinned", "upload", "new_event"):
            patch.setattr(device_plan, name, getattr(gpu, name, lambda device: True))
        for module in ("optimizer", "hyperparameters", "penalties", "penalties.spec", "rules.spec"):
            patch.setattr(f"fusedreg.{module}.on_gpu", lambda value: isinstance(value, Tensor))
        for name in ("stream", "graph", "synchronize", "set_sync_debug_mode"):
            patch.setattr(torch.cuda, name, getattr(gpu, name))
        for name, value in {
            "is_available": lambda: True,
            "device": lambda device: nullcontext(),
            "Stream": lambda: Stream(gpu),
            "CUDAGraph": lambda: Graph(gpu),
            "current_stream": lambda: gpu._current,
            "is_current_stream_capturing": lambda: gpu.capture is not None,
            "get_sync_debug_mode": lambda: gpu._sync_debug_mode,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        if hasattr(torch, "accelerator"):
            patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
            patch.setattr(torch.accelerator, "current_stream", lambda: gpu._current)
        with gpu:
            yield gpu
