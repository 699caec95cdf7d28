"""Who steps which parameter: the plans of a step, kept as long as what they rest on stays the same."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import Entry, Plan, StepScalars
from ..codes import are_codes, check_codes, scale_name
from ..hyperparameters import Hyperparameters, check_params
from ..memory import is_dtensor, needs_reading, read_gradient
from ..penalties import MAX_GRAD_NORM, STOCHASTIC_ROUNDING, has_units, state_dtype_of
from ..rounding import are_rounded, place_of
from ..rules.spec import RuleSpec
from .checks import (
    check_codes_of,
    check_gradient,
    check_rounding,
    check_states,
    check_units,
    parameters_that_share_a_scalar,
    parameters_that_share_memory,
)
from .created import Created
from .partition import Partition, SumOverProcesses, check_norm_is_whole, partition_of

Groups = list[dict[str, Any]]


class Gradients(dict[int, "Tensor | None"]):
    """The gradients of a step that are not read from ``param.grad`` by the plans, by the parameter's ``id``.

    Each is read once a step, in the order of the groups: reading may be a collective, and ranks must agree on those.
    """

    def read(self, params: list[Tensor]) -> None:
        for param in params:
            if id(param) not in self:
                self[id(param)] = read_gradient(param)


class Part(NamedTuple):
    """A plan, and what it does not know of its parameters."""

    plan: Plan
    partition: Partition | None
    read: list[int] | None
    """The parameters' keys in ``Gradients``, where the plan may have to be given those."""

    def refresh(self, gradients: Gradients) -> bool:
        return self.plan.refresh() if self.read is None else self.plan.refresh([gradients[key] for key in self.read])

    def refresh_as_it_is(self) -> bool:
        """False where gradients must be read first, or something has changed."""
        return (self.read is None or self.partition is not None) and self.plan.refresh()


class Plans:
    """The plans of an optimizer, and what they rest on."""

    def __init__(self, parts: list[Part], groups: Groups, state: dict[Any, Any], demands: list[Any]) -> None:
        self.parts = parts
        self.plans = [part.plan for part in parts]
        self.some_on_device = any(plan.stays_on_device for plan in self.plans)
        self.all_on_device = all(plan.stays_on_device for plan in self.plans)
        self.over_processes: SumOverProcesses | None = None
        has_norm = any(group[MAX_GRAD_NORM.name] is not None for group in groups)
        self.plain_step = None if has_norm or self.some_on_device else StepScalars()
        """What a step that a watch has seen nothing new in takes, where there is no more to prepare."""
        self.watch: Any = None
        """From a step's end to the next: of what it rests on in Python."""
        self._state = state
        self._params = [list(group["params"]) for group in groups]
        read = {key for part in parts for key in part.read or ()}
        self._read = [param for params in self._params for param in params if id(param) in read]
        self._demands = demands

    @property
    def can_be_watched(self) -> bool:
        """Whether a step reads no gradient but by its plans, and waits for no other process."""
        return self.over_processes is None and all(part.read is None for part in self.parts)

    def set_groups(self, groups: Groups, hyperparameters: Hyperparameters) -> None:
        groups, numbers = hyperparameters.as_read(groups), hyperparameters.numbers
        for plan in self.plans:
            plan.set_groups(groups, numbers)

    def follow(
        self,
        groups: Groups,
        state: dict[Any, Any],
        hyperparameters: Hyperparameters,
        changed: bool,
        gradients: Gradients,
    ) -> bool:
        """Takes this step's hyperparameters and gradients; False if new plans are needed. Moves nothing."""
        if state is not self._state or len(groups) != len(self._params):
            return False
        for ours, group in zip(self._params, groups):  # noqa: B905 (in every step; of one length)
            params = group["params"]
            if len(ours) != len(params) or not all(map(operator.is_, ours, params)):
                return False
        if changed:
            if hyperparameters.demands != self._demands:
                return False
            self.set_groups(groups, hyperparameters)
        # A list: whether there is a collective to come must not depend on the order of the parts.
        others = [part for part in self.parts if not part.refresh_as_it_is()]
        if not others:
            return True
        gradients.read(self._read)
        return all([part.read is not None and part.refresh(gradients) for part in others])


