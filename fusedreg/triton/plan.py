"""The Triton plan: makes the tables that kernels.py reads, keeps them between steps, and launches."""

from __future__ import annotations

import functools
from array import array
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backends import Entry, Plan, StepScalars
from .kernels import COLUMNS, HYPER_WIDTH, NUMEL, SLOT_WIDTH
from .launch import (
    CHUNK,
    Launch,
    StepTables,
    launch_prepare,
    launch_squares,
    launch_update,
)
from .parameters import bits_of, encode_address, make_rows
from .rules import RULES
from .scalars import VALUE
from .tuning import Kernel, update_config

# The norm: this many partial sums a launch at the most, each of a fixed set of chunks added up in a fixed order.
MAX_PARTIAL_SUMS = 1024

ELEMENT = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.complex64: tl.float32,
    torch.complex128: tl.float64,
}

# What a CUDA graph reads when it is replayed, as long as it lives; nobody says when that ends.
_kept_for_graphs: list[Tensor] = []


class Table:
    """int64 in device memory. They are uploaded where they have changed, to a new place: launches read the old."""

    def __init__(self) -> None:
        self._numbers: bytes | None = None
        self._stream: int | None = None
        self._on_device: Tensor | None = None
        self._spare: Tensor | None = None

    def put(self, numbers: bytes, device: torch.device, stream: int, capturing: bool) -> Tensor:
        # Another stream does not wait for this one's upload. A graph's capture does: it begins with a synchronization.
        if self._on_device is not None and self._numbers == numbers and (capturing or self._stream == stream):
            if capturing:
                _kept_for_graphs.append(self._on_device)
            return self._on_device
        data = torch.frombuffer(bytearray(numbers or bytes(8)), dtype=torch.int64)
        self._on_device = data if device.type == "cpu" else self._upload(data, device, capturing)
        # What is uploaded into a graph is there only when the graph is replayed.
        self._numbers, self._stream = (None if capturing else numbers), stream
        return self._on_device

    def _upload(self, data: Tensor, device: torch.device, capturing: bool) -> Tensor:
        # From pageable memory the copy would wait for the device. Pinned memory is better not asked for while a graph
        # is captured, so there is some to spare, which no copy has been made from yet.
        if capturing and self._spare is not None and self._spare.numel() >= data.numel():
            pinned, self._spare = self._spare[: data.numel()], None
        else:
            pinned = torch.empty(data.numel(), dtype=torch.int64, device="cpu", pin_memory=True)
        if capturing:
            _kept_for_graphs.append(pinned)
        elif self._spare is None or self._spare.numel() < data.numel():
            self._spare = torch.empty(data.numel(), dtype=torch.int64, device="cpu", pin_memory=True)
        return pinned.copy_(data).to(device, non_blocking=True)


