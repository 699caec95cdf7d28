"""Cuts a model as a plan says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import CompactAttention
from .dead import Merge, Plan
from .tensors import named_tensors


@torch.no_grad()
def cut(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Replaces the parameters and buffers of a model by what stays of them, in place.

    Returns:
        What has become of every tensor that changed, by its name.
    """
    by_id: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model):
        by_id.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    changed: dict[str, Tensor] = {}
    for which, names in by_id.items():
        tensor, key = tensors[which], names[0]
        masks = {dim: mask for (each, dim), mask in plan.keep.items() if each == key}
        if not masks and key not in plan.add:
            continue
        new = tensor.detach()
        if key in plan.merge:
            new = _merged(new, plan.merge[key])
        if key in plan.add:
            new = (new.double() + plan.add[key].to(new.device).double()).to(new.dtype)
        new = take(new, masks)
        if isinstance(tensor, nn.Parameter):
            new = type(tensor)(new, requires_grad=tensor.requires_grad)
        for name in names:
            _put(model, name, new)
            changed[name] = new
    layer: Any
    for path, constant in plan.new_biases.items():
        layer = model.get_submodule(path)
        weight: Any = layer.weight
        bias = constant.to(weight.device, weight.dtype)
        outputs = 1 if getattr(layer, "transposed", False) else 0
        mask = plan.keep.get((f"{path}.weight", outputs))
        layer.bias = nn.Parameter(bias if mask is None else bias[mask.to(bias.device)])
        changed[f"{path}.bias"] = layer.bias
    for path, mask in plan.heads.items():
        attention: Any = model.get_submodule(path)
        new_attention = CompactAttention(attention, int(mask.sum()))
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is attention:
                    parent._modules[name] = new_attention
    for module in model.modules():
        _say_sizes(module)
    for path, features in plan.features.items():
        layer = model.get_submodule(path)
        layer.num_features = features
    for path, groups in plan.groups.items():
        layer = model.get_submodule(path)
        layer.in_channels = layer.in_channels // layer.groups * groups
        layer.out_channels = layer.out_channels // layer.groups * groups
        layer.groups = groups
    return changed


def _merged(weight: Tensor, merge: Merge) -> Tensor:
    new = weight.to(torch.float64, copy=True)
    factor = merge.factor.to(new.device).double()
    new.select(merge.dim, merge.to).add_(torch.tensordot(new, factor, dims=([merge.dim], [0])))
    return new.to(weight.dtype)


def take(tensor: Tensor, masks: dict[int, Tensor]) -> Tensor:
    """A copy of what the masks, by dimension, keep."""
    result = tensor
    for dim, mask in masks.items():
        result = result.index_select(dim, mask.nonzero().flatten().to(tensor.device))
    return result.clone() if result is tensor else result


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        module._parameters[last] = tensor
    else:
        module._buffers[last] = tensor


def _say_sizes(module: nn.Module) -> None:
    """Brings a layer's own numbers in line with its parameters."""
    weight: Any = getattr(module, "weight", None)
    if type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
        outs, ins = (1, 0) if module.transposed else (0, 1)
        module.out_channels, module.in_channels = weight.shape[outs], weight.shape[ins]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for each in (module.weight, module.running_mean):
            if each is not None:
                module.num_features = len(each)
    elif type(module) is nn.Embedding:
        module.embedding_dim = weight.shape[1]
    elif type(module) is nn.PReLU:
        module.num_parameters = len(weight)
    elif isinstance(module, CompactAttention):
        module.embed_dim = module.out_proj.weight.shape[0]
