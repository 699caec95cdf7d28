"""The launches of a step, for the plan that both GPU backends have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...hyperparameters import compiled_field_names
from ...rules.spec import RuleSpec
from ..device_plan import Kernels, Launch, StepTables
from ..device_units import WHOLE, UnitLaunch, UnitLayout, UnitShape
from . import compilation, kernels, units
from .rules import RULES
from .scalars import COMMON_FIELDS
from .tuning import Config, Kernel, update_config


class TritonKernels(Kernels):
    def __init__(self, spec: RuleSpec) -> None:
        self._name, self._rule = spec.name, RULES[spec.name]
        if [*COMMON_FIELDS, *self._rule.field_names] != compiled_field_names(spec):
            raise ValueError(
                f"the Triton kernel of the rule {spec.name!r} reads other fields of a group than its spec has"
            )
        self.compiles_stages = True
        self.constants_width = compilation.constants_width(self._rule)
        self._ready_for_units: set[Any] = set()

    def squares(self, launch: Launch, tables: StepTables, partial_sums: Tensor) -> None:
        compilation.run(
            kernels.squares_kernel,
            partial_sums.numel(),
            (
                tables.rows,
                tables.row_count,
                tables.chunks[2 * launch.first_chunk :],
                launch.chunks,
                tables.scalars,
                tables.sets,
                partial_sums,
            ),
            compilation.squares_constants(self._rule, launch.dtype, launch.is_aligned),
            compilation.NORM_WARPS,
        )

    def ready(self, launches: Sequence[Launch], tables: StepTables, device: torch.device) -> None:
        """The search for a block may run out of memory, or fail to compile."""
        for launch in launches:
            self._config(launch, tables, device)

    def _config(self, launch: Launch, tables: StepTables, device: torch.device) -> Config:
        kernel = Kernel(self._name, launch.dtype, launch.states, launch.is_aligned, launch.has_stages)
        return update_config(kernel, device, tables.capturing)

    def prepare(self, tables: StepTables, squares: Tensor | None, norm: Tensor | None) -> None:
        compilation.run(
            kernels.prepare_kernel,
            tables.set_count,
            (
                tables.scalars,
                tables.sets,
                tables.constants,
                tables.constants if squares is None else squares,
                0 if squares is None else squares.numel(),
                tables.constants if norm is None else norm,
            ),
            compilation.prepare_constants(self._rule, squares is not None),
            compilation.PREPARE_WARPS,
        )

    def update(self, launch: Launch, tables: StepTables) -> None:
        compilation.run_update(self._rule, launch, tables, *self._config(launch, tables, tables.rows.device))

    def unit_shape(self, layout: UnitLayout, element_size: int) -> UnitShape:
        tile = units.tile_of(layout)
        return UnitShape(together=tile.units, kernel=tile)

    def ready_for_units(self, launches: Sequence[UnitLaunch], tables: StepTables) -> None:
        """A launch of no program compiles, which may fail."""
        for launch in launches:
            what = (launch.dtype, launch.states, launch.kernel)
            if what not in self._ready_for_units:
                self._run_units(launch, tables, WHOLE, programs=0)
                self._ready_for_units.add(what)

    def units(self, launch: UnitLaunch, tables: StepTables, number: int) -> None:
        self._run_units(launch, tables, number, launch.items)

    def _run_units(self, launch: UnitLaunch, tables: StepTables, number: int, programs: int) -> None:
        assert tables.units is not None
        compilation.run(
            units.units_kernel,
            programs,
            (
                tables.rows,
                tables.row_count,
                tables.units,
                tables.units[launch.first_item :],
                tables.constants,
                tables.constants[tables.scratch :],
                number,
            ),
            compilation.units_constants(self._rule, launch.dtype, launch.states, cast(units.Tile, launch.kernel)),
            compilation.UNITS_WARPS,
        )
