"""What fusedreg adds to a param group: the keys, their defaults, their checks, and a way to build the groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

L1_MODES = ("proximal", "decoupled", "subgradient")

# The keys that every fusedreg optimizer adds to a group of its torch twin. `max_grad_norm` is one number for the whole
# optimizer; it stands in every group so that state dicts carry it.
REGULARIZERS: dict[str, Any] = {
    "l1": 0.0,
    "l2": 0.0,
    "l1_mode": "proximal",
    "clip_value": None,
    "max_grad_norm": None,
}


def on_gpu(value: object) -> bool:
    """Whether reading a value would wait for a GPU. Such a value is taken as it is."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError if one of the regularizers in ``group`` has a value that is not allowed."""
    for key in ("l1", "l2"):
        value = group[key]
        if on_gpu(value):
            continue
        if not _is_number(value) or not 0.0 <= float(value) < math.inf:
            raise ValueError(f"Invalid {key} value: {value} (allowed: a finite number >= 0)")
    if group["l1_mode"] not in L1_MODES:
        raise ValueError(f"Invalid l1_mode value: {group['l1_mode']!r} (allowed: {', '.join(map(repr, L1_MODES))})")
    clip_value = group["clip_value"]
    if clip_value is not None and not on_gpu(clip_value) and not (_is_number(clip_value) and float(clip_value) >= 0.0):
        raise ValueError(f"Invalid clip_value value: {clip_value} (allowed: None or a number >= 0)")
    max_grad_norm = group["max_grad_norm"]
    if (
        max_grad_norm is not None
        and not on_gpu(max_grad_norm)
        and not (_is_number(max_grad_norm) and float(max_grad_norm) > 0.0)
    ):
        raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm} (allowed: None or a number > 0)")


def check_no_l1_on_complex(group: Mapping[str, Any]) -> None:
    """Raises ValueError if an L1 penalty meets a complex parameter: soft-thresholding is defined on the reals."""
    if (on_gpu(group["l1"]) or float(group["l1"]) > 0.0) and any(param.is_complex() for param in group["params"]):
        raise ValueError(f"Invalid l1 value: {group['l1']} for a group with complex parameters (allowed: 0)")


def check_one_max_grad_norm(groups: list[dict[str, Any]]) -> None:
    """Raises ValueError if the groups do not agree on ``max_grad_norm``: the norm is over all of them."""
    if not groups:
        return
    first = groups[0]["max_grad_norm"]
    for group in groups[1:]:
        value = group["max_grad_norm"]
        if value is first or (on_gpu(value) and on_gpu(first)):
            continue
        if on_gpu(value) or on_gpu(first) or value != first:
            raise ValueError(
                f"Invalid max_grad_norm values: {first} and {value} "
                "(allowed: the same in every group, the norm is over all parameters of the optimizer)"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


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

    Exempt, with ``l1 = l2 = weight_decay = 0``, are biases, the parameters of norm layers, and every other parameter
    of fewer than two dimensions: shrinking those costs accuracy and saves nothing.

    Args:
        model: the module whose parameters are split; a shared parameter is listed once.
        l1: strength on the weights; None leaves it to the optimizer's own argument.
        l2: likewise.
        weight_decay: likewise.
        **options: any other group option (``lr``, ``clip_value``, ...), given to both groups.

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
    groups = [
        {"params": weights, **options, **{key: value for key, value in strengths.items() if value is not None}},
        {"params": exempt, **options, **dict.fromkeys(strengths, 0.0)},
    ]
    return [group for group in groups if group["params"]]
