"""The plan of both GPU backends: makes the tables that kernels read, keeps them in device memory, and launches.

A step is squares (where the norm is asked for), prepare, update. Nobody waits for the device: what only it knows (a
learning rate that is a tensor, AMP's ``found_inf``, a scalar state under a CUDA graph) it reads where it is.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..hyperparameters import Numbers
from ..penalties import has_stages
from ..rules.spec import RuleSpec, number
from .base import Entry, Plan, StepScalars
from .device_units import DeviceUnits, UnitLaunch, UnitLayout, UnitShape
from .tables import NUMEL, ROW_COLUMNS, SET_WIDTH, encode_address, encode_value, make_tables

# The elements of a chunk. 16 Ki elements of fp32 Adam move 448 KiB: long enough to hide what a program does before its
# first load, short enough that the last programs of a launch do not keep the device waiting.
CHUNK = 16 * 1024

# The norm: this many partial sums a launch at the most, each of a fixed set of chunks added up in a fixed order. A
# multiprocessor has as many as run there at once, so that none waits until another is done.
SUMS_PER_MULTIPROCESSOR = 4
MAX_PARTIAL_SUMS = 1024

# The scalars of the step itself, at the head of their table.
GRAD_SCALE, FOUND_INF, MAX_GRAD_NORM, STEP_SCALARS = range(4)


class Launch(NamedTuple):
    """Chunks that one compiled kernel takes."""

    dtype: torch.dtype
    """Of an element: a complex number is two real ones."""
    states: int
    """The rule's tensor states that are needed, as a mask."""
    is_aligned: bool
    """Whether every pointer is a multiple of 16 bytes, as 128-bit loads and stores need it."""
    has_stages: bool
    """Whether a group has more to its prox than l1 and l2, where that is another kernel."""
    first_chunk: int
    chunks: int


class StepTables(NamedTuple):
    """What the kernels of a step are given, in device memory: int64, but for ``constants``."""

    rows: Tensor
    """A parameter each, by columns: see tables.py."""
    chunks: Tensor
    """(row, first element) each; a chunk has at most CHUNK elements."""
    sets: Tensor
    """The scalar sets: SET_WIDTH numbers each, see tables.py."""
    scalars: Tensor
    """Two numbers each: those of the step, then for each group its fields in the order of compiled_field_names."""
    constants: Tensor
    """float64, ``constants_width`` for each scalar set: made by prepare, read by update."""
    row_count: int
    set_count: int
    capturing: bool
    """Whether a CUDA graph is being captured."""
    stream: int
    kept: Any
    """What the tables have addresses of."""
    units: Tensor | None = None
    """int64, what stage 7 walks: see device_units.py. None where no parameter has it."""
    scratch: int = 0
    """Where stage 7 may write in ``constants``: from this number on."""


class Kernels(Protocol):
    """What one backend launches, for one rule."""

    constants_width: int
    compiles_stages: bool = False
    """Whether a prox with more stages than l1 and l2 is another kernel."""

    def squares(self, launch: Launch, tables: StepTables, partial_sums: Tensor) -> None:
        """The sum of squares of the gradients after stages 1 and 2, one part a program: ``partial_sums.numel()``."""

    def ready(self, launches: Sequence[Launch], tables: StepTables, device: torch.device) -> None:
        """Does what may fail, before the step's first launch that moves anything. By default nothing."""

    def ready_for_units(self, launches: Sequence[UnitLaunch], tables: StepTables) -> None:
        """Likewise, of stage 7."""

    def prepare(self, tables: StepTables, squares: Tensor | None, norm: Tensor | None) -> None:
        """Turns the scalars of each set into the constants that its elements' steps read, and moves the scalar states
        that are on the device. ``squares`` add up to the square of the norm to clip by, which goes to ``norm``; None
        where nobody clips."""

    def update(self, launch: Launch, tables: StepTables) -> None:
        """Stages 1 to 6."""

    def unit_shape(self, layout: UnitLayout, element_size: int) -> UnitShape:
        """How a program of ``units`` takes units of a layout."""
        ...

    def units(self, launch: UnitLaunch, tables: StepTables, number: int) -> None:
        """Stage 7: one of the launches that ``DeviceUnits.run`` lists."""


