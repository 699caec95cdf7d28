"""A model's parameters as param groups: which weights are regularized."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from .flat_parameters import originals
from .penalties import PENALTIES

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

    DTensors and FSDP1's parameters are taken for what they are whole, with the names and dimensions of the model.

    Args:
        model: the module whose parameters are split; a shared parameter is listed once.
        l1: strength on the weights; None leaves it to the optimizer's own argument.
        l2: likewise.
        weight_decay: likewise.
        **options: any other group option. Penalties and constraints (``freeze_zeros``, ...) are for the weights alone;
            the others (``lr``, ``clip_value``, ...) are given to both groups.

    Returns:
        One or two param groups, the regularized weights first, in the order of ``model.named_parameters()``.

    Warns:
        UserWarning: all parameters are exempt, and so a strength acts on nothing.

    Raises:
        ValueError: one parameter of FSDP1 is made of weights and of exempt ones.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        >>> weights, exempt = param_groups(model, l1=1e-4)
        >>> len(weights["params"]), len(exempt["params"])
        (1, 3)
    """
    in_norm_layer = {
        id(param) for module in model.modules() if isinstance(module, _NORM_LAYERS) for param in module.parameters()
    }
    flat = originals(model)
    weights: list[torch.nn.Parameter] = []
    exempt: list[torch.nn.Parameter] = []
    for name, param in model.named_parameters():
        made_of = [
            _is_exempt(each.name, each.ndim, isinstance(each.module, _NORM_LAYERS)) for each in flat.get(id(param), ())
        ] or [_is_exempt(name.rpartition(".")[2], param.ndim, id(param) in in_norm_layer)]
        if any(made_of) != all(made_of):
            raise ValueError(
                f"Invalid parameter: {name!r} is one of weights and of exempt ones, and can have one strength "
                "(allowed: FullyShardedDataParallel(..., use_orig_params=True))"
            )
        (exempt if all(made_of) else weights).append(param)
    off = {"weight_decay": 0.0, **{penalty.name: penalty.option.default for penalty in PENALTIES}}
    strengths = {"l1": l1, "l2": l2, "weight_decay": weight_decay}
    given = {key: value for key, value in strengths.items() if value is not None}
    given |= {key: options.pop(key) for key in off if key in options}
    if exempt and not weights and (not given or any(value != off[key] for key, value in given.items())):
        what = ", ".join(f"{key}={value}" for key, value in given.items()) or "every strength"
        message = f"{what} acts on nothing: all parameters are exempt (biases, norm layers, fewer than two dimensions)"
        warnings.warn(message, stacklevel=2)
    groups = [
        {"params": weights, **options, **given},
        {"params": exempt, **options, **off},
    ]
    return [group for group in groups if group["params"]]


def _is_exempt(name: str, ndim: int, is_in_norm_layer: bool) -> bool:
    return name == "bias" or ndim < 2 or is_in_norm_layer
