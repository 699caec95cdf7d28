"""How sparse a model is: exact zeros, empty rows, empty columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..flat_parameters import is_flat, whole_parameters
from ..memory import local
from ..step.partition import sum_over_shards


@dataclass(frozen=True)
class TensorSparsity:
    """One tensor's counts. A row is ``tensor[i]``, a column ``tensor[:, j]``; None below two dimensions."""

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    empty_rows: int | None
    empty_columns: int | None

    @property
    def fraction(self) -> float:
        """Zeros over elements, in [0, 1]; 0 for a tensor without elements."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """The tensors' counts and their totals; ``print(report)`` shows a table."""

    tensors: list[TensorSparsity] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def zeros(self) -> int:
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def empty_rows(self) -> int:
        return sum(tensor.empty_rows or 0 for tensor in self.tensors)

    @property
    def empty_columns(self) -> int:
        return sum(tensor.empty_columns or 0 for tensor in self.tensors)

    def __iter__(self) -> Iterator[TensorSparsity]:
        return iter(self.tensors)

    def __str__(self) -> str:
        header = ("tensor", "shape", "zeros", "of", "share", "empty rows", "empty columns")
        rows = [
            (
                tensor.name,
                "x".join(map(str, tensor.shape)) or "scalar",
                str(tensor.zeros),
                str(tensor.numel),
                f"{tensor.fraction:.1%}",
                "" if tensor.empty_rows is None else str(tensor.empty_rows),
                "" if tensor.empty_columns is None else str(tensor.empty_columns),
            )
            for tensor in self.tensors
        ]
        total = ("all", "", str(self.zeros), str(self.numel), f"{self.fraction:.1%}")
        rows.append((*total, str(self.empty_rows), str(self.empty_columns)))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        )


@torch.no_grad()
def sparsity_report(model_or_params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> SparsityReport:
    """Counts exact zeros, empty rows and empty columns, per tensor and in all.

    Of DTensors and of FSDP1's parameters the whole is counted, not a rank's part, and each rank gets the same report.
    That is a collective: every rank that has a part calls it. DTensors are counted where they lie; FSDP1's are
    gathered, one wrapped module at a time.

    Args:
        model_or_params: a module, its ``parameters()``, its ``named_parameters()``, or any iterable of tensors. FSDP1's
            parameters need the module, which alone knows what they were.

    Raises:
        ValueError: a parameter of FSDP1 without its module; a DTensor that is only known as a sum over ranks, or of
            which this rank has no part.
    """
    named = whole_parameters(model_or_params) if isinstance(model_or_params, nn.Module) else model_or_params
    report = SparsityReport()
    for i, item in enumerate(named):
        name, tensor = item if isinstance(item, tuple) else (str(i), item)
        if not isinstance(model_or_params, nn.Module) and is_flat(tensor):
            raise ValueError(
                f"Invalid parameter: {name!r} is a part of what FullyShardedDataParallel has shared out (allowed: the "
                "module that it wraps)"
            )
        report.tensors.append(
            TensorSparsity(name, tuple(tensor.shape), tensor.numel(), *_zeros_and_empty_rows_and_columns(tensor))
        )
    return report


def _zeros_and_empty_rows_and_columns(tensor: Tensor) -> tuple[int, int | None, int | None]:
    nonzero = local(tensor.detach()) != 0

    def empty(dim: int) -> int | None:
        if tensor.ndim < 2:
            return None
        counts = nonzero.movedim(dim, 0).flatten(start_dim=1).sum(dim=1)
        is_empty = sum_over_shards(counts, tensor, lambda sharded: sharded != dim) == 0
        return int(sum_over_shards(is_empty.sum(), tensor, lambda sharded: sharded == dim))

    zeros = tensor.numel() - int(sum_over_shards(nonzero.sum(), tensor))
    return zeros, empty(0), empty(1)
