"""How parameters are spread over processes, and the sum of squares over all of them.

A rank sees its part of the model, and the norm is the model's. What is sharded is added up over the ranks that hold the
shards; what is replicated counts once. See docs/distributed.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..flat_parameters import is_flat
from ..memory import is_dtensor, widest


class Partition(NamedTuple):
    """How a DTensor lies on its mesh."""

    mesh: Any
    """A ``DeviceMesh``."""
    sharded: tuple[bool, ...]
    """For each dimension of the mesh, whether its ranks hold different elements. Otherwise all hold the same."""


def partition_of(param: Any) -> Partition | None:
    """None for what is not a DTensor.

    Raises:
        ValueError: a parameter that is only known as a sum over ranks.
    """
    if not is_dtensor(param):
        return None
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"Invalid parameter: its placements are {param.placements} (allowed: Shard and Replicate; redistribute it)"
        )
    return Partition(param.device_mesh, tuple(not placement.is_replicate() for placement in param.placements))


def sum_over_shards(values: Tensor, tensor: Any, is_summed: Callable[[int], bool] = lambda dim: True) -> Tensor:
    """Sums of a tensor's parts, added up over the ranks that hold the parts; of what is not a DTensor as they are.

    Args:
        values: of this rank's part.
        tensor: of which they are.
        is_summed: whether they are added up over ranks that hold other parts of a dimension of ``tensor``.

    Raises:
        ValueError: a DTensor that is only known as a sum over ranks, or of which this rank has no part.
    """
    partition = partition_of(tensor)
    if partition is None:
        return values
    mesh = partition.mesh
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"Invalid tensor: this rank has no part of it (allowed: one on a mesh with this rank, not {mesh})"
        )
    for dim, placement in enumerate(tensor.placements):
        if partition.sharded[dim] and is_summed(placement.dim):
            values = cast(Tensor, _all_reduce([values], mesh.get_group(dim), values.device)[0])
    return values


def check_norm_is_whole(optimizer: str, groups: list[dict[str, Any]], state: dict[Any, Any], norm_group: Any) -> None:
    """Raises where a norm over this optimizer's parameters would be one of a part of the model, and nobody said so."""
    for param in (param for group in groups for param in group["params"]):
        if is_flat(param) and norm_group is None:
            raise RuntimeError(
                "max_grad_norm needs the process group over which FullyShardedDataParallel shards the parameters: each "
                f"rank would clip by the norm of its own shard (allowed: {optimizer}(model.parameters(), "
                "max_grad_norm=..., norm_group=model.process_group))"
            )
        if any(each.state is state for each in getattr(param, "_in_backward_optimizers", ())):
            raise RuntimeError(
                "max_grad_norm does not work with _apply_optimizer_in_backward, which steps each parameter before all "
                "gradients are there: each would be clipped by its own norm (allowed: max_grad_norm=None; clip_value)"
            )
    if sum(len(group["params"]) for group in groups) == 1 and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "max_grad_norm does not work in an optimizer of one parameter that steps inside of a backward pass: it "
            "would be clipped by its own norm (allowed: max_grad_norm=None; clip_value; one step for all, behind it)"
        )
    if _is_called_from("torchao.optim.cpu_offload"):
        raise RuntimeError(
            "max_grad_norm does not work in torchao's CPUOffloadOptimizer, which has an optimizer for each parameter: "
            "each would be clipped by its own norm (allowed: max_grad_norm=None; clip_value)"
        )
    # It leaves no mark on the optimizer that it makes, nor on the parameters: only the one who calls tells.
    if norm_group is None and _is_called_from("torch.distributed.optim.zero_redundancy_optimizer"):
        raise RuntimeError(
            "max_grad_norm needs the process group over which ZeroRedundancyOptimizer deals out the parameters: each "
            "rank would clip by the norm of its own (allowed: ZeroRedundancyOptimizer(model.parameters(), "
            f"functools.partial({optimizer}, norm_group=torch.distributed.group.WORLD), max_grad_norm=...))"
        )


def _is_called_from(module: str) -> bool:
    frame: FrameType | None = sys._getframe() if module in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


