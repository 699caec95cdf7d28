"""What the callbacks of all frameworks share: our optimizer inside of theirs, and what they log of it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..optimizer import FusedRegOptimizer
from ..sparsity.report import sparsity_report
from ..sparsity.value import penalty


def ours_in(optimizer: Any) -> FusedRegOptimizer | None:
    """The fusedreg optimizer that a framework has wrapped, as it is or in several layers; None if there is none."""
    # The wrappers of Lightning and Fabric pass for what they wrap, with attributes that were copied.
    for name in ("optimizer", "original_optimizer"):  # the latter is Opacus's
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer):
            return ours_in(inner)
    return optimizer if isinstance(optimizer, FusedRegOptimizer) else None


def must_be_ours(optimizer: Any) -> FusedRegOptimizer:
    """
    Raises:
        TypeError: it is not one of fusedreg's, and wraps none.
    """
    ours = ours_in(optimizer)
    if ours is None:
        raise TypeError(f"Invalid optimizer: a {type(optimizer).__name__} (allowed: one of fusedreg's)")
    return ours


def measured(optimizer: FusedRegOptimizer, prefix: str = "fusedreg/") -> dict[str, float]:
    """The norm of the last step's gradients, where ``max_grad_norm`` is set; the share of exact zeros among all weights
    of the optimizer; the value of all penalties. Reading them waits for a GPU. Collective where parameters are sharded.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = {"zeros": sparsity_report(params).fraction, "penalty": float(penalty(optimizer))}
    if optimizer.grad_norm is not None:
        values["grad_norm"] = float(optimizer.grad_norm)
    return {f"{prefix}{name}": value for name, value in values.items()}
