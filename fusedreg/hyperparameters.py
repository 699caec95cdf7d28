"""A param group's hyperparameters: checked, read as numbers, and watched for changes."""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flat_parameters import is_flat
from .penalties import (
    MAX_GRAD_NORM,
    OF_STORAGE,
    OPTIONS,
    PENALTIES,
    REGULARIZE_MIN_NDIM,
    ROUNDING_SEED,
    STATE_DTYPE,
    STOCHASTIC_ROUNDING,
    UNIT_PENALTIES,
    check_together,
    compiled_fields,
    has_units,
    off,
    on_gpu,
    state_dtype_of,
)
from .rules.spec import COMMON, Hyperparameter, RuleSpec, number

LR_KEY = COMMON[0].name

FOLLOWED = (LR_KEY, "momentum", "betas", "weight_decay")
"""What schedulers change before every step. Whether a penalty is on rests on none of them."""

OLD_NAME = "l1_mode"


Numbers = list[list["float | Tensor"]]
"""Those of each group, in the order of ``compiled_field_names``: floats, or tensors that only a GPU knows."""


def read_old_name(group: dict[str, Any]) -> None:
    """Gives ``penalty_mode`` its present name where ``l1_mode``, its first one, is in a group, with a warning."""
    if OLD_NAME in group:
        message = f"{OLD_NAME!r} is now called 'penalty_mode'; the old name will not be read after 0.1.0"
        warnings.warn(message, DeprecationWarning, stacklevel=5)  # whoever calls an optimizer's constructor
        group["penalty_mode"] = group.pop(OLD_NAME)


class Split(NamedTuple):
    """A group's parameters, and those that it spares."""

    params: list[Tensor]
    least: int
    large: dict[str, Any]
    """``params``, and ``param_names`` where there are any."""
    small: dict[str, Any]

    def is_of(self, group: dict[str, Any]) -> bool:
        params = group["params"]
        return (
            self.least == group.get(REGULARIZE_MIN_NDIM.name, 0)
            and len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
        )


def _split(group: dict[str, Any]) -> Split:
    key = REGULARIZE_MIN_NDIM.name
    least = group.get(key, 0)
    REGULARIZE_MIN_NDIM.check(least)
    if least and any(map(is_flat, group["params"])):
        raise ValueError(
            f"Invalid {key} value: {least} for parameters of FullyShardedDataParallel, which are flat (allowed: 0, "
            "and fusedreg.param_groups(model))"
        )
    is_large = [param.ndim >= least for param in group["params"]]
    is_small = [not each for each in is_large]
    lists: list[str] = [each for each in ("params", "param_names") if each in group]
    large, small = (
        {each: list(itertools.compress(group[each], chosen)) for each in lists} for chosen in (is_large, is_small)
    )
    return Split(list(group["params"]), least, large, small)


def spare_small(groups: list[dict[str, Any]], splits: dict[int, Split] | None = None) -> list[dict[str, Any]]:
    """The groups as ``regularize_min_ndim`` means them: parameters that it spares are in groups of their own, behind
    all others, in which nothing regularizes. The groups themselves, where it spares none.

    Args:
        splits: what earlier calls found, by the place of a group; it is renewed, and is to be forgotten where a
            parameter may have got another shape.

    Raises:
        ValueError: it is not allowed, or asked of parameters of FSDP1, whose dimensions are gone.
    """
    if not any(group.get(REGULARIZE_MIN_NDIM.name) for group in groups):
        return groups
    splits = {} if splits is None else splits
    large, small = [], []
    for index, group in enumerate(groups):
        split = splits.get(index)
        if split is None or not split.is_of(group):
            split = splits[index] = _split(group)
        if not split.small["params"]:
            large.append(group)
            continue
        large.append({**group, **split.large})
        small.append({**group, **off(), **split.small, "param_group": index})
    return large + small


def warn_if_nothing_is_left(groups: list[dict[str, Any]], read: list[dict[str, Any]]) -> None:
    """Warns where ``regularize_min_ndim`` spares all parameters that a strength is meant for, as flattened ones are.

    Args:
        read: what ``spare_small`` made of the groups.
    """
    on = [i for i, group in enumerate(groups) if any(group.get(key, value) != value for key, value in off().items())]
    if len(read) > len(groups) and on and not any(read[i]["params"] for i in on):
        least = max(groups[i][REGULARIZE_MIN_NDIM.name] for i in on)
        message = f"every strength acts on nothing: {REGULARIZE_MIN_NDIM.name}={least} spares all parameters"
        warnings.warn(message, stacklevel=5)  # whoever calls step()


