"""Whether two models compute the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .trace import without_fast_paths


class Inputs(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Any) -> Inputs:
        """The inputs with another tensor in the place of each."""
        return Inputs(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))


def as_inputs(example_inputs: Any) -> Inputs:
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs), {})
    return Inputs((example_inputs,), {})


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> list[Any]:
    """What a model in eval mode makes of inputs, which it may write into: its outputs, one after the other."""
    fresh = inputs.map(torch.clone)
    return pytree.tree_leaves(model(*fresh.args, **fresh.kwargs))


def run_and_count(model: nn.Module, inputs: Inputs) -> tuple[list[Any], int]:
    with without_fast_paths(), FlopCounterMode(display=False) as counter:
        outputs = run(model, inputs)
    return outputs, counter.get_total_flops()


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("cpu").double().eval()


def inputs_in_float64(inputs: Inputs) -> Inputs:
    return inputs.map(lambda x: x.detach().cpu().double() if x.is_floating_point() else x.detach().cpu())


def with_noise(inputs: Inputs) -> Inputs:
    """Other inputs of the same kind: example inputs may be all zeros, on which much is the same that is not."""
    generator = torch.Generator().manual_seed(0)

    def shaken(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.numel() == 0:
            return x
        spread = float(x.std()) if x.numel() > 1 else 0.0
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        return x + (spread or 1.0) * noise

    return inputs.map(shaken)


def difference(some: list[Any], others: list[Any]) -> tuple[float, float]:
    """The largest difference between outputs, and the largest output. Infinite if they are not of one kind."""
    largest, scale = 0.0, 0.0
    if len(some) != len(others):
        return float("inf"), 0.0
    for a, b in zip(some, others, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or (isinstance(a, (bool, int, float, str)) and a != b):
                return float("inf"), 0.0
            continue
        if a.shape != b.shape or a.dtype.is_complex != b.dtype.is_complex:
            return float("inf"), 0.0
        if a.numel() == 0:
            continue
        a, b = (each.detach().cpu().to(torch.complex128 if each.is_complex() else torch.float64) for each in (a, b))
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
        largest = max(largest, float(gap.max()))
        scale = max(scale, float(a.abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return largest, scale
