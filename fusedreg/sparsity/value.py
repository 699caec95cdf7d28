"""The value of all penalties, to log beside the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flat_parameters import is_flat
from ..hyperparameters import spare_small
from ..memory import local
from ..optimizer import FusedRegOptimizer
from ..penalties import PENALTIES, UNIT_PENALTIES
from ..penalties.units import as_units
from ..step.partition import SumOverProcesses, partition_of


@torch.no_grad()
def penalty(optimizer: FusedRegOptimizer) -> Tensor:
    """What the penalties add to the objective: ``l1 * sum |w| + l2 / 2 * sum w^2`` and the others, each group's own.

    Infinite where a weight is outside of its box. Weight decay is not part of it. The value does not depend on
    ``penalty_mode``.

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
    for group in spare_small(optimizer.param_groups):
        on = [penalty for penalty in PENALTIES if penalty.is_on(group)]
        of_units = [penalty for penalty in UNIT_PENALTIES if penalty.is_on(group)]
        for param in group["params"] if on or of_units else ():
            w = local(param)
            w = (torch.view_as_real(w.resolve_conj()) if w.is_complex() else w).to(dtype)
            total = totals[partitions[param]]
            for element_penalty in on:
                total += element_penalty.value(w, group).sum().to(total.device)
            norms = as_units(w, group["unit"]).norm(dim=1) if of_units else w
            for unit_penalty in of_units:
                total += unit_penalty.value(norms, group).sum().to(total.device)
    over_processes = SumOverProcesses(partitions.values(), norm_group)
    if not over_processes.is_needed:  # nor float64, which some devices do not have
        return torch.stack(list(totals.values())).sum()
    return torch.as_tensor(over_processes.add_up(list(totals.items())), dtype=dtype, device=device)