def make_plans(
    optimizer: str,
    spec: RuleSpec,
    groups: Groups,
    state: dict[Any, Any],
    hyperparameters: Hyperparameters,
    created: Created,
    gradients: Gradients,
    *,
    backend: str,
    differentiable: bool,
    scalars_on_device: bool,
    norm_group: Any,
) -> Plans:
    """Checks everything, and only then creates state.

    Args:
        optimizer: the name of its class, for errors.
        gradients: what was read of this step's gradients; the others are read into it.
        norm_group: the ``ProcessGroup`` whose ranks hold different parameters, or None.
    """
    params = [param for group in groups for param in group["params"]]
    numbers = {param: number for number, param in enumerate(params)}
    if differentiable:
        if any(map(is_dtensor, params)):
            raise RuntimeError("differentiable=True does not work on DTensors (allowed: differentiable=False)")
    else:
        gradients.read([param for param in params if needs_reading(param)])
    partitions = {param: partition_of(param) for param in params}
    max_grad_norm = groups[0][MAX_GRAD_NORM.name] if groups else None
    if max_grad_norm is not None:
        check_norm_is_whole(optimizer, groups, state, norm_group)
    chosen = _choose_backends(optimizer, spec, groups, state, gradients, backend, differentiable)
    # Below, only memory can run out, or a signal come.
    entries: dict[tuple[str, torch.device, Partition | None, bool], list[Entry]] = {}
    watched: list[Entry] = []
    for index, group in enumerate(groups):
        for param in group["params"]:
            if param in chosen:
                entry = Entry(param, index, *created.state_of(param, group, scalars_on_device))
                if group[STOCHASTIC_ROUNDING.name] and are_rounded(_dtypes(param, entry.states)):
                    entry.rounding = place_of(param, numbers[param])
                key = (chosen[param], param.device, partitions[param], id(param) in gradients)
                entries.setdefault(key, []).append(entry)
            else:
                watched.append(Entry(param, index, None))
    created.copy_moved()
    for entry in watched:
        # By a fast backend, which looks fastest whether a gradient has come; one of the same kind, if there is.
        kind = (entry.param.device, partitions[entry.param] is None, id(entry.param) in gradients)
        alike = [key for key in entries if (key[1], key[2] is None, key[3]) == kind]
        key = next(iter(alike), ("reference", kind[0], partitions[entry.param], kind[2]))
        entries.setdefault(key, []).append(entry)
    parts = []
    for (name, _, partition, is_read), some in entries.items():
        plan = backends.BACKENDS[name].make_plan(spec, some, differentiable, state)
        plan.set_groups(hyperparameters.as_read(groups), hyperparameters.numbers)
        part = Part(plan, partition, [id(entry.param) for entry in some] if is_read else None)
        if not part.refresh(gradients):
            raise RuntimeError("fusedreg made a plan that does not fit its own optimizer; please report this")
        parts.append(part)
    plans = Plans(parts, groups, state, hyperparameters.demands)
    if max_grad_norm is not None:
        over_processes = SumOverProcesses(partitions.values(), norm_group)
        plans.over_processes = over_processes if over_processes.is_needed else None
    return plans


def _dtypes(param: Tensor, states: Iterable[Tensor | None]) -> set[torch.dtype]:
    return {param.dtype, *(state.dtype for state in states if state is not None)}


def _choose_backends(
    optimizer: str,
    spec: RuleSpec,
    groups: Groups,
    state: dict[Any, Any],
    gradients: Gradients,
    backend: str,
    differentiable: bool,
) -> dict[Tensor, str]:
    """The name of the backend of every parameter that has a gradient."""
    chosen: dict[Tensor, str] = {}
    scalar_states: list[tuple[Tensor, Tensor]] = []
    for index, group in enumerate(groups):
        check_params(spec, group)
        if with_units := has_units(group):
            check_units(group["params"], group["unit"])
            if differentiable:
                raise RuntimeError("differentiable=True does not work with group_l1 and max_unit_norm")
        state_dtype = state_dtype_of(group)
        if differentiable and state_dtype == torch.int8:
            raise RuntimeError("differentiable=True does not work with state_dtype=torch.int8")
        needed, scalars = spec.needed_states(group), spec.needed_scalar_states(group)
        for param in group["params"]:
            grad = gradients.get(id(param), param.grad)
            if grad is None:
                continue
            if param in chosen and spec.counts_first_step(group):
                raise ValueError(
                    f"Invalid params: one of shape {tuple(param.shape)} is listed twice, and its momentum would begin "
                    "twice (allowed: each parameter once)"
                )
            check_gradient(param, grad, optimizer, group.get("param_group", index))
            own = state.get(param, {})
            states = [own[name] for name in needed if own.get(name) is not None]
            new_dtype = state_dtype if needed else None  # which all of them come to have
            its_scalars = [own[name] for name in scalars if isinstance(own.get(name), Tensor)]
            check_states(param, states, its_scalars)
            if new_dtype == torch.int8:
                check_codes_of(param)
            for name in needed:
                if are_codes(own.get(name)):
                    check_codes(name, own[name], own.get(scale_name(name)))
            dtypes = _dtypes(param, states) if new_dtype is None else {param.dtype, new_dtype}
            if group[STOCHASTIC_ROUNDING.name]:
                check_rounding(param, dtypes, differentiable)
            with_rounding = group[STOCHASTIC_ROUNDING.name] and are_rounded(dtypes)
            its_backend = backends.choose(
                backend, spec, param, states, differentiable, with_units, with_rounding, new_dtype, grad.dtype
            )
            chosen[param] = its_backend.name
            if chosen[param] not in ("cpp", "reference"):  # those go one by one
                scalar_states += [(param, scalar) for scalar in its_scalars]
    listed = [param for group in groups for param in group["params"]]  # twice, some
    not_slow = [param for param in listed if chosen.get(param, "reference") != "reference"]
    # They are updated one after the other, as torch does, and a step count of two of them moves twice.
    shared = [("memory", parameters_that_share_memory(not_slow))]
    shared.append(("a scalar state, as a step count", parameters_that_share_a_scalar(scalar_states)))
    for what, pairs in shared:
        for first, second in pairs:
            if backend != "auto":
                raise RuntimeError(
                    f"backend {backend!r} cannot run: two parameters share {what}, of shapes "
                    f"{tuple(first.shape)} and {tuple(second.shape)} (allowed: a tensor for each)"
                )
            backends.log_once(f"parameters that share {what} are stepped one by one, by backend 'reference'")
            chosen.update(dict.fromkeys((first, second), "reference"))
    return chosen