def check_group(spec: RuleSpec, group: dict[str, Any]) -> None:
    """Raises ValueError if an option in ``group``, ours or the rule's own, has a value that is not allowed."""
    for option in (*OPTIONS, *spec.options):
        if option.name in group:
            option.check(group[option.name])
    if "penalty_mode" in group:
        spec.check_mode(group["penalty_mode"])
    check_together(group)
    for penalty in UNIT_PENALTIES if spec.why_no_units else ():
        if penalty.is_on(group):
            raise ValueError(
                f"Invalid {penalty.name} value: {group[penalty.name]} for the rule {spec.name!r} (allowed: "
                f"{penalty.option.default:g}; {spec.why_no_units})"
            )


def check_params(spec: RuleSpec, group: dict[str, Any]) -> None:
    """Raises ValueError if an option does not go with the dtype of a parameter: a penalty that is defined on real ones
    alone meets complex ones, states would be stored in digits that no step computes, or float16 would not be rounded as
    asked. Or with how state is stored: a rule may have one that 8 bits are too few for."""
    if state_dtype_of(group) == torch.int8:
        spec.check_codes(group)
        for name in ("differentiable", "capturable"):
            if group.get(name):
                raise ValueError(f"Invalid {name} value: True with {STATE_DTYPE.name}=torch.int8 (allowed: False)")
    if group[STOCHASTIC_ROUNDING.name] and group[STATE_DTYPE.name] == torch.float16:
        raise ValueError(
            f"Invalid {STOCHASTIC_ROUNDING.name} value: True with {STATE_DTYPE.name}=torch.float16 (allowed: False, or "
            "another dtype; it rounds to bfloat16)"
        )
    if group[STOCHASTIC_ROUNDING.name] and any(each.dtype == torch.float16 for each in group["params"]):
        raise ValueError(
            f"Invalid {STOCHASTIC_ROUNDING.name} value: True for a group with torch.float16 parameters (allowed: "
            "False; it rounds to bfloat16)"
        )
    if (state_dtype := state_dtype_of(group)) is not None:
        for dtype in {each.dtype for each in group["params"]}:
            if dtype.is_complex or (state_dtype == torch.float64 and dtype != torch.float64):
                narrow = "None, torch.bfloat16, torch.float16, torch.float32 or 'int8'"
                raise ValueError(
                    f"Invalid {STATE_DTYPE.name} value: {state_dtype} for a group with {dtype} parameters (allowed: "
                    f"{'None' if dtype.is_complex else narrow}{'' if dtype.is_complex else '; steps are in float32'})"
                )
    for penalty in (*PENALTIES, *UNIT_PENALTIES):
        if not penalty.takes_complex and penalty.is_on(group) and any(each.is_complex() for each in group["params"]):
            raise ValueError(
                f"Invalid {penalty.name} value: {group[penalty.name]} for a group with complex parameters "
                f"(allowed: {penalty.option.default:g})"
            )