class TritonPlan(Plan):
    stays_on_device = True

    def __init__(
        self, rule: str, scalar_names: list[str], entries: list[Entry], state: dict[Any, Any], host_clocks: bool
    ) -> None:
        """host_clocks: clocks in the CPU's memory are the host's to move. False only where the CPU plays device."""
        self._rule_name, self._rule = rule, RULES[rule]
        self._scalar_names = scalar_names
        self._device = entries[0].param.device
        active = [entry for entry in entries if entry.state is not None]
        self._group_of_row = [entry.group for entry in active]
        self._elements = [ELEMENT[entry.param.dtype] for entry in active]
        self._rows = make_rows(rule, entries, state, host_clocks)
        self._group_scalars: list[int] = []  # encoded
        self._state_counts: list[int] = []
        self._kept: list[Tensor] = []

        self._launches: list[Launch] = []
        self._chunks = b""
        self._chunks_made_for: bytes | None = None
        self._aligned: list[bool] | None = None
        self._tables = {name: Table() for name in ("rows", "chunks", "slots", "scalars")}
        self._hyper: Tensor | None = None
        self._hyper_made_for: Any = None
        self._step: StepTables | None = None

    # -- what the plan is given

    def set_groups(self, groups: list[dict[str, Any]], scalars: list[tuple[float | Tensor, ...]]) -> bool:
        self._kept = []
        limit = groups[0]["max_grad_norm"]
        on_device = isinstance(limit, Tensor) and limit.device.type == self._device.type
        self._group_scalars = self._encode(limit if on_device else float(limit or 0.0), self._kept)
        for values in scalars:
            for value in values:
                self._group_scalars += self._encode(value, self._kept)
        groups_scalars = [
            {n: 0.0 if isinstance(v, Tensor) else v for n, v in zip(self._scalar_names, values, strict=True)}
            for values in scalars
        ]
        needed = [self._rule.state_count(group) for group in groups_scalars]
        self._state_counts = [needed[group] for group in self._group_of_row]
        return self._rows.set_groups(groups_scalars)

    def _encode(self, value: float | Tensor, kept: list[Tensor]) -> list[int]:
        """A scalar as scalars.py reads it. A tensor is read where it is, on this plan's device, and kept alive."""
        if not isinstance(value, Tensor):
            return [VALUE.value, bits_of(value)]
        dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
        kept.append(value.detach().to(self._device, dtype, non_blocking=True))
        return list(encode_address(kept[-1]))

    def refresh(self) -> bool:
        self._step = None  # of a step that was not taken
        return self._rows.refresh()

    # -- a step: squares (where the norm is asked for), prepare, update

    def sum_of_squares(self, step: StepScalars) -> Tensor:
        with self._guard():
            self._step = tables = self._make_tables(step)
            counts = [min(launch.chunks, MAX_PARTIAL_SUMS) for launch in self._launches]
            partial_sums = torch.empty(sum(counts), dtype=torch.float64, device=self._device)
            for launch, its_sums in zip(self._launches, partial_sums.split(counts), strict=True):
                launch_squares(launch, tables, len(self._elements), len(self._scalar_names), its_sums)
            return partial_sums

    def update(self, step: StepScalars) -> None:
        with self._guard(), torch.no_grad():
            tables, self._step = self._step or self._make_tables(step), None
            squares, norm = None, None
            if step.norm is not None:
                squares = step.norm.squares.to(self._device, non_blocking=True)
                norm = step.norm.norm if step.norm.norm.device == self._device else torch.empty_like(step.norm.norm)
            # Before the first launch, which moves clocks: the search may run out of memory, or fail to compile.
            configs = [
                update_config(
                    Kernel(self._rule_name, launch.element, launch.states, launch.is_aligned),
                    self._device,
                    tables.capturing,
                )
                for launch in self._launches
            ]
            launch_prepare(self._rule, tables, len(self._scalar_names), squares, norm)
            for launch, config in zip(self._launches, configs, strict=True):
                launch_update(self._rule, launch, tables, len(self._elements), *config)
            self._rows.move_clocks()
            self._rows.finish_update()

    def _guard(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    # -- the tables

    def _make_tables(self, step: StepScalars) -> StepTables:
        stream, capturing = 0, False
        if self._device.type == "cuda":
            stream, capturing = torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()

        rows, slots = self._rows.tables()
        self._cut_into_chunks(rows)
        kept: list[Tensor] = []
        scale = step.grad_scale
        on_device = isinstance(scale, Tensor) and scale.device.type == self._device.type
        scalars = [
            *self._encode(scale if scale is not None and on_device else float(1.0 if scale is None else scale), kept),
            *self._encode(0.0 if step.found_inf is None else step.found_inf, kept),
            *self._group_scalars,
        ]
        numbers = {"rows": rows, "chunks": self._chunks, "slots": slots, "scalars": array("q", scalars).tobytes()}
        tables = {
            name: table.put(numbers[name], self._device, stream, capturing) for name, table in self._tables.items()
        }
        slot_count = len(slots) // (8 * SLOT_WIDTH.value)
        made_for = (stream, slot_count, capturing)
        if self._hyper is None or self._hyper_made_for != made_for or capturing:
            size = slot_count * HYPER_WIDTH.value
            self._hyper, self._hyper_made_for = torch.empty(size, dtype=torch.float64, device=self._device), made_for
        return StepTables(**tables, slot_count=slot_count, hyper=self._hyper, capturing=capturing, kept=kept)

    def _cut_into_chunks(self, rows: bytes) -> None:
        """Chunks that one compiled kernel takes stand side by side."""
        if rows == self._chunks_made_for:
            return
        self._chunks_made_for = rows
        columns = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(COLUMNS.value, -1)
        bits = functools.reduce(torch.bitwise_or, columns[: NUMEL.value])
        aligned = (bits % 16 == 0).tolist()
        if aligned == self._aligned:
            return
        self._aligned = aligned
        numels = columns[NUMEL.value].tolist()
        rows_of_kind: dict[Any, list[int]] = {}
        for row, kind in enumerate(zip(map(str, self._elements), self._state_counts, aligned, strict=True)):
            rows_of_kind.setdefault(kind, []).append(row)
        chunks = array("q")
        self._launches = []
        for (_, states, is_aligned), its_rows in rows_of_kind.items():
            first = len(chunks) // 2
            for row in its_rows:
                for begin in range(0, numels[row], CHUNK):
                    chunks.extend((row, begin))
            count = len(chunks) // 2 - first
            if count > 0:
                self._launches.append(Launch(self._elements[its_rows[0]], states, is_aligned, first, count))
        self._chunks = chunks.tobytes()
