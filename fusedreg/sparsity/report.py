"""How sparse a model is: exact zeros, empty rows, empty columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


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

    Args:
        model_or_params: a module, its ``parameters()``, its ``named_parameters()``, or any iterable of tensors.
    """
    if isinstance(model_or_params, nn.Module):
        model_or_params = model_or_params.named_parameters()
    report = SparsityReport()
    for i, item in enumerate(model_or_params):
        name, tensor = item if isinstance(item, tuple) else (str(i), item)
        is_zero = tensor.detach() == 0
        matrix = is_zero.flatten(start_dim=1) if is_zero.ndim >= 2 else None
        by_column = is_zero.transpose(0, 1).flatten(start_dim=1) if is_zero.ndim >= 2 else None
        report.tensors.append(
            TensorSparsity(
                name=name,
                shape=tuple(tensor.shape),
                numel=tensor.numel(),
                zeros=int(is_zero.sum()),
                empty_rows=None if matrix is None else int(matrix.all(dim=1).sum()),
                empty_columns=None if by_column is None else int(by_column.all(dim=1).sum()),
            )
        )
    return report
