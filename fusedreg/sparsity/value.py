"""The value of all penalties, to log beside the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.memory import local
from ..flat_parameters import is_flat
from ..optimizer import FusedRegOptimizer
from ..penalties import PENALTIES
from ..step.partition import SumOverProcesses, partition_of


@torch.no_grad()
def penalty(optimizer: FusedRegOptimizer) -> Tensor:
    """What the penalties add to the objective: ``l1 * sum |w| + l2 / 2 * sum w^2``, each group with its strengths.

    Weight decay is not part of it. The value does not depend on ``penalty_mode``.

    Over several processes it is the whole model's, and the same on each rank. With DTensors and with ``norm_group``
    that is a collective: every rank calls it.

    Returns:
        A 0-dim tensor on the first parameter's device: float64 where all parameters are, else float32. Nothing waits
        for a GPU.

    Raises:
        RuntimeError: parameters of FSDP1, and no ``norm_group`` to say over which ranks they are shared out.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    norm_group = getattr(optimizer, "_norm_group", None)  # ZeroRedundancyOptimizer has our groups, and is none of ours
    if norm_group is None and any(map(is_flat, params)):
        raise RuntimeError(
            "penalty needs the process group over which FullyShardedDataParallel shards the parameters: it would be "
            "that of a part "
            f"(allowed: {type(optimizer).__name__}(model.parameters(), ..., norm_group=model.process_group))"
        )
    is_double = bool(params) and all(param.dtype in (torch.float64, torch.complex128) for param in params)
    dtype = torch.float64 if is_double else torch.float32
    device = params[0].device if params else None
    partitions = {param: partition_of(param) for param in params}
    totals = {each: torch.zeros((), dtype=dtype, device=device) for each in (None, *partitions.values())}
    for group in optimizer.param_groups:
        for each in (penalty for penalty in PENALTIES if penalty.is_on(group)):
            for param in group["params"]:
                w = local(param)
                w = torch.view_as_real(w.resolve_conj()) if w.is_complex() else w
                total = totals[partitions[param]]
                total += each.value(w.to(dtype), group).sum().to(total.device)
    whole = SumOverProcesses(partitions.values(), norm_group).add_up(list(totals.items()))
    return torch.as_tensor(whole, dtype=dtype, device=device)
