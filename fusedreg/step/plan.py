"""Who steps which parameter: the plans of a step, kept as long as what they rest on stays the same."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Entry, Plan
from ..hyperparameters import Hyperparameters, check_complex
from ..rules.spec import RuleSpec
from .checks import check_gradient, check_states, parameters_that_share_memory
from .created import Created

Groups = list[dict[str, Any]]


class Plans:
    """The plans of an optimizer, and what they rest on."""

    def __init__(self, plans: list[Plan], groups: Groups, state: dict[Any, Any], demands: list[Any]) -> None:
        self.plans = plans
        self._state = state
        self._params = [list(group["params"]) for group in groups]
        self._demands = demands

    def follow(self, groups: Groups, state: dict[Any, Any], hyperparameters: Hyperparameters, changed: bool) -> bool:
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
            for plan in self.plans:
                plan.set_groups(groups, hyperparameters.numbers)
        return all([plan.refresh() for plan in self.plans])


def make_plans(
    optimizer: str,
    spec: RuleSpec,
    groups: Groups,
    state: dict[Any, Any],
    hyperparameters: Hyperparameters,
    created: Created,
    *,
    backend: str,
    differentiable: bool,
    scalars_on_device: bool,
) -> Plans:
    """Checks everything, and only then creates state.

    Args:
        optimizer: the name of its class, for errors.
    """
    chosen = _choose_backends(optimizer, spec, groups, state, backend, differentiable)
    # Below, only memory can run out, or a signal come.
    entries: dict[tuple[str, torch.device], list[Entry]] = {}
    watched: list[Entry] = []
    for index, group in enumerate(groups):
        for param in group["params"]:
            if param in chosen:
                entry = Entry(param, index, *created.state_of(param, group, scalars_on_device))
                entries.setdefault((chosen[param], param.device), []).append(entry)
            else:
                watched.append(Entry(param, index, None))
    for entry in watched:
        # By a fast backend, which looks fastest whether a gradient has come; one of the same device, if there is.
        same_device = [key for key in entries if key[1] == entry.param.device]
        key = next(iter(same_device), ("reference", entry.param.device))
        entries.setdefault(key, []).append(entry)
    plans = [
        backends.BACKENDS[name].make_plan(spec, some, differentiable, state) for (name, _), some in entries.items()
    ]
    for plan in plans:
        plan.set_groups(groups, hyperparameters.numbers)
        if not plan.refresh():
            raise RuntimeError("fusedreg made a plan that does not fit its own optimizer; please report this")
    return Plans(plans, groups, state, hyperparameters.demands)


def _choose_backends(
    optimizer: str, spec: RuleSpec, groups: Groups, state: dict[Any, Any], backend: str, differentiable: bool
) -> dict[Tensor, str]:
    """The name of the backend of every parameter that has a gradient."""
    chosen: dict[Tensor, str] = {}
    for group in groups:
        check_complex(group)
        needed, scalars = spec.needed_states(group), spec.needed_scalar_states(group)
        for param in group["params"]:
            if param.grad is None:
                continue
            check_gradient(param, optimizer)
            own = state.get(param, {})
            states = [own[name] for name in needed if own.get(name) is not None]
            check_states(param, states, [own[name] for name in scalars if isinstance(own.get(name), Tensor)])
            chosen[param] = backends.choose(backend, spec, param, states, differentiable).name
    for pair in parameters_that_share_memory([param for param, name in chosen.items() if name != "reference"]):
        # They are updated one after the other, as torch does, not side by side.
        if backend != "auto":
            raise RuntimeError(
                f"backend {backend!r} cannot run: two parameters share memory, of shapes "
                f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
            )
        backends.log_once("parameters that share memory are stepped one by one, by backend 'reference'")
        chosen.update(dict.fromkeys(pair, "reference"))
    return chosen
