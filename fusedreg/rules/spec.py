"""What a rule is: one value that says all of it.

Constructors' docs, checks, state dicts, parity's cases and every suite follow from it. What the kernels know of a rule
stands in csrc/rules/NAME.h and backends/triton/rules/NAME.py; a test compares the names.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..penalties.spec import PENALTY_MODES, Group, Option, Scalar, on_gpu, strength


def always(group: Group) -> bool:
    return True


@dataclass(frozen=True)
class Hyperparameter:
    """A key of a param group that changes a step."""

    name: str
    fields: tuple[str, ...] | None = None
    """The names of its numbers in the kernels; None: one number, of the same name. () for a switch that decides only
    which states are needed."""
    is_on_host: bool = False
    """Whether the host must know it even if it is a tensor on a GPU: it moves a scalar state."""
    default: float = 0.0
    """Of the kernels' fields, for a rule whose groups do not have it."""
    option: Option | None = None
    """Its documentation, default and check, where no twin has them."""

    @property
    def field_names(self) -> tuple[str, ...]:
        return (self.name,) if self.fields is None else self.fields

    def read(self, group: Group) -> tuple[float | Tensor, ...]:
        """The numbers of a group, in the order of ``field_names``: floats, or tensors that only a GPU knows.

        Raises:
            ValueError: there are more or fewer.
        """
        if not self.field_names:
            return ()
        value = group.get(self.name, self.default)
        if self.fields is None:
            return (number(value, self.is_on_host),)
        values = value if isinstance(value, (tuple, list)) else (value,)
        if len(values) != len(self.fields):
            raise ValueError(f"Invalid {self.name} value: {value} (allowed: {len(self.fields)} numbers)")
        return tuple(number(each, self.is_on_host) for each in values)


def number(value: Any, is_on_host: bool = False) -> float | Tensor:
    """A hyperparameter as plans take it: a float, or the tensor itself where reading it would wait for a GPU."""
    if not isinstance(value, Tensor):
        return float(value)
    return (
        value if on_gpu(value) and not is_on_host else float(value.detach())
    )  # one that requires a gradient would warn


# What the kernels of every rule read, in the order of csrc/maths/hyperparameters.h; penalties and clip_value come next.
COMMON = (
    Hyperparameter("lr"),
    Hyperparameter("weight_decay"),
    Hyperparameter("maximize"),
    Hyperparameter("decoupled_weight_decay"),
)


# What torch has of its own rules, for a rule without a twin.
LR = strength("lr", "the learning rate.")
WEIGHT_DECAY = strength("weight_decay", "decay of the weights, beside the penalties. Default: 0.")


@dataclass(frozen=True)
class TensorState:
    """A tensor of the parameter's shape that a rule keeps for it."""

    name: str
    needed: Callable[[Group], bool] = always
    initial: Callable[[Group], float] = lambda group: 0.0
    codes: torch.dtype | None = None
    """What it is in 8 bits (codes.py): ``LINEAR`` where it has a sign, ``ROOTS`` where it is never negative.
    None: it is not allowed in them."""
    why_no_codes: str = "its rule does not say how"
    """Why not, for an error."""

    def stored_as(self, state_dtype: torch.dtype | None) -> torch.dtype | None:
        """Its own dtype under a group's ``state_dtype``."""
        return self.codes if state_dtype == torch.int8 else state_dtype


AsStored = Callable[[str, Scalar], Scalar]


def count_steps(scalars: Mapping[str, Scalar], group: Group, as_stored: AsStored) -> Scalar:
    return scalars["step"] + 1


@dataclass(frozen=True)
class ScalarState:
    """A number that a rule keeps for each parameter: a 0-dim tensor in its state."""

    name: str
    needed: Callable[[Group], bool] = always
    initial: Callable[[Group], float] = lambda group: 0.0
    next: Callable[[Mapping[str, Scalar], Group, AsStored], Scalar] = count_steps
    """``next(scalars, group, as_stored)``: its value after a step, from the scalar states before it.
    ``as_stored(name, number)`` rounds a number to what a scalar state is stored in; to the result that is done
    anyway."""
    accompanies: str | None = None
    """The tensor state that it tells of. Where that one begins, it begins, at 0; where that one is there already and
    this is not (out of a plain torch checkpoint), it is NaN: nobody counted."""
    is_step: bool = True
    """As torch has its step counts: float32, or the default dtype if that is float64, on the CPU unless the group is
    capturable or fused. Otherwise float64, and beside a parameter that is on a GPU: no step waits to read it."""
    is_beside: bool = False
    """Whether torch has it on its parameter's device, whatever the group says."""

    @property
    def counts_steps(self) -> bool:
        return self.next is count_steps


class Step(NamedTuple):
    """What the oracle's step of a rule returns."""

    w: Tensor
    state: dict[str, Tensor]
    tau: Scalar
    """The prox's step size; for an adaptive rule it is to be divided by the metric."""
    metric: Tensor | None = None
    """d, element by element, for an adaptive rule."""
    safeguard: Tensor | None = None
    """What the metric's floor is held against, where that is not the metric itself: d is scaled up as it would be."""
    finish: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda w, z: {}
    """``finish(w, z)``: states that go by the weight as the prox has left it; ``z`` is what the prox was given."""


