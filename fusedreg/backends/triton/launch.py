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
from . import compilation, units
from .rules import RULES
from .scalars import COMMON_FIELDS
from .tuning import Kernel, update_config


class TritonKernels(Kernels):
    def __init__(self, spec: RuleSpec) -> None:
        self._name, self._rule = spec.name, RULES[spec.name]
        if [*COMMON_FIELDS, *self._rule.field_names] != compiled_field_names(spec):
            raise ValueError(
                f"the Triton kernel of the rule {spec.name!r} reads other fields of a group than its spec has"
            )
        self.compiles_stages = True
        self.constants_width = compilation.constants_width(self._rule)
        self._squares: dict[tuple[Any, ...], compilation.Launcher] = {}
        self._prepare: dict[bool, compilation.Launcher] = {}
        self._update: dict[tuple[Any, ...], compilation.Launcher] = {}
        self._units: dict[tuple[Any, ...], compilation.Launcher] = {}

    def squares(self, launch: Launch, tables: StepTables, partial_sums: Tensor) -> None:
        kind = launch.dtype, launch.is_aligned
        launcher = self._squares.get(kind)
        if launcher is None:
            launcher = self._squares[kind] = compilation.squares(self._rule, *kind)
        arguments = (
            tables.rows,
            tables.row_count,
            compilation.chunks_of(launch, tables),
            launch.chunks,
            tables.scalars,
            tables.sets,
            partial_sums,
        )
        launcher(partial_sums.numel(), arguments, tables.stream)

    def ready(self, launches: Sequence[Launch], tables: StepTables, device: torch.device) -> None:
        """The search for a block may run out of memory, or fail to compile."""
        for launch in launches:
            self._updater(launch, tables)

    def _updater(self, launch: Launch, tables: StepTables) -> compilation.Launcher:
        kind = launch.dtype, launch.states, launch.is_aligned, launch.has_stages
        launcher = self._update.get(kind)
        if launcher is None:
            config = update_config(Kernel(self._name, *kind), tables.rows.device, tables.capturing)
            launcher = compilation.update(self._rule, *kind, *config)
            if not tables.capturing:  # whose config is a makeshift
                self._update[kind] = launcher
        return launcher

    def prepare(self, tables: StepTables, squares: Tensor | None, norm: Tensor | None) -> None:
        clips = squares is not None
        launcher = self._prepare.get(clips)
        if launcher is None:
            launcher = self._prepare[clips] = compilation.prepare(self._rule, clips)
        arguments = (
            tables.scalars,
            tables.sets,
            tables.constants,
            tables.constants if squares is None else squares,
            0 if squares is None else squares.numel(),
            tables.constants if norm is None else norm,
        )
        launcher(tables.set_count, arguments, tables.stream)

    def update(self, launch: Launch, tables: StepTables) -> None:
        compilation.run_update(self._updater(launch, tables), launch, tables)

    def unit_shape(self, layout: UnitLayout, element_size: int) -> UnitShape:
        tile = units.tile_of(layout)
        return UnitShape(together=tile.units, kernel=tile)

    def ready_for_units(self, launches: Sequence[UnitLaunch], tables: StepTables) -> None:
        for launch in launches:
            kind = launch.dtype, launch.states, launch.kernel
            if kind not in self._units:
                launcher = compilation.unit_prox(
                    self._rule, launch.dtype, launch.states, cast(units.Tile, launch.kernel)
                )
                launcher.compile(self._of_units(launch, tables, WHOLE))
                self._units[kind] = launcher

    def units(self, launch: UnitLaunch, tables: StepTables, number: int) -> None:
        launcher = self._units[launch.dtype, launch.states, launch.kernel]
        launcher(launch.items, self._of_units(launch, tables, number), tables.stream)

    def _of_units(self, launch: UnitLaunch, tables: StepTables, number: int) -> tuple[Any, ...]:
        assert tables.units is not None
        return (
            tables.rows,
            tables.row_count,
            tables.units,
            tables.units[launch.first_item :],
            tables.constants,
            tables.constants[tables.scratch :],
            number,
        )
