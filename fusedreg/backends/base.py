"""What a backend is to the rest of fusedreg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass
class Entry:
    """One parameter, as a plan sees it. Parameters without a gradient have no state and are only watched."""

    param: Tensor
    group: int
    state: dict[str, Any] | None
    clock: Tensor | None
    """The rule's clock, 0-dim: Adam's ``step``, SGD's momentum gain, None for a rule without one."""


@dataclass
class StepScalars:
    """What a step needs beyond the groups."""

    inv_grad_scale: float | Tensor = 1.0
    clip_coef: float | Tensor = 1.0


class Plan(Protocol):
    """The entries of one optimizer that one backend works on."""

    def set_groups(self, groups: list[dict[str, Any]], scalars: list[tuple[float, ...]]) -> bool:
        """Takes new hyperparameters; False if a new plan is needed."""

    def refresh(self) -> bool:
        """Reads the gradients; False if something that the plan rests on has changed. Moves nothing."""

    def sum_of_squares(self, step: StepScalars) -> float | Tensor:
        """Of the gradients after stages 1 and 2."""

    def update(self, step: StepScalars) -> None:
        """Stages 1 to 6, and the clocks."""


class Backend(Protocol):
    name: str

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""

    def rejection(self, param: Tensor, states: list[Tensor]) -> str | None:
        """Why this backend cannot take this parameter with these state tensors, or None."""

    def make_plan(self, rule: str, entries: list[Entry], differentiable: bool) -> Plan: ...