class SumOverProcesses:
    """Adds up sums of squares over processes. Every rank makes the same calls, whatever gradients it has."""

    def __init__(self, partitions: Iterable[Partition | None], norm_group: Any) -> None:
        """
        Args:
            partitions: of all parameters of the optimizer, in the same order on every rank.
            norm_group: the ``ProcessGroup`` whose ranks hold different parameters, or None.
        """
        self._partitions = list(dict.fromkeys((None, *partitions)))
        self._norm_group = norm_group
        self._reductions = list(self._plan_reductions())
        self._is_counted = [norm_group is None or _counts_here(each, norm_group) for each in self._partitions]

    @property
    def is_needed(self) -> bool:
        return self._norm_group is not None or bool(self._reductions)

    def _plan_reductions(self) -> Iterator[tuple[Any, list[int], list[bool]]]:
        """The all-reduces over meshes: the group, the partitions, and whether this rank's sum of each counts.

        One for each dimension of a mesh over which something is sharded. What is replicated there is taken from the
        first rank, so that all ranks come to the same bits.
        """
        of_mesh: dict[Any, list[int]] = {}
        for i, partition in enumerate(self._partitions):
            if partition is not None:
                of_mesh.setdefault(partition.mesh, []).append(i)
        for mesh, places in of_mesh.items():
            coordinate = mesh.get_coordinate()
            if coordinate is None:  # this rank holds nothing of it
                continue
            for dim in range(mesh.ndim):
                sharded = [cast(Partition, self._partitions[i]).sharded[dim] for i in places]
                if any(sharded):
                    yield mesh.get_group(dim), places, [each or coordinate[dim] == 0 for each in sharded]

    def add_up(self, sums: Sequence[tuple[Partition | None, float | Tensor]]) -> float | Tensor:
        """The sum over all ranks, the same to the bit on each; a float where all are.

        Nothing waits for a GPU.

        Args:
            sums: of squares, over this rank's gradients, and how the parameters that they are of are spread.
        """
        device = next((value.device for _, value in sums if isinstance(value, Tensor)), None)
        dtype = torch.float64 if device is None else widest(device)
        squares: list[float | Tensor] = [0.0] * len(self._partitions)
        for partition, value in sums:
            i = self._partitions.index(partition)
            squares[i] += value.to(device, dtype).sum() if isinstance(value, Tensor) else value
        for group, places, counts in self._reductions:
            own = [squares[i] if is_counted else 0.0 for i, is_counted in zip(places, counts, strict=True)]
            for i, reduced in zip(places, _all_reduce(own, group, device), strict=True):
                squares[i] = reduced
        total = sum(each for each, counts in zip(squares, self._is_counted, strict=True) if counts)
        return total if self._norm_group is None else _all_reduce([total], self._norm_group, device)[0]


def _counts_here(partition: Partition | None, norm_group: Any) -> bool:
    """Whether this rank's sum is one of those that ``norm_group`` adds up.

    A DTensor's sum is known to all ranks of its mesh, and one of them brings it in.
    """
    if partition is None:
        return True
    ranks = torch.distributed.get_process_group_ranks(norm_group)
    return torch.distributed.get_rank() == min(set(ranks) & set(partition.mesh.mesh.flatten().tolist()))


def reduce_over_shards(partition: Partition | None, tensor: Tensor, operation: str = "sum") -> Tensor:
    """Reduces a tensor over the ranks that hold the other shards of what a partition tells of; returns the result.

    Args:
        operation: "sum", "max" or "min".
    """
    if partition is None or partition.mesh.get_coordinate() is None:  # this rank holds nothing of it
        return tensor
    for dim, is_sharded in enumerate(partition.sharded):
        if is_sharded:
            tensor = _through(tensor, partition.mesh.get_group(dim), operation)
    return tensor


def _through(own: Tensor, group: Any, operation: str = "sum") -> Tensor:
    """Reduces through the group's own device, where it has another: NCCL takes nothing that is on the CPU."""
    types = {each.type for each in group._device_types}
    reduced = own if own.device.type in types else own.to(min(types))
    torch.distributed.all_reduce(reduced, getattr(torch.distributed.ReduceOp, operation.upper()), group=group)
    return reduced.to(own.device)


def _all_reduce(numbers: list[float | Tensor], group: Any, device: torch.device | None) -> list[float | Tensor]:
    """The sums over a group's ranks, tensors of one shape on ``device``, floats where that is None."""
    if device is None:
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    else:
        scalars = [
            each if isinstance(each, Tensor) else torch.full((), each, dtype=widest(device), device=device)
            for each in numbers
        ]
        own = torch.stack(scalars)
    reduced = _through(own, group)
    return reduced.tolist() if device is None else list(reduced.unbind())
