"""State dicts of plain torch and of older versions, as they are loaded."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import codes
from .hyperparameters import check_group, read_old_name
from .memory import is_dtensor
from .penalties import OF_STORAGE, OPTIONS, REGULARIZE_MIN_NDIM, ROUNDING_SEED, off, state_dtype_of
from .rules.spec import RuleSpec

if TYPE_CHECKING:
    from .optimizer import FusedRegOptimizer


# What param_groups says of a group's parameters: their names in the model, as torch has them, and their places in it.
NAMES, PLACES = "param_names", "param_places"


def regroup(state: dict[str, Any], own_groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A state dict whose parameters are grouped otherwise, as one of our own groups; None where that is not called for.

    Parameters are known by their names, where both sides have them, else by their places in the model, which those of
    one group are in the order of. A strength or decay that is saved for all of a model's parameters was not meant for
    those that our groups spare: our groups keep theirs.

    Raises:
        ValueError: a group of ours has parameters of several saved groups, which say different things.
    """
    saved = state["param_groups"]
    fits = [len(group["params"]) for group in saved] == [len(group["params"]) for group in own_groups]
    if fits and not all(PLACES in group for group in own_groups):
        return None  # torch goes by the order, whatever the names
    for keys_of in (_names,) if fits else (_names, _places):
        theirs, ours = keys_of(saved), keys_of(own_groups)
        if theirs is not None and ours is not None and theirs.keys() == ours.keys():
            break
    else:
        return None
    if fits and list(theirs) == list(ours):
        return None
    groups = []
    for group in own_groups:
        its = [theirs[key] for key, (owner, _) in ours.items() if owner is group]
        options = [_of_the_rule(owner) for owner, _ in its]
        if any(each != options[0] for each in options):
            raise ValueError(
                "Invalid state dict: a group of this optimizer has parameters of several saved groups, and these do "
                "not agree on its options (allowed: the groups as they were saved)"
            )
        kept = {key: value for key, value in group.items() if key in _not_of_the_rule()}
        groups.append({**options[0], **kept, "params": [param for _, param in its]} if its else {**group, "params": []})
    return {**state, "param_groups": groups}


def _names(groups: list[dict[str, Any]]) -> dict[Any, tuple[dict[str, Any], Any]] | None:
    """Each parameter's group, and what its group has it by, by its name; None where the groups do not say."""
    return _by_key(groups, [group.get(NAMES) for group in groups])


def _places(groups: list[dict[str, Any]]) -> dict[Any, tuple[dict[str, Any], Any]] | None:
    """Likewise by its place in the model."""
    if len(groups) == 1 and PLACES not in groups[0]:
        return _by_key(groups, [list(range(len(groups[0]["params"])))])
    found = _by_key(groups, [group.get(PLACES) for group in groups])
    return None if found is None or sorted(found) != list(range(len(found))) else found  # of several models


def _by_key(groups: list[dict[str, Any]], keys: list[list[Any] | None]) -> dict[Any, tuple[dict[str, Any], Any]] | None:
    found = {}
    for group, its_keys in zip(groups, keys, strict=True):
        if its_keys is None or len(its_keys) != len(group["params"]):
            return None
        found.update({key: (group, param) for key, param in zip(its_keys, group["params"], strict=True)})
    return found if len(found) == sum(len(group["params"]) for group in groups) else None


def _of_the_rule(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _not_of_the_rule()}


def _not_of_the_rule() -> set[str]:
    """The keys of a group that say which parameters are in it, how they are regularized, and how state is stored."""
    storage = {ROUNDING_SEED.name, *(option.name for option in OF_STORAGE)}
    return {"params", NAMES, PLACES, REGULARIZE_MIN_NDIM.name, *storage, *off()}


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
        is_own = i >= len(own_groups)  # as when a copy is made
        own = defaults if is_own else own_groups[i]
        for option in OPTIONS:
            group.setdefault(option.name, own.get(option.name, option.default))
        if not is_own:  # how much memory there is for state, a checkpoint cannot know
            group.update({option.name: own.get(option.name, option.default) for option in OF_STORAGE})
        if PLACES in own:  # facts of this optimizer's parameters, whatever a checkpoint says of its own
            group.update({key: own[key] for key in (NAMES, PLACES) if key in own})
        elif not is_own:
            group.pop(PLACES, None)
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


def restore_states(spec: RuleSpec, state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Gives states the values that they were saved with: torch has cast them to their parameters' dtypes.

    Tensor states where the group has a ``state_dtype`` or they come in 8 bits, and all scalar states but ``step``,
    which torch leaves alone. Where the twin has one too, float64 is what it goes on with.

    Raises:
        ValueError: states in 8 bits that are not whole, or are a process's own.
    """
    scalars = [scalar for scalar in spec.scalar_states if scalar.name != "step"]
    ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = [(param, state_dtype_of(group)) for group in state["param_groups"] for param in group["params"]]
    names = [tensor.name for tensor in spec.states]
    for key, (param, state_dtype) in zip(ids, params, strict=True):
        own = codes.as_loaded(saved["state"].get(key, {}), names)
        for tensor in spec.states:
            value = own.get(tensor.name)
            if isinstance(value, Tensor) and (state_dtype is not None or codes.are_codes(value)):
                now = state["state"][param]
                _restore_tensor(now, own, tensor.name, param, tensor.stored_as(state_dtype) or param.dtype)
        for scalar in scalars:
            value = own.get(scalar.name)
            if isinstance(value, Tensor) and not (scalar.is_step and param.dtype == torch.float64):
                dtype = value.dtype if scalar.is_step else torch.float64
                state["state"][param][scalar.name] = value.detach().to(param.device, dtype, copy=True)


def _restore_tensor(now: dict[str, Any], own: dict[str, Any], name: str, param: Tensor, dtype: torch.dtype) -> None:
    value = own[name]
    if not codes.are_codes(value):
        codes.put(now, name, value.detach().to(param.device, copy=True), param, dtype)
        return
    if is_dtensor(param) or value.shape != param.shape:
        raise ValueError(
            f"Invalid state dict: its {codes.codes_name(name)!r} is of shape {tuple(value.shape)}, the parameter "
            f"a {type(param).__name__} of {tuple(param.shape)} (allowed: a tensor of the same shape; save DTensors "
            "without native=True)"
        )
    now.pop(codes.codes_name(name), None)
    copies = {each: own[each].detach().to(param.device, copy=True) for each in (name, codes.scale_name(name))}
    now.update(copies)
    codes.put(now, name, copies[name], param, dtype)


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
    ours = {NAMES, PLACES, *(option.name for option in OPTIONS)}
    groups = [{key: value for key, value in group.items() if key not in ours} for group in optimizer.param_groups]
    known = inspect.signature(twin).parameters
    return twin(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})
