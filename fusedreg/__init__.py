"""Drop-in torch.optim optimizers that fuse L1, L2, weight decay and gradient clipping into one update pass."""

from __future__ import annotations

from .checkpoints import torch_twin
from .groups import param_groups
from .optimizer import FusedRegOptimizer
from .rules.registry import *  # noqa: F403
from .rules.registry import OPTIMIZERS as _OPTIMIZERS
from .sparsity.compact import compact
from .sparsity.compact.report import CompactReport
from .sparsity.report import SparsityReport, sparsity_report
from .sparsity.schedule import SparsitySchedule
from .sparsity.sparse_linear import SparseLinear, to_sparse
from .sparsity.value import penalty

__version__ = "0.1.0"

__all__ = [
    "CompactReport",
    "FusedRegOptimizer",
    "SparseLinear",
    "SparsityReport",
    "SparsitySchedule",
    "compact",
    "param_groups",
    "penalty",
    "sparsity_report",
    "to_sparse",
    "torch_twin",
    *(cls.__name__ for cls in _OPTIMIZERS),
]
