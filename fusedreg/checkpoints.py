"""State dicts of plain torch and of older versions, as they are loaded."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .hyperparameters import check_group, read_old_name
from .penalties import OPTIONS
from .rules.spec import RuleSpec

if TYPE_CHECKING:
    from .optimizer import FusedRegOptimizer


def bring_up_to_date(
    spec: RuleSpec, state: dict[str, Any], own_groups: list[dict[str, Any]], defaults: dict[str, Any]
) -> None:
    """Gives the groups that are being loaded the keys that they lack, and scalars their present place.

    Groups out of a plain torch checkpoint keep the strengths that this optimizer was made with.

    Raises:
        ValueError: an option that is not allowed, or a group without any.
    """
    groups = state.get("param_groups", [])
    for i, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(
                f"Invalid state dict: group {i} has no 'lr'. torch gives what a saved group says to one group that "
                "loads it, and this optimizer has split one (allowed: the groups as they were saved, or "
                "StateDictOptions(flatten_optimizer_state_dict=True), which saves each parameter's)"
            )
        read_old_name(group)
        own = own_groups[i] if i < len(own_groups) else defaults
        for option in OPTIONS:
            group.setdefault(option.name, own.get(option.name, option.default))
    for group in groups:
        check_group(spec, group)
    for group in groups:
        _spread_momentum_gains(group, state.get("state", {}))
    names = [*(each.name for each in spec.states), *(each.name for each in spec.scalar_states)]
    for own in state.get("state", {}).values():
        for name in names:
            if isinstance(own, dict) and own.get(name) == {}:
                del own[name]  # how torch reads a state out of a flat dict that has none


def _spread_momentum_gains(group: dict[str, Any], state: dict[Any, Any]) -> None:
    """A momentum's gain was one tensor in its group, with a number for each parameter, before it stood in the state."""
    gains = group.pop("momentum_gain", None)
    if isinstance(gains, Tensor) and len(gains) == len(group["params"]):
        for param, gain in zip(group["params"], gains.double(), strict=True):
            if param in state and gain != 0:
                state[param].setdefault("momentum_gain", gain.detach().clone())


def restore_scalar_states(spec: RuleSpec, state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Gives scalar states the values and dtypes that they were saved with: torch has cast them to their parameters'."""
    scalars = [scalar for scalar in spec.scalar_states if scalar.name != "step"]  # which torch leaves alone
    ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = itertools.chain.from_iterable(group["params"] for group in state["param_groups"])
    for key, param in zip(ids, params, strict=True):
        own = saved["state"].get(key, {})
        for scalar in scalars:
            value = own.get(scalar.name)
            if isinstance(value, Tensor):
                dtype = value.dtype if scalar.is_step else torch.float64
                state["state"][param][scalar.name] = value.detach().to(param.device, dtype, copy=True)


def torch_twin(optimizer: FusedRegOptimizer) -> torch.optim.Optimizer:
    """A ``torch.optim`` optimizer over the same parameters, with the same groups and options, and without our keys.

    It reads what plain torch wrote where torch itself cannot read it into ours: ``torch.distributed.checkpoint`` and
    flat state dicts ask the checkpoint for every key of the optimizer that loads. It has no state of its own.

    Raises:
        ValueError: the rule has no twin in ``torch.optim``.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = fusedreg.FusedRegAdamW(model.parameters(), l1=1e-4)
        >>> reader = fusedreg.torch_twin(optimizer)
        >>> # torch's own calls load the checkpoint into `reader`; then
        >>> optimizer.load_state_dict(reader.state_dict())
    """
    twin = optimizer.spec.twin
    if twin is None:
        raise ValueError(f"{type(optimizer).__name__} has no twin in torch.optim")
    ours = {option.name for option in OPTIONS}
    groups = [{key: value for key, value in group.items() if key not in ours} for group in optimizer.param_groups]
    known = inspect.signature(twin).parameters
    return twin(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})