# What a CUDA graph reads when it is replayed, as long as it lives; nobody says when that ends.
_kept_for_graphs: list[Any] = []


def is_gpu(device: torch.device) -> bool:
    """Whether a device has memory of its own, streams and graphs. Tests pretend that the CPU has."""
    return device.type != "cpu"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def most_partial_sums(device: torch.device) -> int:
    if device.type != "cuda":
        return MAX_PARTIAL_SUMS
    return min(SUMS_PER_MULTIPROCESSOR * multiprocessors(device), MAX_PARTIAL_SUMS)


def pinned(numel: int) -> Tensor:
    return torch.empty(numel, dtype=torch.int64, device="cpu", pin_memory=True)


def new_event() -> Any:
    """Records where the current stream is; a query whether the device has got there waits for nothing."""
    return torch.cuda.Event()


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, without waiting for the device."""
    return numbers.to(device, non_blocking=True)


class Pinned:
    """Memory that uploads are made from, and what it takes to write and read it without asking torch each time."""

    def __init__(self, room: int) -> None:
        self._numbers = pinned(room)
        self._bytes = memoryview((ctypes.c_char * (8 * room)).from_address(self._numbers.data_ptr())).cast("B")
        self._used, self._place = self._numbers, room  # in the last upload
        self.room = room

    def upload(self, parts: list[bytes], device: torch.device) -> list[Tensor]:
        """In one copy."""
        place, starts = 0, []
        for part in parts:
            self._bytes[8 * place : 8 * place + len(part)] = part
            starts.append(place)
            place += numbers_in(part)
        if place != self._place:
            self._used, self._place = self._numbers[:place], place
        on_device = upload(self._used, device)
        if len(parts) == 1:
            return [on_device]
        return [on_device[start : start + numbers_in(part)] for start, part in zip(starts, parts, strict=True)]


class Staging:
    """Pinned memory that uploads are made from. It is kept: what no upload reads any more is taken again, the oldest
    first, so there comes to be as much of it as the host is ahead of the device, and then no step asks for any."""

    def __init__(self) -> None:
        self._used: deque[tuple[Pinned, Any]] = deque()
        self._spare: Pinned | None = None
        """For a capture, which had better neither ask for pinned memory nor whether an upload is done."""

    def upload(self, parts: list[bytes], room: int, device: torch.device, capturing: bool) -> list[Tensor]:
        """In one copy.

        Args:
            room: the int64 numbers that all parts may come to.
        """
        if capturing:
            memory, self._spare, done = self._spare, None, None
        else:
            memory, done = self._used.popleft() if self._used and self._used[0][1].query() else (None, new_event())
        if memory is None or memory.room < room:
            memory = Pinned(room)
        on_device = memory.upload(parts, device)
        if done is None:
            _kept_for_graphs.append(memory)
        else:
            done.record()
            self._used.append((memory, done))
            if self._spare is None or self._spare.room < room:
                self._spare = Pinned(room)
        return on_device


def numbers_in(part: bytes) -> int:
    """Of nothing one, as nothing has no address."""
    return len(part) // 8 or 1


class DeviceTables:
    """Tables of int64 in device memory. Those that have changed are uploaded to a new place: launches read the old.

    A graph's capture takes what a step before it has uploaded. Only what has changed since then, as the addresses of
    gradients that the capture itself makes, is uploaded in the graph, in every replay.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, bytes | None] = {}
        self._on_device: dict[str, Tensor] = {}
        self._stream: int | None = None
        self._staging = Staging()

    def put(self, tables: dict[str, bytes], device: torch.device, stream: int, capturing: bool) -> dict[str, Tensor]:
        # Another stream does not wait for this one's upload. A graph's capture does: it begins with a synchronization.
        if not capturing and self._stream != stream:
            self._numbers, self._stream = {}, stream
        # What is as it was most often is the same object, which is the same at once.
        changed = [name for name, numbers in tables.items() if self._numbers.get(name) != numbers]
        if changed:
            parts = [tables[name] for name in changed]
            if is_gpu(device):
                room = sum(map(len, tables.values())) // 8 + len(tables)
                made = self._staging.upload(parts, room, device, capturing)
            else:
                made = [torch.frombuffer(bytearray(each or bytes(8)), dtype=torch.int64) for each in parts]
            for name, table in zip(changed, made, strict=True):
                # What is uploaded into a graph is there only when the graph is replayed.
                self._numbers[name], self._on_device[name] = (None if capturing else tables[name]), table
        if capturing:
            _kept_for_graphs.extend(self._on_device[name] for name in tables if name not in changed)
        return {name: self._on_device[name] for name in tables}


