"""Target sparsity on DTensors: the same weights go as in one process, whoever holds them.

The others are equal up to the step's own rounding, which may differ at the end of a shard.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import worlds
from conftest import needs_cpp
from helpers import FusedRegAdam, FusedRegSGD, make_params
from test_sharded_steps import LAYOUTS, gradients_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fusedreg import FusedRegNAdam, SparsitySchedule
from fusedreg.sparsity import scores

STEPS = 10
TWO = (2,)
Case = tuple[type, str, dict[str, Any], bool]


def train(case: Case, place: Any) -> list[Tensor]:
    """The weights after a schedule, whole. ``place`` makes of a tensor, and its number, what the optimizer holds."""
    cls, layout, options, by_torch = case
    takes = scores.CppScores.takes
    if by_torch:
        scores.CppScores.takes = staticmethod(lambda weights: False)
    try:
        shapes = [shape for shape, _, _ in LAYOUTS[layout]]
        if options.get("sparsity_unit") == "columns":
            shapes = [shape for shape in shapes if len(shape) > 1]
        # Many equal weights, so that positions decide, and one parameter that is emptied.
        values = [param.detach().mul(3).round().div(3) for param in make_params(shapes)]
        values[0] = values[0] * 1e-3
        numbers = [i for i, (shape, _, _) in enumerate(LAYOUTS[layout]) if shape in shapes]
        params = [torch.nn.Parameter(place(value, i)) for value, i in zip(values, numbers, strict=True)]
        optimizer = cls(params, lr=1e-3, sparsity=0.8, **options)
        schedule = SparsitySchedule(optimizer, STEPS, begin=0.0, end=1.0, every=2)
        for t in range(STEPS):
            for param, grad, i in zip(params, gradients_of(shapes, t, torch.float32), numbers, strict=True):
                param.grad = place(grad.sign(), i)
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                schedule.step()
        weights = [param.detach() for param in params]
        return [each.full_tensor() if isinstance(each, DTensor) else each for each in weights]
    finally:
        scores.CppScores.takes = takes


def in_many(cases: list[Case], by_rows: bool) -> list[list[Tensor]]:
    """As this process does it as one of many."""
    mesh_of = functools.cache(lambda shape: init_device_mesh("cpu", shape))

    def place(layout: str, tensor: Tensor, i: int) -> Tensor:
        _, mesh, placements = LAYOUTS[layout][i]
        if by_rows:
            mesh, placements = (TWO, [Shard(0)]) if tensor.ndim else (None, None)
        return tensor if mesh is None else distribute_tensor(tensor, mesh_of(mesh), placements)

    return [train(case, functools.partial(place, case[1])) for case in cases]


def check(ranks: int, cases: list[Case]) -> None:
    results = worlds.run(ranks, in_many, cases, ranks == 2)
    for i, case in enumerate(cases):
        alone = train(case, lambda tensor, _: tensor)
        total = sum(each.numel() for each in alone)
        if "sparsity_unit" not in case[2]:
            assert sum(int((each == 0).sum()) for each in alone) == round(0.8 * total)
        for of_rank in results:
            for ours, theirs in zip(of_rank[i], alone, strict=True):
                assert ours.eq(0).equal(theirs.eq(0)), f"other zeros: {case}"
                torch.testing.assert_close(ours, theirs, rtol=4 * STEPS * torch.finfo(torch.float32).eps, atol=0.0)


@needs_cpp
def test_four_ranks_zero_what_one_does() -> None:
    cases: list[Case] = [(FusedRegAdam, layout, {}, by_torch) for layout in LAYOUTS for by_torch in (False, True)]
    cases += [(FusedRegSGD, "several-meshes", {"momentum": 0.9}, False), (FusedRegNAdam, "fsdp2", {}, False)]
    cases += [(FusedRegAdam, "fsdp2-and-tensor-parallel", {"sparsity_unit": "columns"}, False)]
    cases += [(FusedRegAdam, layout, {"sparsity_unit": "rows"}, False) for layout in ("fsdp2", "hsdp")]
    check(4, cases)


@needs_cpp
@pytest.mark.parametrize("layout", ["fsdp2", "several-meshes"])
def test_two_ranks_zero_what_one_does(layout) -> None:
    cases: list[Case] = [(FusedRegAdam, layout, {}, False), (FusedRegSGD, layout, {}, True)]
    check(2, [*cases, (FusedRegAdam, layout, {"state_dtype": torch.bfloat16}, False)])
