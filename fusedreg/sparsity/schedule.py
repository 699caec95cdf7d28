"""Target sparsity: as many zeros as asked for, on the cubic schedule of gradual pruning, in the optimizer's metric."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..hyperparameters import spare_small
from ..optimizer import FusedRegOptimizer
from ..penalties import as_python
from .selection import zero_smallest, zero_smallest_units
from .units import Unit, units_in
from .weights import Weights, weights_of

Target = tuple[float, Unit | None]


def _target(group: dict[str, Any]) -> Target | None:
    return None if group["sparsity"] is None else (float(group["sparsity"]), group["sparsity_unit"])


class SparsitySchedule:
    """Brings every group that has a ``sparsity`` to that share of exact zeros, as training goes on.

    Every ``every`` steps between ``begin`` and ``end``, the weights with the smallest ``sqrt(d) * |w|`` become zero, d
    being the optimizer's own metric (Adam's ``sqrt(v_hat) + eps``), or with the smallest ``|w|`` where the rule has
    none: as many as ``sparsity * (1 - (1 - t)^3)`` of them, for t from 0 to 1. That is the proximal step of the l0
    penalty in that metric, its strength chosen so that this share falls under it. Groups with one target are ranked
    together. From the first renewal on, what is zero stays zero, also what was zero before: the groups'
    ``freeze_zeros`` is switched on, so that no mask is kept. At the last renewal the share is the target, to within one
    weight.

    With ``sparsity_unit``, whole rows or columns of a parameter go, by ``sum d * w^2`` over each, and ``sparsity`` is a
    share of those. A parameter that would be emptied keeps its best weight or unit, with a warning. Weights that
    require no gradient are left out; one without a step so far is scored by ``|w|``.

    The same weights go for any number of threads, and of ranks that DTensors are sharded over; each renewal adds up
    counts over those. On the CPU a renewal makes nothing of a parameter's size; on a GPU it waits for the device.

    The schedule is that of Zhu and Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878.

    Args:
        optimizer: a fusedreg optimizer; ``param_groups(model, sparsity=0.9)`` makes its groups.
        total_steps: of the training, > 0.
        begin: the part of them before the first renewal, in [0, 1).
        end: the part of them at the end of which the target is met, in (begin, 1].
        every: steps from one renewal to the next, > 0.

    Raises:
        TypeError: the optimizer is not one of fusedreg's.
        ValueError: a value that is not allowed; no group with a target; weights that have no such units, are complex
            or FSDP1's; a ``norm_group``, whose ranks would not see each other's weights.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1))
        >>> optimizer = fusedreg.FusedRegAdam(fusedreg.param_groups(model, sparsity=0.9))
        >>> schedule = fusedreg.SparsitySchedule(optimizer, total_steps=100)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 10)).square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> round(fusedreg.sparsity_report(model[0].weight[None]).fraction, 1)
        0.9
    """

    def __init__(
        self, optimizer: FusedRegOptimizer, total_steps: int, begin: float = 0.1, end: float = 0.75, every: int = 10
    ) -> None:
        if not isinstance(optimizer, FusedRegOptimizer):
            raise TypeError(f"Invalid optimizer: a {type(optimizer).__name__} (allowed: one of fusedreg's)")
        self.optimizer = optimizer
        self.last_step = 0
        """How often ``step`` was called."""
        self._set(total_steps, begin, end, every)
        self._said: set[int] = set()
        self._pools()

    def _set(self, total_steps: Any, begin: Any, end: Any, every: Any) -> None:
        total_steps, begin, end, every = map(as_python, (total_steps, begin, end, every))
        for name, number in (("total_steps", total_steps), ("every", every)):
            is_whole = isinstance(number, (int, float)) and not isinstance(number, bool) and float(number).is_integer()
            if not is_whole or number <= 0:
                raise ValueError(f"Invalid {name} value: {number!r} (allowed: a whole number > 0)")
        if not (isinstance(begin, (int, float)) and 0.0 <= begin < 1.0):
            raise ValueError(f"Invalid begin value: {begin!r} (allowed: a number in [0, 1))")
        if not (isinstance(end, (int, float)) and begin < end <= 1.0):
            raise ValueError(f"Invalid end value: {end!r} with begin={begin} (allowed: a number in (begin, 1])")
        self.total_steps, self.begin, self.end, self.every = int(total_steps), float(begin), float(end), int(every)

    def _pools(self) -> dict[Target, list[Weights]]:
        """What is ranked together, by target and unit."""
        if self.optimizer._norm_group is not None:
            raise ValueError("SparsitySchedule does not work with norm_group (allowed: DTensors; norm_group=None)")
        groups: dict[Target, list[dict[str, Any]]] = {}
        for group in spare_small(self.optimizer.param_groups):
            target = _target(group)
            if target is not None:
                groups.setdefault(target, []).append(group)
        if not groups:
            raise ValueError("no group has a sparsity (allowed: fusedreg.param_groups(model, sparsity=0.9))")
        pools = {key: list(weights_of(self.optimizer, some)) for key, some in groups.items()}
        for (_, unit), weights in pools.items():
            for each in weights:
                if unit is not None:
                    units_in(each, unit)
        return pools

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each ``optimizer.step()``; now and then it makes weights zero."""
        self.last_step += 1
        last = max(int(self.end * self.total_steps), 1)
        is_last = self.last_step == last
        if not is_last and not (
            self.begin * self.total_steps <= self.last_step < last and self.last_step % self.every == 0
        ):
            return
        span = (self.end - self.begin) * self.total_steps
        done = 1.0 if is_last else (self.last_step - self.begin * self.total_steps) / span
        for (target, unit), weights in self._pools().items():
            share = target * (1 - (1 - done) ** 3)
            if share <= 0 or not weights:
                continue
            if unit is None:
                emptied = zero_smallest(weights, share, is_exact=is_last)
            else:
                emptied = zero_smallest_units(weights, unit, share)
            self._say(emptied, "weight" if unit is None else "unit", target)
            for group in self.optimizer.param_groups:
                if _target(group) == (target, unit):
                    group["freeze_zeros"] = True

    def _say(self, emptied: list[Weights], what: str, target: float) -> None:
        for weights in emptied:
            if id(weights.param) in self._said:
                continue
            self._said.add(id(weights.param))
            warnings.warn(
                f"at a sparsity of {target:g}, {weights.name} would become all zeros, and keeps its best {what} "
                "(where it is all zeros already, it stays so); exempt it, or ask for less",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, whose own state dict has the targets and whether zeros are frozen."""
        return {
            "total_steps": self.total_steps,
            "begin": self.begin,
            "end": self.end,
            "every": self.every,
            "last_step": self.last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the schedule that ``state_dict`` is of stood. Load the optimizer's, too.

        Raises:
            ValueError: something is missing or not allowed; then nothing has changed.
        """
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing:
            raise ValueError(
                f"Invalid state_dict: it has no {missing[0]!r} (allowed: a SparsitySchedule's state_dict())"
            )
        last_step = state_dict["last_step"]
        if not isinstance(last_step, int) or last_step < 0:
            raise ValueError(f"Invalid last_step value: {last_step!r} (allowed: a whole number >= 0)")
        self._set(*(state_dict[key] for key in ("total_steps", "begin", "end", "every")))
        self.last_step = last_step