def check_one_max_grad_norm(groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if the groups do not agree on ``max_grad_norm``: the norm is over all of them."""
    if not groups:
        return
    first = groups[0][MAX_GRAD_NORM.name]
    for group in groups[1:]:
        value = group[MAX_GRAD_NORM.name]
        if value is first or (on_gpu(value) and on_gpu(first)):
            continue
        if on_gpu(value) or on_gpu(first) or value != first:
            raise ValueError(
                f"Invalid max_grad_norm values: {first} and {value} "
                "(allowed: the same in every group, the norm is over all parameters of the optimizer)"
            )


@functools.cache
def compiled_field_names(spec: RuleSpec) -> list[str]:
    """The names of the numbers that a kernel of this rule reads of a group, in the order of ``Group<Rule>`` in csrc."""
    defaults = {option.name: option.default for option in OPTIONS}
    own = (name for hyperparameter in spec.hyperparameters for name in hyperparameter.field_names)
    return [*(each.name for each in COMMON), *compiled_fields(defaults), *own]


def read_numbers(spec: RuleSpec, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
    """A group's numbers, in the order of ``compiled_field_names``: floats, or tensors that only a GPU knows."""
    return (
        *(value for hyperparameter in COMMON for value in hyperparameter.read(group)),
        *map(number, compiled_fields(group).values()),
        *(value for hyperparameter in spec.hyperparameters for value in hyperparameter.read(group)),
    )


class Hyperparameters:
    """The hyperparameters of all groups as a step last read them."""

    def __init__(self, spec: RuleSpec, defaults: dict[str, Any]) -> None:
        self._spec = spec
        own = {each.name: each for each in (*COMMON, *spec.hyperparameters) if each.name in defaults}
        names = compiled_field_names(spec)
        # A subclass may read other numbers than the group has.
        can_be_followed = [key for key in FOLLOWED if key in own and type(own[key]) is Hyperparameter]
        self._followed = {key: (i, names.index(own[key].field_names[0])) for i, key in enumerate(can_be_followed)}
        """The first keys, and their places in what is read and in the numbers."""
        keys = (
            *self._followed,
            *(key for key in own if key not in self._followed),
            *(each.name for each in OPTIONS if each is not ROUNDING_SEED),
        )
        # What a group says to a rule that does not know it, nobody reads: Rprop has no weight_decay.
        self._unknown = {each.name for each in COMMON if each.name not in defaults}
        self._read: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter(*keys)
        self._checks = {option.name: option.check for option in spec.options}
        self._raw: list[list[Any]] | None = None
        self.is_constant = False
        """Whether none of what was read can be written in place."""
        self._has_tensors = False
        self.numbers: Numbers = []
        self.demands: list[Any] = []
        """What a plan must have been made for, group by group: the states needed, the penalties that are on, whether
        there is a norm, how state is stored."""

    def as_read(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups without keys that mean nothing to the rule."""
        if not self._unknown or all(self._unknown.isdisjoint(group) for group in groups):
            return groups
        return [{key: value for key, value in group.items() if key not in self._unknown} for group in groups]

    def forget(self) -> None:
        """The next ``refresh`` checks and reads everything."""
        self._raw = None

    def refresh(self, groups: list[dict[str, Any]]) -> bool:
        """Checks the groups and reads them; False if they are as they were.

        Raises:
            ValueError: a value that is not allowed.
        """
        for group in groups:
            if OLD_NAME in group:
                read_old_name(group)
        raw = [list(self._read(group)) for group in groups]
        # The very objects of the last step, none of which can be written in place: the most common case by far.
        if (
            self.is_constant
            and self._raw is not None
            and len(raw) == len(self._raw)
            and all(map(_same_objects, raw, self._raw))
        ):
            return False
        if self._is_followed(raw) and self.follow(groups):
            return True
        has_tensors = any(isinstance(value, Tensor) for value in _flatten(raw))  # equal to a number that it rounds to
        if self._raw is not None and not has_tensors and not self._has_tensors and raw == self._raw:
            return False
        self._raw = None
        for group in groups:
            check_group(self._spec, group)
        check_one_max_grad_norm(groups)
        self.numbers = [list(read_numbers(self._spec, group)) for group in self.as_read(groups)]
        self.demands = [
            (
                *self._needed(group),
                tuple(penalty.is_on(group) for penalty in (*PENALTIES, *UNIT_PENALTIES)),
                group["unit"] if has_units(group) else None,
                group[MAX_GRAD_NORM.name] is not None,
                *(group[option.name] for option in OF_STORAGE),
            )
            for group in groups
        ]
        self._has_tensors = has_tensors
        self.is_constant = all(_is_constant(value) for group in raw for value in group)
        # lists copied: they can be written in place
        self._raw = [[list(value) if isinstance(value, list) else value for value in group] for group in raw]
        return True

    def _is_followed(self, raw: list[list[Any]]) -> bool:
        """Whether, under keys that are followed, floats have come in the place of floats, and nothing else is new."""
        if not self.is_constant or self._raw is None or len(raw) != len(self._raw):
            return False
        count = len(self._followed)
        return all(
            _same_objects(now[count:], before[count:]) and all(map(_are_floats_alike, now[:count], before[:count]))
            for now, before in zip(raw, self._raw, strict=True)
        )

    def follow(self, groups: list[dict[str, Any]]) -> bool:
        """Takes other floats under keys that are followed, and checks and reads nothing else: the caller knows that
        nothing else is new. False, and nothing is taken, where they need other states.

        Raises:
            ValueError: a value that is not allowed.
        """
        followed, raws = self._followed, self._raw
        assert raws is not None
        new: list[tuple[int, str, Any]] = []
        for index, group in enumerate(groups):
            for key, before in zip(followed, raws[index]):  # noqa: B905 (in every step; the followed come first)
                value = group[key]
                if value is not before:
                    if key in self._checks:
                        self._checks[key](value)
                    if key != LR_KEY and self.demands[index][:2] != self._needed(group):
                        return False
                    new.append((index, key, value))
        for index, key, value in new:
            numbers, (i, place) = self.numbers[index], followed[key]
            if isinstance(value, tuple):
                numbers[place : place + len(value)] = value
            else:
                numbers[place] = value
            raws[index][i] = value  # last: where a signal comes between, the next step finds it new again
        return True

    def _needed(self, group: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._spec.needed_states(group), self._spec.needed_scalar_states(group)


def _same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _are_floats_alike(now: Any, before: Any) -> bool:
    """Whether two values are the same object, two floats, or tuples of as many floats."""
    if type(now) is type(before) is tuple:
        return len(now) == len(before) and all(map(_are_floats_alike, now, before))
    return now is before or type(now) is type(before) is float


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (float, int, str, torch.dtype))


def _flatten(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flatten(value)
        else:
            yield value
