"""What a rule is to the Triton kernels: what it does to an element, and what it needs to know for that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..scalars import RULE_FIELDS


@triton.jit
def count_steps(group, before, states_at):
    return (before[0] + 1,)


@triton.jit
def nothing_to_finish(w, z, state, constants, STATES: tl.constexpr):
    return state


class Rule(NamedTuple):
    """As RuleSpec and csrc/rules/NAME.h have it; a test compares the names."""

    step: Any
    """``step(w, g, state, constants, STATES)``, for an element, in the arithmetic dtype. Returns the moved weight, the
    new states, the metric d, and what the prox's floor is compared with: d, or what d would be where d may vanish at a
    solution. Both are 1 for a rule without a metric. ``state`` has an item for each state of the rule; those that are
    not in the mask STATES are not there in memory, and are returned as they came."""
    fill: Any
    """``fill(group, before, after)``, once for a scalar set: in float64, from the group's fields and the scalar states
    before the step and after it, ``step``'s constants and the prox's step size tau."""
    constants: int
    """How many numbers ``step`` takes as constants."""
    field_names: tuple[str, ...]
    """What ``fill`` reads of a group beside the common fields."""
    state_names: tuple[str, ...]
    scalar_state_names: tuple[str, ...]
    variants: tuple[int, ...]
    """The masks of states that it can be run with."""
    next_scalars: Any = count_steps
    """``next_scalars(group, before, states_at)``: the scalar states after a step. By default they are one step count.
    With ``states_at``, ``as_stored`` rounds a number to what a scalar state is stored in."""
    finish: Any = nothing_to_finish
    """``finish(w, z, state, constants, STATES)``, after the prox has made ``w`` of ``z``: the states, those that go by
    the weight moved."""
    metric: Any = None
    """``metric(state, constants, STATES)``: what ``step`` returns of its metric and of the floor, from the states that
    these are of; stage 7 calls it with those that the step has left. None for a rule without a metric."""

    @property
    def has_metric(self) -> bool:
        return self.metric is not None


def places(fields: tuple[str, ...]) -> Iterator[tl.constexpr]:
    """Where ``read`` finds a rule's own fields in a group, in their order."""
    return (tl.constexpr(RULE_FIELDS + i) for i in range(len(fields)))
