"""State dicts of plain torch and of older versions, as they are loaded."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import check_group, read_old_name
from .penalties import OPTIONS
from .rules.spec import RuleSpec


def bring_up_to_date(
    spec: RuleSpec, state: dict[str, Any], own_groups: list[dict[str, Any]], defaults: dict[str, Any]
) -> None:
    """Gives the groups that are being loaded the keys that they lack, and scalars their present place.

    Groups out of a plain torch checkpoint keep the strengths that this optimizer was made with.

    Raises:
        ValueError: an option that is not allowed.
    """
    groups = state.get("param_groups", [])
    for i, group in enumerate(groups):
        read_old_name(group)
        own = own_groups[i] if i < len(own_groups) else defaults
        for option in OPTIONS:
            group.setdefault(option.name, own.get(option.name, option.default))
    for group in groups:
        check_group(spec, group)
    for group in groups:
        _spread_momentum_gains(group, state.get("state", {}))


def _spread_momentum_gains(group: dict[str, Any], state: dict[Any, Any]) -> None:
    """A momentum's gain was one tensor in its group, with a number for each parameter, before it stood in the state."""
    gains = group.pop("momentum_gain", None)
    if isinstance(gains, Tensor) and len(gains) == len(group["params"]):
        for param, gain in zip(group["params"], gains.double(), strict=True):
            if param in state and gain != 0:
                state[param].setdefault("momentum_gain", gain.detach().clone())


def restore_scalar_states(spec: RuleSpec, state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Gives scalar states the values that they were saved with: torch has cast them to their parameters' dtypes.

    All but ``step``, which it leaves alone. Where the twin has one too, float64 is what it goes on with.
    """
    scalars = [scalar for scalar in spec.scalar_states if scalar.name != "step"]
    ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = itertools.chain.from_iterable(group["params"] for group in state["param_groups"])
    for key, param in zip(ids, params, strict=True):
        own = saved["state"].get(key, {})
        for scalar in scalars:
            value = own.get(scalar.name)
            if isinstance(value, Tensor) and not (scalar.is_step and param.dtype == torch.float64):
                dtype = torch.float32 if scalar.is_step else torch.float64
                state["state"][param][scalar.name] = value.detach().to(param.device, dtype, copy=True)
