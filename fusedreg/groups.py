"""A model's parameters as param groups: which weights are regularized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .penalties import PENALTIES, TARGETS

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module,
    *,
    l1: float | None = None,
    l2: float | None = None,
    weight_decay: float | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Splits a model's parameters into regularized weights and exempt ones.

    Exempt, with ``weight_decay=0`` and every penalty and constraint off, are biases, the parameters of norm layers, and
    every other parameter of fewer than two dimensions: shrinking those costs accuracy and saves nothing.

    Args:
        model: the module whose parameters are split; a shared parameter is listed once.
        l1: strength on the weights; None leaves it to the optimizer's own argument.
        l2: likewise.
        weight_decay: likewise.
        **options: any other group option. Penalties and constraints (``freeze_zeros``, ...) are for the weights alone;
            the others (``lr``, ``clip_value``, ...) are given to both groups.

    Returns:
        One or two param groups, the regularized weights first, in the order of ``model.named_parameters()``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        >>> weights, exempt = param_groups(model, l1=1e-4)
        >>> len(weights["params"]), len(exempt["params"])
        (1, 3)
    """
    in_norm_layer = {
        id(param) for module in model.modules() if isinstance(module, _NORM_LAYERS) for param in module.parameters()
    }
    weights: list[torch.nn.Parameter] = []
    exempt: list[torch.nn.Parameter] = []
    for name, param in model.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias"
        (exempt if is_bias or param.ndim < 2 or id(param) in in_norm_layer else weights).append(param)
    strengths = {"l1": l1, "l2": l2, "weight_decay": weight_decay}
    for_weights = (*(penalty.option for penalty in PENALTIES), *TARGETS)
    off = {"weight_decay": 0.0, **{option.name: option.default for option in for_weights}}
    groups = [
        {"params": weights, **options, **{key: value for key, value in strengths.items() if value is not None}},
        {"params": exempt, **options, **off},
    ]
    return [group for group in groups if group["params"]]