class DevicePlan(Plan):
    stays_on_device = True

    def __init__(
        self,
        spec: RuleSpec,
        entries: list[Entry],
        state: dict[Any, Any],
        kernels: Kernels,
        scalars_on_host: bool = True,
    ) -> None:
        """``scalars_on_host`` as in ``make_tables``."""
        self._kernels = kernels
        self._device = entries[0].param.device
        active = [entry for entry in entries if entry.state is not None]
        self._dtypes = [entry.param.dtype.to_real() for entry in active]
        self._state_masks = [_mask(entry.states) for entry in active]
        self._group_of_row = [entry.group for entry in active]
        self._has_stages: list[bool] = []
        self._made_by = make_tables(spec, entries, state, scalars_on_host)
        self._group_scalars = self._scalars = b""
        self._kept: list[Tensor] = []

        self._launches: list[Launch] = []
        self._chunks = b""
        self._chunks_made_for = b""
        self._kinds: list[tuple[torch.dtype, int, bool, bool]] | None = None
        self._units = DeviceUnits(active, kernels.unit_shape)
        self._tables = DeviceTables()
        self._constants: Tensor | None = None
        self._constants_made_for: Any = None
        self._step: StepTables | None = None

    # -- what the plan is given

    def set_groups(self, groups: list[dict[str, Any]], numbers: Numbers) -> None:
        self._kept = []
        stages = [self._kernels.compiles_stages and has_stages(group) for group in groups]
        of_rows = [stages[group] for group in self._group_of_row]
        if of_rows != self._has_stages:
            self._has_stages, self._chunks_made_for = of_rows, b""
        self._units.set_groups(groups)
        limit = groups[0]["max_grad_norm"]
        scalars = [limit if self._is_on_device(limit) else float(number(limit or 0.0))]
        scalars += [value for values in numbers for value in values]
        self._group_scalars = as_bytes(number for value in scalars for number in self._encode(value, self._kept))
        self._scalars = PLAIN_STEP + self._group_scalars
        on_host = [[0.0 if isinstance(value, Tensor) else value for value in values] for values in numbers]
        self._made_by.set_groups(groups, on_host)

    def _is_on_device(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device.type

    def _encode(self, value: float | Tensor, kept: list[Tensor]) -> tuple[int, int]:
        """A scalar as the kernels read it. A tensor is read where it is, on this plan's device, and kept alive."""
        if not isinstance(value, Tensor):
            return encode_value(value)
        dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
        kept.append(value.detach().to(self._device, dtype, non_blocking=True))
        return encode_address(kept[-1])

    def refresh(self, gradients: list[Tensor | None] | None = None) -> bool:
        self._step = None  # of a step that was not taken
        return self._made_by.refresh(gradients)

    # -- a step

    def sum_of_squares(self, step: StepScalars) -> Tensor:
        with self._guard():
            self._step = tables = self._make_tables(step)
            counts = [min(launch.chunks, most_partial_sums(self._device)) for launch in self._launches]
            partial_sums = torch.empty(sum(counts), dtype=torch.float64, device=self._device)
            sums = [partial_sums] if len(counts) == 1 else partial_sums.split(counts)
            for launch, its_sums in zip(self._launches, sums, strict=True):
                self._kernels.squares(launch, tables, its_sums)
            return partial_sums

    def update(self, step: StepScalars) -> None:
        with self._guard():
            tables, self._step = self._step or self._make_tables(step), None
            squares, norm = None, None
            if step.norm is not None:
                squares = step.norm.squares.to(self._device, non_blocking=True)
                norm = step.norm.norm if step.norm.norm.device == self._device else squares.new_empty(())
            self._kernels.ready(self._launches, tables, self._device)
            self._kernels.ready_for_units(self._units.launches, tables)
            self._kernels.prepare(tables, squares, norm)
            # Backwards: the gradients that the norm has read last are still in the cache.
            for launch in reversed(self._launches):
                self._kernels.update(launch, tables)
            self._units.run(self._kernels, tables)
            self._made_by.move_scalar_states()
            self._made_by.finish_update()

    def _guard(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if is_gpu(self._device) else nullcontext()

    # -- the tables

    def _make_tables(self, step: StepScalars) -> StepTables:
        stream, capturing = 0, False
        if is_gpu(self._device):
            stream, capturing = torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()

        rows, sets = self._made_by.tables()
        self._cut_into_chunks(rows)
        kept: list[Tensor] = []
        scalars = self._scalars
        if step.grad_scale is not None or step.found_inf is not None:
            scale = 1.0 if step.grad_scale is None else step.grad_scale
            of_step = [
                *self._encode(scale if self._is_on_device(scale) else float(scale), kept),
                *self._encode(0.0 if step.found_inf is None else step.found_inf, kept),
            ]
            scalars = as_bytes(of_step) + self._group_scalars
        if capturing:
            _kept_for_graphs.extend((*kept, *self._kept))
        numbers = {"rows": rows, "chunks": self._chunks, "sets": sets, "scalars": scalars}
        if units := self._units.table(rows):
            numbers["units"] = units
        tables = self._tables.put(numbers, self._device, stream, capturing)
        set_count = len(sets) // (8 * SET_WIDTH)
        scratch = set_count * self._kernels.constants_width
        made_for = (stream, scratch + self._units.scratch, capturing)
        if self._constants is None or self._constants_made_for != made_for or capturing:
            self._constants = torch.empty(made_for[1], dtype=torch.float64, device=self._device)
            self._constants_made_for = made_for
        return StepTables(
            **tables,
            constants=self._constants,
            row_count=len(self._dtypes),
            set_count=set_count,
            capturing=capturing,
            stream=stream,
            kept=(kept, self._kept),
            scratch=scratch,
        )

    def _cut_into_chunks(self, rows: bytes) -> None:
        """Chunks that one compiled kernel takes stand side by side."""
        if rows == self._chunks_made_for:
            return
        self._chunks_made_for = rows
        columns = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(ROW_COLUMNS, -1)
        bits = functools.reduce(torch.bitwise_or, columns[:NUMEL])
        aligned = (bits % 16 == 0).tolist()
        kinds = list(zip(self._dtypes, self._state_masks, aligned, self._has_stages, strict=True))
        if kinds == self._kinds:
            return
        self._kinds = kinds
        numels = columns[NUMEL].tolist()
        rows_of_kind: dict[tuple[torch.dtype, int, bool, bool], list[int]] = {}
        for row, kind in enumerate(kinds):
            rows_of_kind.setdefault(kind, []).append(row)
        chunks = array("q")
        self._launches = []
        for kind, its_rows in rows_of_kind.items():
            first = len(chunks) // 2
            for row in its_rows:
                for begin in range(0, numels[row], CHUNK):
                    chunks.extend((row, begin))
            count = len(chunks) // 2 - first
            if count > 0:
                self._launches.append(Launch(*kind, first, count))
        self._chunks = chunks.tobytes()


def as_bytes(numbers: Iterable[int]) -> bytes:
    return array("q", numbers).tobytes()


# Of a step without AMP: no scale, and no found_inf.
PLAIN_STEP = as_bytes((*encode_value(1.0), *encode_value(0.0)))


def _mask(states: Sequence[Tensor | None]) -> int:
    return sum(1 << i for i, state in enumerate(states) if state is not None)
