"""Stage 7 on a GPU, for both GPU backends: how units lie in memory, and who takes which.

Units next to each other make a panel, whose roots one program finds together. A panel that is too large for one program
is cut into parts: then each pass over its weights is a launch. See csrc/cuda/units.h.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..memory import local
from ..penalties import has_units
from ..penalties.units import Unit
from .base import Entry

if TYPE_CHECKING:
    from .device_plan import Kernels, StepTables

# A layout in the table: the parameter's row in `rows`; units, outer and run of UnitLayout; together and along of
# UnitShape; the panels of an item; the slices of a part, and how much of a run; the parts of a panel. An item: the
# layout, the first unit, the part, and where its panel's scratch is. See csrc/plan/table_format.h.
LAYOUT_WIDTH, ITEM_WIDTH = 10, 4

# The launches of a step: one for whole panels, and for those in parts PASSES, then one in which one program finishes
# what they have not found, then one that moves the weights. A root takes five passes or so, with a projection ten.
WHOLE, PASSES = -1, 12
IN_PARTS = tuple(range(PASSES + 2))

# In scratch, in float64 numbers: the root of a unit, and what a part adds up for it. There are two of each.
ROOT_WIDTH, UNIT_SUMS = 8, 3

# Reasoned, not measured. A program of fewer weights than ITEM is not worth its start. A panel of up to PANEL weights
# costs one program about what the launches over parts cost; its weights are read again out of a cache.
ITEM, PANEL, PART, MOST_PARTS = 4 * 1024, 64 * 1024, 16 * 1024, 1024


class UnitLayout(NamedTuple):
    """How a parameter's units lie in memory: ``outer`` times all of them one after the other, ``run`` weights each."""

    units: int
    outer: int
    run: int


class UnitShape(NamedTuple):
    """How a program takes a panel."""

    together: int
    """The units of a panel: a power of two."""
    along: int = 1
    """How many weights of a run it reads side by side, where that is no constant of the kernel."""
    kernel: Hashable = None
    """Which kernel takes it, where there are several."""


class UnitLaunch(NamedTuple):
    """Items that one compiled kernel takes."""

    dtype: torch.dtype
    states: int
    """The rule's tensor states that are needed, as a mask."""
    kernel: Hashable
    is_in_parts: bool
    first_item: int
    """Its place in the table."""
    items: int


def unit_layout(sizes: tuple[int, ...], strides: tuple[int, ...], unit: Unit) -> UnitLayout:
    """Of a dense tensor, as ``unit_layout`` in csrc/cpu/units.cpp has it."""
    numel = math.prod(sizes)
    dim = 1 if unit == "columns" else 0
    if unit == "tensor" or sizes[dim] <= 1:  # a stride of a size of 1 says nothing
        return UnitLayout(1, 1, numel)
    rows = unit if isinstance(unit, int) else 1
    count, run = sizes[dim] // rows, strides[dim] * rows
    return UnitLayout(count, numel // (count * run) if numel else 0, run)


class DeviceUnits:
    """The parameters of a plan that have a gradient, as stage 7 sees them."""

    def __init__(self, entries: list[Entry], shape_of: Callable[[UnitLayout, int], UnitShape]) -> None:
        self._params = [entry.param for entry in entries]
        self._states = [sum(1 << i for i, each in enumerate(entry.states) if each is not None) for entry in entries]
        self._groups = [entry.group for entry in entries]
        self._shape_of = shape_of
        self._units: list[Unit | None] = [None] * len(entries)
        self._rows: bytes | None = None  # that the table was made for
        self._table = b""
        self.launches: list[UnitLaunch] = []
        self.scratch = 0
        """float64 numbers of memory that the launches need."""

    def set_groups(self, groups: list[dict[str, Any]]) -> None:
        of_groups = [group["unit"] if has_units(group) else None for group in groups]
        units = [of_groups[group] for group in self._groups]
        if units != self._units:
            self._units, self._rows = units, None

    def table(self, rows: bytes) -> bytes:
        """What the launches walk; empty where there is nothing to do.

        Args:
            rows: the table of the parameters. Its first column says where each is: a staged one is contiguous.
        """
        if rows != self._rows:
            addresses = slice(8 * len(self._params))
            if self._rows is None or rows[addresses] != self._rows[addresses]:
                self._make(array("q", rows[addresses]))
            self._rows = rows
        return self._table

    def _make(self, addresses: array[int]) -> None:
        layouts: list[tuple[int, ...]] = []
        items: dict[tuple[Any, ...], list[Tensor]] = {}  # by what makes a launch
        self.launches, self.scratch, self._table = [], 0, b""
        for row, (param, states, unit) in enumerate(zip(self._params, self._states, self._units, strict=True)):
            tensor = local(param)
            if unit is None or tensor.numel() == 0:
                continue
            is_staged = addresses[row] != tensor.data_ptr()
            strides = torch.empty(tensor.shape, device="meta").stride() if is_staged else tensor.stride()
            layout = unit_layout(tuple(tensor.shape), strides, unit)
            shape = self._shape_of(layout, tensor.element_size())
            size, panel = layout.outer * layout.run, layout.outer * layout.run * shape.together
            is_in_parts = panel > PANEL
            panels, slices, places, parts = max(ITEM // panel, 1), layout.outer, layout.run, 1
            if is_in_parts:
                panels = 1
                of_part = max(PART // shape.together, -(-size // MOST_PARTS))
                slices, places = max(of_part // layout.run, 1), min(of_part, layout.run)
                parts = -(-layout.outer // slices) * -(-layout.run // places)
            numbers = (row, *layout, shape.together, shape.along, panels, slices, places, parts)
            some = self._items(len(layouts), numbers, is_in_parts)
            layouts.append(numbers)
            items.setdefault((tensor.dtype, states, shape.kernel, is_in_parts), []).append(some)
        first = LAYOUT_WIDTH * len(layouts)
        for (dtype, states, kernel, is_in_parts), tensors in items.items():
            count = sum(len(each) for each in tensors)
            self.launches.append(UnitLaunch(dtype, states, kernel, is_in_parts, first, count))
            first += ITEM_WIDTH * count
        if layouts:
            every_item = torch.cat([each for tensors in items.values() for each in tensors])
            table = torch.cat([torch.tensor(layouts, device="cpu").flatten(), every_item.flatten()])
            self._table = array("q", table.tolist()).tobytes()

    def _items(self, layout: int, numbers: tuple[int, ...], is_in_parts: bool) -> Tensor:
        _, count, _, _, together, _, panels, _, _, parts = numbers
        first = torch.arange(0, count, together * panels, dtype=torch.int64, device="cpu").repeat_interleave(parts)
        part = torch.arange(parts, dtype=torch.int64, device="cpu").repeat(len(first) // parts)
        scratch = torch.zeros_like(first)
        if is_in_parts:
            of_panel = 2 * together * (ROOT_WIDTH + parts * UNIT_SUMS)
            scratch = self.scratch + first // together * of_panel
            self.scratch += len(first) // parts * of_panel
        return torch.stack([torch.full_like(first, layout), first, part, scratch], 1)

    def run(self, kernels: Kernels, tables: StepTables) -> None:
        for launch in self.launches:
            for number in IN_PARTS if launch.is_in_parts else (WHOLE,):
                kernels.units(launch, tables, number)
