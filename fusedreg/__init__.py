"""Drop-in torch.optim optimizers that fuse L1, L2, weight decay and gradient clipping into one update pass."""

from __future__ import annotations

from .adam import FusedRegAdam
from .adamw import FusedRegAdamW
from .groups import param_groups
from .optimizer import FusedRegOptimizer
from .sgd import FusedRegSGD
from .sparsity import SparsityReport, sparsity_report

__version__ = "0.1.0"

__all__ = [
    "FusedRegAdam",
    "FusedRegAdamW",
    "FusedRegOptimizer",
    "FusedRegSGD",
    "SparsityReport",
    "param_groups",
    "sparsity_report",
]
