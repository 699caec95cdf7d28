"""Stage 3: the norm over all plans and processes, and what the plans need to clip with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import DeviceNorm, StepScalars
from ..backends.reference import clip_coefficient
from ..memory import widest
from ..rules.spec import number
from .plan import Plans


def clip(
    plans: Plans, step: StepScalars, max_grad_norm: float | Tensor, last_norm: float | Tensor | None
) -> float | Tensor:
    """Takes the norm, and puts what the plans need to clip with it into ``step``.

    Args:
        last_norm: what this returned in the step before.

    Returns:
        The norm. A tensor, as wide as its device has them, may be written by the plans only when they take the step.
    """
    # In a training loop all that a step calls is fetched from memory: no comprehension, no set.
    sums: list[float | Tensor] = []
    on_host: float | None = 0.0  # their sum, where all are floats
    for plan in plans.plans:
        value = plan.sum_of_squares(step)
        sums.append(value)
        on_host = on_host + value if on_host is not None and isinstance(value, float) else None
    if plans.over_processes is not None:
        by_partition = [(part.partition, value) for part, value in zip(plans.parts, sums, strict=True)]
        value = plans.over_processes.add_up(by_partition)
        sums, on_host = [value], value if isinstance(value, float) else None
    if on_host is not None:
        norm = math.sqrt(on_host)
        bound = max_grad_norm if isinstance(max_grad_norm, float) else float(number(max_grad_norm))
        # Infinity measures, also what is not finite. Otherwise NaN stays.
        step.clip_coef = 1.0 if bound == math.inf or bound / (norm + 1e-6) > 1.0 else bound / (norm + 1e-6)
        return norm
    device = next(value.device for value in sums if isinstance(value, Tensor))
    dtype = widest(device)
    parts = [
        value.to(device, dtype).reshape(-1)
        if isinstance(value, Tensor)
        else torch.tensor([value], dtype=dtype, device=device)
        for value in sums
    ]
    squares = parts[0] if len(parts) == 1 else torch.cat(parts)
    limit = number(max_grad_norm)
    result = last_norm
    if plans.some_on_device:
        # One buffer for all steps, so that a CUDA graph writes where `grad_norm` reads.
        if not isinstance(last_norm, Tensor) or last_norm.device != device:
            last_norm = torch.zeros((), dtype=dtype, device=device)
        step.norm = DeviceNorm(squares, limit, last_norm)
        result = last_norm
    if not plans.all_on_device:
        total = squares.sum().sqrt()
        measures = not isinstance(limit, Tensor) and limit == math.inf
        step.clip_coef = 1.0 if measures else clip_coefficient(total, limit)
        result = total.detach()
    assert result is not None
    return result
