"""What a backend is to the rest of fusedreg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hyperparameters import Numbers, compiled_field_names
from ..memory import is_dtensor
from ..rules.spec import RuleSpec


@dataclass
class Entry:
    """One parameter, as a plan sees it. Parameters without a gradient have no state and are only watched."""

    param: Tensor
    group: int
    state: dict[str, Any] | None
    """The optimizer's own dict of this parameter's state."""
    states: tuple[Tensor | None, ...] = ()
    """The rule's tensor states, in the spec's order; None for those that the group's options do not need."""
    scalar_states: tuple[Tensor | None, ...] = ()
    """Likewise, 0-dim: Adam's ``step``, SGD's ``momentum_gain``."""
    scales: tuple[Tensor | None, ...] = ()
    """Of the tensor states that are in 8 bits (codes.py), in this process's memory; None for the others. Empty where
    none are."""
    rounding: tuple[int, int, tuple[int, ...]] | None = None
    """Where stochastic rounding acts, what its random bits are a function of: a ``rounding.Place``."""


@dataclass(slots=True)
class StepScalars:
    """What a step needs beyond the groups. AMP's scalars come as GradScaler sets them."""

    grad_scale: float | Tensor | None = None
    inv_grad_scale: float = 1.0
    """Its inverse, but where all plans have ``stays_on_device``."""
    found_inf: Tensor | None = None
    """Only for plans with ``stays_on_device``: the step is skipped where it is not zero."""
    clip_coef: float | Tensor = 1.0
    rounding_keys: Sequence[int] = ()
    """Of the groups, for this step's stochastic rounding; empty where nobody rounds so."""
    next_seeds: Sequence[tuple[dict[str, Any], int]] = ()
    """Groups of the optimizer, and the ``rounding_seed`` that they have after this step."""
    norm: DeviceNorm | None = None
    """Only for plans with ``stays_on_device``, in place of ``clip_coef``."""


@dataclass
class DeviceNorm:
    """A norm clip that the host does not look at."""

    squares: Tensor
    """float64, on the plan's device: their sum is the square of the norm."""
    max_grad_norm: float | Tensor
    norm: Tensor
    """0-dim float64: where the plan writes the norm."""


def objects_held(entries: list[Entry], state: dict[Any, Any]) -> tuple[Any, ...]:
    """What a compiled plan borrows, for its Python side to hold, where the garbage collector sees it."""
    items = [tuple(entry.state.items()) for entry in entries if entry.state is not None]
    return entries, state, tuple(state.items()), items


def make_columns(spec: RuleSpec, entries: list[Entry], state: dict[Any, Any]) -> tuple[Any, ...]:
    """The entries, all sharded or none, as a compiled plan takes them: ``Columns`` of csrc/plan/parameters.h."""
    return (
        compiled_field_names(spec),
        [entry.param for entry in entries],
        [entry.group for entry in entries],
        [entry.state for entry in entries],
        [entry.states for entry in entries],
        [entry.scales or (None,) * len(entry.states) for entry in entries],
        [entry.scalar_states for entry in entries],
        [entry.rounding for entry in entries],
        state,
        is_dtensor(entries[0].param),
        written(entries),
    )


def written(entries: list[Entry]) -> tuple[Tensor, ...]:
    """The tensors that a step writes, but scalar states."""
    stepped = [entry for entry in entries if entry.state is not None]
    tensors = [tensor for entry in stepped for tensor in (entry.param, *entry.states, *entry.scales)]
    return tuple(tensor for tensor in tensors if tensor is not None)


class Plan(Protocol):
    """Entries of one optimizer that one backend works on, all on one device; DTensors are not mixed with others."""

    stays_on_device: bool
    """The host waits for nothing: AMP's scalars, hyperparameters that are tensors, scalar states and the norm are read
    on the device."""

    def set_groups(self, groups: list[dict[str, Any]], numbers: Numbers) -> None:
        """Takes new hyperparameters, which need the same states: the groups, and their numbers in the order of
        ``compiled_field_names``. Those that are tensors on a GPU come as such."""

    def refresh(self, gradients: list[Tensor | None] | None = None) -> bool:
        """Reads the gradients; False if something that the plan rests on has changed. Moves nothing.

        Args:
            gradients: one an entry, as ``memory.read_gradient`` returns it, in place of ``param.grad``. Without them, a
                DTensor's gradient that would have to be redistributed is something that has changed.
        """

    def sum_of_squares(self, step: StepScalars) -> float | Tensor:
        """Of the gradients after stages 1 and 2. A tensor may hold it in parts."""

    def update(self, step: StepScalars) -> None:
        """Stages 1 to 7; moves the scalar states on."""


class Backend(Protocol):
    name: str
    device_type: str | None
    """The only type of device that it runs on; None for any."""
    takes_units: bool
    """Whether its plans do stage 7, the penalties on units."""
    rounds_stochastically: bool
    """Whether its plans do so where an entry has a ``rounding``."""

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""

    def rejection(
        self,
        spec: RuleSpec,
        param: Tensor,
        states: list[Tensor],
        state_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> str | None:
        """Why this backend cannot take this parameter with these state tensors under this rule, or None.

        Args:
            state_dtype: which they are converted to, and those that are not there yet are made in; None: they stay as
                they are, and new ones have the parameter's.
            grad_dtype: of its gradient; None: the parameter's.
        """

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        """``state`` is the optimizer's: a plan that is kept must see when something in it is replaced."""
        ...
