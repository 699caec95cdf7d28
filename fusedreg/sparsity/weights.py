"""The weights that a target of sparsity is over: which of them a process holds, and where they stand in the model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import arithmetic_dtype
from ..codes import are_codes, decode, scale_name
from ..flat_parameters import is_flat
from ..memory import local, offsets_of
from ..optimizer import FusedRegOptimizer
from ..penalties.spec import on_host
from ..rules.spec import RuleSpec
from ..step.partition import Partition, partition_of


@dataclass(frozen=True, eq=False)
class Weights:
    """A parameter with a target, between two steps. Nothing in it is copied, unless ``states`` is asked for."""

    name: str
    """For a message."""
    param: Tensor
    """The optimizer's; a DTensor, perhaps."""
    partition: Partition | None
    tensor: Tensor
    """What this process holds of it, detached."""
    offsets: tuple[int, ...]
    """Where that begins, in each dimension."""
    spec: RuleSpec
    group: dict[str, Any]
    """With its numbers on the host."""
    state: Mapping[str, Any]

    @functools.cached_property
    def in_metric(self) -> bool:
        """Whether a step was taken, by a rule that has a metric."""
        spec, group = self.spec, self.group
        if spec.metric is None or any(self.state.get(name) is None for name in spec.needed_states(group)):
            return False
        counts = [scalar.name for scalar in spec.scalar_states if scalar.counts_steps and scalar.needed(group)]
        return all(self.scalars[name] > 0 for name in counts)

    @functools.cached_property
    def stored(self) -> dict[str, Tensor]:
        """What the metric is computed from, as far as this process holds it; nothing where there is none."""
        names = self.spec.needed_states(self.group) if self.in_metric else ()
        return {name: local(self.state[name]).detach() for name in names}

    @property
    def scales(self) -> dict[str, Tensor]:
        """Of those that are in 8 bits."""
        return {name: self.state[scale_name(name)] for name, state in self.stored.items() if are_codes(state)}

    @functools.cached_property
    def states(self) -> dict[str, Tensor]:
        """The same as numbers; those that are in 8 bits are decoded."""
        return {
            name: decode(each, self.scales[name]) if are_codes(each) else each for name, each in self.stored.items()
        }

    @functools.cached_property
    def scalars(self) -> dict[str, float]:
        return {name: float(self.state.get(name, 0.0)) for name in self.spec.needed_scalar_states(self.group)}

    def metric(self, states: Mapping[str, Tensor]) -> Tensor:
        """d of the last step, in the arithmetic dtype, of some elements of its states."""
        assert self.spec.metric is not None
        dtype = arithmetic_dtype(self.param.dtype)
        return self.spec.metric({name: state.to(dtype) for name, state in states.items()}, self.scalars, self.group)

    def squares(self, w: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """``d * w^2`` of some elements, in the arithmetic dtype; ``w^2`` where there is no metric."""
        w = w.to(arithmetic_dtype(w.dtype))
        # A metric that is not finite does not make anything of a zero.
        return torch.where(w == 0, 0.0, self.metric(states) * w * w) if self.in_metric else w.square()

    @property
    def chunk(self) -> int:
        """How many elements torch scores at a time: temporaries of a few megabytes, and on a GPU few launches."""
        return 1 << (18 if self.tensor.device.type == "cpu" else 22)


def weights_of(optimizer: FusedRegOptimizer, groups: list[dict[str, Any]]) -> Iterator[Weights]:
    """What some of an optimizer's groups hold. Parameters that require no gradient are left out.

    Raises:
        ValueError: a complex parameter, one that is only known as a sum over ranks, or one of FSDP1.
    """
    for group in groups:
        numbers = {key: on_host(value) for key, value in group.items() if key != "params"}
        names = group.get("param_names") or itertools.repeat(None)
        for param, name in zip(group["params"], names, strict=False):
            name = f"{name or 'a parameter'} of shape {tuple(param.shape)}"
            if param.is_complex():
                raise ValueError(f"Invalid sparsity value: {group['sparsity']} for complex weights, {name}")
            if is_flat(param):
                raise ValueError(
                    f"Invalid sparsity value: {group['sparsity']} for a parameter of FullyShardedDataParallel, of "
                    "which each rank would rank its own part (allowed: torch.distributed.fsdp.fully_shard)"
                )
            if param.requires_grad:
                yield Weights(
                    name,
                    param,
                    partition_of(param),
                    local(param).detach(),
                    offsets_of(param),
                    optimizer.spec,
                    numbers,
                    optimizer.state.get(param, {}),
                )


def position_layout(weights: Weights, dims: list[int]) -> tuple[int, list[tuple[int, int]]]:
    """The number of its first element in the whole tensor, counted row by row, and for each of ``dims`` its size here
    and how far apart its elements' numbers are."""
    strides = [math.prod(weights.param.shape[dim + 1 :]) for dim in range(weights.param.ndim)]
    first = sum(offset * stride for offset, stride in zip(weights.offsets, strides, strict=True))
    return first, [(weights.tensor.shape[dim], strides[dim]) for dim in dims]


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, not copied."""
    return tensor.as_strided((tensor.numel(),), (1,))
