"""A step on DTensors, on every layout, against the same step in one process.

Equal up to the order of one sum, the norm's; the zeros are the same, and every rank has the same norm, to the bit.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import worlds
from conftest import FAST, needs_cpp
from helpers import (
    OPTIMIZER_VARIANTS,
    REGULARIZED,
    FusedRegAdamW,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    random,
    regularized,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fusedreg import backends, rounding
from fusedreg.backends import device_plan, tables

ALL, TWO_BY_TWO = (4,), (2, 2)
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()
# For each parameter its shape, and the mesh and placements that it has there; None is a plain tensor. Rows that the
# ranks do not share evenly, and ranks that have none.
LAYOUTS: dict[str, list[tuple[tuple[int, ...], tuple[int, ...] | None, Any]]] = {
    "fsdp2": [((7, 13), ALL, [ROWS]), ((33,), ALL, [ROWS]), ((2, 3, 5), ALL, [ROWS]), ((0, 4), ALL, [ROWS])],
    "hsdp": [
        ((7, 13), TWO_BY_TWO, [WHOLE, ROWS]),
        ((33,), TWO_BY_TWO, [WHOLE, ROWS]),
        ((1, 3), TWO_BY_TWO, [WHOLE, ROWS]),
    ],
    "tensor-parallel": [((7, 13), ALL, [ROWS]), ((7, 13), ALL, [COLUMNS]), ((13,), ALL, [WHOLE]), ((), ALL, [WHOLE])],
    "fsdp2-and-tensor-parallel": [
        ((7, 13), TWO_BY_TWO, [ROWS, COLUMNS]),
        ((9, 5), TWO_BY_TWO, [ROWS, ROWS]),
        ((13,), TWO_BY_TWO, [ROWS, WHOLE]),
        ((3, 4), TWO_BY_TWO, [WHOLE, COLUMNS]),
        ((5,), TWO_BY_TWO, [WHOLE, WHOLE]),
    ],
    "several-meshes": [
        ((7, 13), TWO_BY_TWO, [ROWS, COLUMNS]),
        ((33,), ALL, [ROWS]),
        ((5, 3), None, None),
        ((13,), TWO_BY_TWO, [ROWS, WHOLE]),
        ((), None, None),
    ],
}
STEPS = 3


def gradients_of(shapes: list[tuple[int, ...]], step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [random(shape, generator).to(dtype) for shape in shapes]


def in_one_process(
    cls: type, options: dict[str, Any], layout: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after some steps, and the norm in each."""
    shapes = [shape for shape, _, _ in LAYOUTS[layout]]
    params = make_params(shapes, dtype)
    optimizer = cls(params, backend="reference", **options)
    norms = []
    for step in range(STEPS):
        for param, grad in zip(params, gradients_of(shapes, step, dtype), strict=True):
            param.grad = grad
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return [param.detach() for param in params], norms