class Scalars(NamedTuple):
    """The scalar states of a parameter, as they are stored: in float32, most of them."""

    before: Mapping[str, Scalar]
    """The step."""
    after: Mapping[str, Scalar]


OracleMetric = Callable[[Mapping[str, Tensor], Mapping[str, Scalar], Group], Tensor]
OracleStep = Callable[[Tensor, Tensor, Mapping[str, Tensor], Scalars, Group], Step]


@dataclass(frozen=True, eq=False)
class RuleSpec:
    """Everything that Python knows of a rule."""

    name: str
    step: OracleStep
    """``step(w, g, state, scalars, group)``: stage 5, straight from the paper's formulas, in plain PyTorch. It gets the
    states that the group's options need, as they were, and returns new ones."""
    states: tuple[TensorState, ...]
    scalar_states: tuple[ScalarState, ...] = ()
    metric: OracleMetric | None = None
    """``metric(state, scalars, group)``: d, element by element, from states and scalar states as a step has them when
    it takes its ``Step.metric`` from here. Target sparsity takes it from those that the step has left. None for a rule
    without one."""
    hyperparameters: tuple[Hyperparameter, ...] = ()
    """The rule's own, in the order of its header; those of ``COMMON`` are understood."""
    twin: type[torch.optim.Optimizer] | None = None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"plain": {}})
    """The options that every suite runs, by name. Together they need each state, and switch each switch."""
    modes: tuple[str, ...] = PENALTY_MODES
    """The penalty modes that the rule can be exact in, or that at least mean what they say; its default first."""
    why_not_others: str = ""
    """Why the rule has no other modes, for an error."""
    why_no_units: str = ""
    """Why the rule refuses penalties on units, for an error; empty where it takes them."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a group that change a step, and that the twin has or may have."""
        return tuple(each.name for each in (*COMMON, *self.hyperparameters))

    @property
    def options(self) -> tuple[Option, ...]:
        """The hyperparameters that no twin documents and checks."""
        own = tuple(each.option for each in self.hyperparameters if each.option is not None)
        return own if self.twin is not None else (LR, *own, WEIGHT_DECAY)

    def check_mode(self, mode: str) -> None:
        """Raises ValueError for a penalty mode that the rule does not have."""
        if mode not in self.modes:
            allowed = ", ".join(map(repr, self.modes))
            raise ValueError(f"Invalid penalty_mode value: {mode!r} (allowed: {allowed}; {self.why_not_others})")

    def needed_states(self, group: Group) -> tuple[str, ...]:
        """The names of the tensor states that the group's options need, in the rule's order."""
        return tuple(state.name for state in self.states if state.needed(group))

    def check_codes(self, group: Group) -> None:
        """Raises ValueError for a state that cannot be stored in 8 bits."""
        for state in self.states:
            if state.needed(group) and state.codes is None:
                raise ValueError(
                    f"Invalid state_dtype value: torch.int8 for the rule {self.name!r}, whose {state.name!r} cannot be "
                    f"in 8 bits (allowed: None or a floating point dtype; {state.why_no_codes})"
                )

    def needed_scalar_states(self, group: Group) -> tuple[str, ...]:
        return tuple(state.name for state in self.scalar_states if state.needed(group))

    def counts_first_step(self, group: Group) -> bool:
        """Whether a parameter's first step is another than those that follow: there is a momentum that begins."""
        return any(state.accompanies is not None and state.needed(group) for state in self.scalar_states)

    def next_scalars(
        self, scalars: Mapping[str, Scalar], group: Group, dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Scalar]:
        """The scalar states after a step, as they are read back from their dtypes."""

        def rounded(name: str, number: Scalar) -> Scalar:
            return as_stored(number, dtypes[name])

        after = {}
        for state in self.scalar_states:
            if state.needed(group):
                after[state.name] = rounded(state.name, state.next(scalars, group, rounded))
        return after


def as_stored(scalar: Scalar, dtype: torch.dtype) -> Scalar:
    if isinstance(scalar, Tensor):
        return scalar.to(dtype)
    return float(scalar) if dtype == torch.float64 else ctypes.c_float(scalar).value


def has_momentum(group: Group) -> bool:
    return group["momentum"] != 0


def next_momentum_gain(scalars: Mapping[str, Scalar], group: Group, as_stored: AsStored) -> Scalar:
    return momentum_gain(scalars["momentum_gain"], group["momentum"], group.get("dampening", 0.0))


def momentum_gain(before: Scalar, momentum: float, dampening: float = 0.0) -> Scalar:
    """s_t: what the momentum's recurrence, run on a constant 1, has come to after a step. See docs/formulas.md.

    ``before`` is s_(t-1): 0 before the first step, NaN where it was not counted, which takes the stationary gain.
    """
    if before == 0:
        return 1.0
    if before != before:
        return (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0
    return momentum * before + (1 - dampening) or math.ulp(0.0)  # 0 means that no step was taken yet
