"""The value of all penalties, to log beside the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..optimizer import FusedRegOptimizer
from ..penalties import PENALTIES


@torch.no_grad()
def penalty(optimizer: FusedRegOptimizer) -> Tensor:
    """What the penalties add to the objective: ``l1 * sum |w| + l2 / 2 * sum w^2``, each group with its strengths.

    Weight decay is not part of it. The value does not depend on ``penalty_mode``.

    Returns:
        A 0-dim tensor on the first parameter's device: float64 where all parameters are, else float32. Nothing waits
        for a GPU.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    is_double = bool(params) and all(param.dtype in (torch.float64, torch.complex128) for param in params)
    dtype = torch.float64 if is_double else torch.float32
    total = torch.zeros((), dtype=dtype, device=params[0].device if params else None)
    for group in optimizer.param_groups:
        for each in (penalty for penalty in PENALTIES if penalty.is_on(group)):
            for param in group["params"]:
                w = torch.view_as_real(param.resolve_conj()) if param.is_complex() else param
                total += each.value(w.to(dtype), group).sum().to(total.device)
    return total