def in_many(cases: list[tuple[type, dict[str, Any], str, torch.dtype, str]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Likewise for each case, in this process as one of many."""
    meshes = {shape: init_device_mesh("cpu", shape) for shape in (ALL, TWO_BY_TWO)}
    return [sharded(meshes, *case) for case in cases]


def sharded(
    meshes: dict[tuple[int, ...], Any],
    cls: type,
    options: dict[str, Any],
    layout: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    if backend in ("triton", "triton, tables in Python"):  # make test-triton
        device_plan.make_tables = tables.make_tables if backend == "triton" else tables.PythonTables
        backends.BACKENDS["triton"] = backends.TritonBackend(scalars_on_host=False)
        backend = "triton"
    shapes = [shape for shape, _, _ in LAYOUTS[layout]]
    places = [(None if mesh is None else meshes[mesh], placements) for _, mesh, placements in LAYOUTS[layout]]

    def place(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, placements)

    def place_gradient(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
        if mesh is None or WHOLE not in placements or mesh.ndim > 1:
            return place(tensor, mesh, placements)
        # As a backward pass leaves those of what is replicated: each rank has a summand.
        mine = tensor if distributed.get_rank() == 1 else torch.zeros_like(tensor)
        return DTensor.from_local(mine, mesh, [Partial()])

    params = [
        torch.nn.Parameter(place(param.detach(), *place_of))
        for param, place_of in zip(make_params(shapes, dtype), places, strict=True)
    ]
    optimizer = cls(params, backend=backend, **options)
    norms = []
    for step in range(STEPS):
        for param, grad, place_of in zip(params, gradients_of(shapes, step, dtype), places, strict=True):
            param.grad = place_gradient(grad, *place_of)
        before = [param.grad for param in params]
        optimizer.step()
        norms.append(optimizer.grad_norm)
        assert all(param.grad is grad for param, grad in zip(params, before, strict=True))
    for param in params:
        for state in optimizer.state[param].values():
            assert state.ndim == 0 or type(state) is type(param.data), "a state lies otherwise than its parameter"
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in (p.detach() for p in params)], norms


def assert_equal_up_to_one_sum(ranks: list[Any], alone: Any, dtype: torch.dtype) -> None:
    """What ``sharded`` returns on each rank, held against ``in_one_process``."""
    weights, norms = alone
    # The norms differ by the order of a sum in float64, and each step's rounding may fall to the other side.
    bound = {"rtol": 4 * STEPS * torch.finfo(dtype).eps, "atol": 4 * STEPS * torch.finfo(dtype).eps}
    for its_weights, its_norms in ranks:
        for ours, theirs in zip(its_weights, weights, strict=True):
            torch.testing.assert_close(ours, theirs, **bound)
            assert ours.eq(0).equal(theirs.eq(0)), "other zeros"
        assert its_norms == ranks[0][1], "the ranks have other norms"
        for ours, theirs in zip(its_norms, norms, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(theirs.dtype).eps, atol=0.0)


def check(cases: list[tuple[type, dict[str, Any], str, torch.dtype, str]]) -> None:
    results = worlds.run(4, in_many, cases)
    for i, (cls, options, layout, dtype, _) in enumerate(cases):
        try:
            assert_equal_up_to_one_sum(
                [of_rank[i] for of_rank in results], in_one_process(cls, options, layout, dtype), dtype
            )
        except AssertionError as error:
            raise AssertionError(f"{cls.__name__} on {layout} in {dtype} with {options}: {error}") from None


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout) -> None:
    check(
        [
            (cls, {**REGULARIZED, **more}, layout, dtype, backend)
            for cls, more in ((FusedRegAdamW, {}), (FusedRegSGD, {"momentum": 0.9, "dampening": 0.3}))
            for dtype, backend in (
                (torch.float32, FAST),
                (torch.bfloat16, FAST),
                (torch.float32, "triton, tables in Python" if FAST == "triton" else "reference"),
            )
        ]
    )


# -- stochastic rounding: by positions in the whole parameter


def rounded(backend: str, layout: str, place: Any) -> list[Tensor]:
    """Weights and buffers after some steps that are exact in float32, so that rounding is all that can differ."""
    params = []
    for i, (shape, _, _) in enumerate(LAYOUTS[layout]):
        whole = gradients_of([shape], 50 + i, torch.float64)[0].mul(64).round().div(64).bfloat16()
        params.append(torch.nn.Parameter(place(whole, i)))
    optimizer = FusedRegSGD(params, lr=0.25, momentum=0.5, stochastic_rounding=True, backend=backend)
    for step in range(STEPS):
        for i, (param, (shape, _, _)) in enumerate(zip(params, LAYOUTS[layout], strict=True)):
            param.grad = place(gradients_of([shape], step, torch.float64)[0].mul(64).round().div(64).bfloat16(), i)
        optimizer.step()
    found = [*params, *(optimizer.state[param]["momentum_buffer"] for param in params)]
    return [(each.full_tensor() if isinstance(each, DTensor) else each).detach() for each in found]


def rounded_in_many(names: list[str]) -> list[list[Tensor]]:
    mesh_of = functools.cache(lambda shape: init_device_mesh("cpu", shape))

    def place(layout: str, tensor: Tensor, i: int) -> Tensor:
        _, mesh, placements = LAYOUTS[layout][i]
        return tensor if mesh is None else distribute_tensor(tensor, mesh_of(mesh), placements)

    return [rounded(name, layout, functools.partial(place, layout)) for layout in LAYOUTS for name in names]


def positions_under_fsdp_and_tensor_parallel() -> None:
    """Of a model whose weights are their positions, and that torch shards twice along a dimension."""
    mesh = init_device_mesh("cpu", TWO_BY_TWO, mesh_dim_names=("dp", "tp"))
    model = torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.Linear(10, 7))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.arange(param.numel()).view(param.shape))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    for param in model.parameters():
        own = param.to_local()
        assert torch.equal(rounding.place_of(param, 0).positions(own.shape, own.device), own.long())


def test_positions_where_torch_shards_twice_along_a_dimension() -> None:
    worlds.run(4, positions_under_fsdp_and_tensor_parallel)


@needs_cpp
def test_stochastic_rounding_has_the_bits_of_one_process() -> None:
    names = ["cpp", "reference"]
    for of_rank in worlds.run(4, rounded_in_many, names):
        alone = (rounded("reference", layout, lambda tensor, _: tensor) for layout in LAYOUTS for _ in names)
        for ours, theirs in zip(of_rank, alone, strict=True):
            assert_same_bits(ours, theirs)


@needs_cpp
def test_every_rule_variant_and_mode() -> None:
    check(
        [
            (cls, {**regularized(cls, name), "penalty_mode": mode}, "several-meshes", torch.float32, FAST)
            for cls, name in OPTIMIZER_VARIANTS
            for mode in (cls.spec.modes if name == next(iter(cls.spec.variants)) else cls.spec.modes[:1])
        ]
    )
