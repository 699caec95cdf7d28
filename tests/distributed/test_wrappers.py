"""What spreads a model over processes, with everything on, against the same model in one process.

Weights and norm are equal up to the order of one sum; each wrapper is used as docs/distributed.md says.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import worlds
from helpers import OPTIMIZER_VARIANTS, FusedRegAdam, FusedRegAdamW, FusedRegSGD, known, variant_of
from torch import Tensor, distributed, nn
from torch.distributed import _functional_collectives as functional_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

DTYPE = torch.float64
EVERYTHING: dict[str, Any] = dict(lr=0.02, weight_decay=0.1, l1=0.05, l2=0.07, clip_value=0.02, max_grad_norm=0.05)
STEPS = 3
Result = tuple[dict[str, Tensor], list[Tensor]]


def deprecated(module: str) -> Any:
    """Imports what compiles functions with torch.jit, of which newer versions of torch warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(module)


class Block(nn.Module):
    """A layer that is split by columns, one by rows, and a norm that every rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(torch.tanh(self.up(x))))


def make_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).to(DTYPE)


def make_batch(step: int) -> Tensor:
    return torch.randn(8, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def train(
    model: nn.Module, optimizer: Any, norm_of: Any = None, batch_of: Callable[[int], Tensor] = make_batch
) -> list[Tensor]:
    norms = []
    for step in range(STEPS):
        loss_of(model(batch_of(step))).backward()
        optimizer.step()
        norms.append((norm_of or optimizer).grad_norm)
        optimizer.zero_grad()
    return norms


def my_half(step: int) -> Tensor:
    """Of the batch, where each of two ranks, or of two halves of the ranks, takes one: gradients are averaged."""
    size = distributed.get_world_size()
    return make_batch(step).chunk(size)[distributed.get_rank()]


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


# -- each takes the class and its options, and returns the weights and the norms


def in_one_process(cls: type, options: dict[str, Any]) -> Result:
    model = make_model()
    norms = train(model, cls(model.parameters(), **options))
    return whole(model), norms


def with_ddp(cls: type, options: dict[str, Any]) -> Result:
    model = nn.parallel.DistributedDataParallel(make_model())
    norms = train(model, cls(model.parameters(), **options), batch_of=my_half)
    return whole(model.module), norms


def _shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def with_fsdp2(cls: type, options: dict[str, Any]) -> Result:
    model = _shard(make_model(), mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    norms = train(model, cls(model.parameters(), **options), batch_of=my_half)
    return whole(model), norms


def with_hsdp(cls: type, options: dict[str, Any]) -> Result:
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = _shard(make_model(), mesh=mesh)
    norms = train(model, cls(model.parameters(), **options), batch_of=my_half)
    return whole(model), norms


def _parallelize(model: nn.Sequential, mesh: Any) -> nn.Sequential:
    for block in (model[0], model[1]):
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def with_tensor_parallel(cls: type, options: dict[str, Any]) -> Result:
    model = _parallelize(make_model(), init_device_mesh("cpu", (distributed.get_world_size(),)))
    norms = train(model, cls(model.parameters(), **options))
    return whole(model), norms


def with_fsdp2_and_tensor_parallel(cls: type, options: dict[str, Any]) -> Result:
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    model = _shard(_parallelize(make_model(), mesh["tensor"]), mesh=mesh["data"])
    norms = train(
        model,
        cls(model.parameters(), **options),
        batch_of=lambda step: make_batch(step).chunk(2)[mesh.get_local_rank("data")],
    )
    return whole(model), norms


def with_zero(cls: type, options: dict[str, Any]) -> Result:
    model = make_model()
    on_each_rank = functools.partial(cls, norm_group=distributed.group.WORLD)
    optimizer = deprecated("torch.distributed.optim").ZeroRedundancyOptimizer(
        model.parameters(), on_each_rank, **options
    )
    norms = train(model, optimizer, optimizer.optim)
    return whole(model), norms


def with_fsdp1(cls: type, options: dict[str, Any]) -> Result:
    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = cls(model.parameters(), norm_group=model.process_group, **options)
    norms = train(model, optimizer, batch_of=my_half)
    with FullyShardedDataParallel.summon_full_params(model):
        return {name.replace("_fsdp_wrapped_module.", ""): weight for name, weight in whole(model).items()}, norms


def with_pipeline(cls: type, options: dict[str, Any]) -> Result:
    """By hand: the first rank has the first block, the second the rest."""
    model, rank = make_model(), distributed.get_rank()
    stage = model[:1] if rank == 0 else model[1:]
    optimizer = cls(stage.parameters(), norm_group=distributed.group.WORLD, **options)
    norms = []
    for step in range(STEPS):
        between = torch.empty(8, 6, dtype=DTYPE)
        if rank == 0:
            output = stage(make_batch(step))
            distributed.send(output.detach(), 1)
            distributed.recv(between, 1)
            output.backward(between)
        else:
            distributed.recv(between, 0)
            between.requires_grad_()
            loss_of(stage(between)).backward()
            assert between.grad is not None
            distributed.send(between.grad, 0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    for i, each in enumerate(model):
        for param in each.parameters():
            distributed.broadcast(param.data, 0 if i == 0 else 1)
    return whole(model), norms


WAYS = {
    "ddp": (2, with_ddp),
    "fsdp2": (2, with_fsdp2),
    "fsdp2-on-four": (4, with_fsdp2),
    "hsdp": (4, with_hsdp),
    "tensor-parallel": (2, with_tensor_parallel),
    "fsdp2-and-tensor-parallel": (4, with_fsdp2_and_tensor_parallel),
    "zero": (2, with_zero),
    "fsdp1": (2, with_fsdp1),
    "pipeline": (2, with_pipeline),
}


def on_rank(way: str, cases: list[tuple[type, dict[str, Any]]]) -> list[Result]:
    return [WAYS[way][1](*case) for case in cases]


@pytest.mark.parametrize("way", WAYS)
def test_ends_as_one_process(way) -> None:
    cases = [(FusedRegAdamW, EVERYTHING), (FusedRegSGD, {**EVERYTHING, "momentum": 0.9, "dampening": 0.3})]
    if way in ("fsdp2", "zero"):  # one of DTensors and one of norm_group see every rule
        cases = [(cls, {**known(cls, **EVERYTHING), **variant_of(cls, name)}) for cls, name in OPTIMIZER_VARIANTS]
    ranks = worlds.run(WAYS[way][0], on_rank, way, cases)
    for i, (cls, options) in enumerate(cases):
        weights, norms = in_one_process(cls, options)
        for result in ranks:
            its_weights, its_norms = result[i]
            assert its_norms == ranks[0][i][1], "the ranks have other norms"
            assert all(norm > EVERYTHING["max_grad_norm"] for norm in norms), "nothing is clipped"
            torch.testing.assert_close(its_norms, norms, rtol=1e-12, atol=0.0, check_dtype=False)
            assert its_weights.keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(its_weights[name], weight, rtol=1e-10, atol=1e-10)
                assert its_weights[name].eq(0).equal(weight.eq(0)), f"other zeros in {name}"


# -- what a wrapper may do to parameters and gradients


def refused(model: nn.Module, optimizer: Any, state: Any) -> tuple[str, bool]:
    """The message of a step's error, "" where there is none, and whether the step changed anything."""
    before = [param.detach().clone() for param in model.parameters()]
    message = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    changed = not all(map(torch.equal, before, (param.detach() for param in model.parameters())))
    return message, changed or bool(state)


def with_flat_parameters(strategy: ShardingStrategy, norm_group: bool) -> tuple[str, bool]:
    model = FullyShardedDataParallel(
        make_model(), device_id=torch.device("cpu"), use_orig_params=False, sharding_strategy=strategy
    )
    group = model.process_group if norm_group else None
    optimizer = FusedRegAdam(model.parameters(), max_grad_norm=0.05, norm_group=group)
    loss_of(model(my_half(0))).backward()
    return refused(model, optimizer, optimizer.state)


def test_flat_parameters_need_their_group() -> None:
    for message, has_changed in worlds.run(2, with_flat_parameters, ShardingStrategy.FULL_SHARD, False):
        assert "max_grad_norm=..., norm_group=model.process_group)" in message
        assert not has_changed
    for message, has_changed in worlds.run(2, with_flat_parameters, ShardingStrategy.FULL_SHARD, True):
        assert message == ""
        assert has_changed


def with_a_norm_from_the_second_step_on(kind: str) -> list[Tensor | str]:
    """The norms of two steps, or the error in place of one."""
    model, norm_group = make_model(), None
    if kind == "fsdp2":
        model = _shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif kind == "norm_group":  # each rank a half of the layers
        model, norm_group = model[distributed.get_rank() :: 2], distributed.group.WORLD
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = FusedRegAdam(model.parameters(), lr=0.0, norm_group=norm_group)
    found: list[Tensor | str] = []
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        try:
            optimizer.step()
            found.append(optimizer.grad_norm)
        except RuntimeError as error:
            found.append(str(error))
        optimizer.param_groups[0]["max_grad_norm"] = 1e9
    return found


@pytest.mark.parametrize("kind", ["fsdp2", "norm_group", "fsdp1"])
def test_a_norm_that_is_switched_on_later_is_the_models_too(kind) -> None:
    elements = sum(param.numel() for param in make_model().parameters())
    for first, second in worlds.run(2, with_a_norm_from_the_second_step_on, kind):
        assert first is None
        if kind == "fsdp1":
            assert "norm_group=model.process_group" in second
        else:
            assert second.item() == pytest.approx(elements**0.5, rel=1e-12)


def with_zero_and_no_group() -> tuple[str, bool]:
    model = make_model()
    zero = deprecated("torch.distributed.optim").ZeroRedundancyOptimizer
    optimizer = zero(model.parameters(), FusedRegAdam, max_grad_norm=0.05)
    loss_of(model(make_batch(0))).backward()
    return refused(model, optimizer, optimizer.optim.state)


def test_zero_needs_its_group() -> None:
    for message, has_changed in worlds.run(2, with_zero_and_no_group):
        assert "functools.partial(FusedRegAdam, norm_group=torch.distributed.group.WORLD)" in message
        assert not has_changed


def with_mixed_precision(reduce_dtype: torch.dtype) -> tuple[str, Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    model = _shard(make_model().float(), mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    optimizer = FusedRegAdam(model.parameters(), **EVERYTHING, backend="cpp")
    gradients = []
    for step in range(STEPS):
        loss_of(model(my_half(step).float())).backward()
        gradients.append([param.grad.full_tensor() for param in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    ours = torch.cat([weight.flatten() for weight in whole(model).values()])
    alone = make_model().float()
    optimizer = FusedRegAdam(alone.parameters(), **EVERYTHING)
    for of_step in gradients:
        for param, grad in zip(alone.parameters(), of_step, strict=True):
            param.grad = grad
        optimizer.step()
    return ours, torch.cat([param.detach().flatten() for param in alone.parameters()])


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_policies(reduce_dtype) -> None:
    """Shards are fp32, and so are the gradients that FSDP2 leaves, whatever it computed and reduced in."""
    for ours, alone in worlds.run(2, with_mixed_precision, reduce_dtype):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


def with_a_gradient_under_way(first_is_plain: bool) -> tuple[Tensor, Tensor, bool]:
    """The weights after gradients that collectives are still bringing, and after plain ones."""
    results = []
    was_under_way = False
    for is_plain in (True, False):
        param = nn.Parameter(torch.linspace(-1, 1, 40, dtype=DTYPE))
        optimizer = FusedRegAdam([param], **EVERYTHING)
        for step in range(STEPS):
            mine = torch.linspace(1, 2, 40, dtype=DTYPE) * (1 + distributed.get_rank())
            grad = functional_collectives.all_reduce(mine, "sum", distributed.group.WORLD)
            if is_plain or (first_is_plain and step == 0):
                grad = grad.trigger_wait()
            else:
                was_under_way = type(grad) is not Tensor
            param.grad = grad
            optimizer.step()
        results.append(param.detach())
    return results[0], results[1], was_under_way


@pytest.mark.parametrize("first_is_plain", [True, False])
def test_gradients_that_are_under_way(first_is_plain) -> None:
    for plain, under_way, was_under_way in worlds.run(2, with_a_gradient_under_way, first_is_plain):
        assert was_under_way
        assert plain.equal(under_way)


def with_grad_scaler(cls: type, options: dict[str, Any]) -> tuple[Tensor, float]:
    """One gradient of the second step is infinite, on the second rank."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    optimizer, scaler = cls([param], lr=0.1, **options), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(STEPS):
        scaler.scale(torch.ones(()))
        grad = torch.full((5, 3), 8.0 * (step + 1))
        if step == 1:
            grad[4, 2] = torch.inf
        param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        scaler.step(optimizer)
        scaler.update()
    return param.full_tensor().detach(), scaler.get_scale()


def test_a_gradient_that_overflows_on_one_rank_skips_the_step_on_all() -> None:
    theirs = worlds.run(2, with_grad_scaler, torch.optim.Adam, {"fused": True})
    ours = worlds.run(2, with_grad_scaler, FusedRegAdam, {"max_grad_norm": 1e9})
    assert [scale for _, scale in ours] == [scale for _, scale in theirs] == [4.0, 4.0]
    for (our_weights, _), (their_weights, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_weights, their_weights)


def with_refused_gradients() -> list[str]:
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    messages = []

    def step(tensor: Tensor, grad: Tensor, **options: Any) -> None:
        param = nn.Parameter(tensor)
        optimizer = FusedRegAdam([param], **{**EVERYTHING, **options})
        param.grad = grad
        try:
            optimizer.step()
            messages.append("")
        except (ValueError, RuntimeError) as error:
            assert not optimizer.state
            messages.append(str(error))

    tensor = torch.ones(4, 3, dtype=DTYPE)
    sharded = distribute_tensor(tensor, mesh, [Shard(0)])
    step(sharded, distribute_tensor(tensor, other, [Replicate(), Shard(0)]))
    step(DTensor.from_local(tensor, mesh, [Partial()]), DTensor.from_local(tensor, mesh, [Partial()]))
    step(sharded, sharded, differentiable=True, max_grad_norm=None)
    return messages


def test_refused() -> None:
    for messages in worlds.run(2, with_refused_gradients):
        assert "Invalid gradient: its mesh is" in messages[0]
        assert "Invalid parameter: its placements are (Partial(sum),)" in messages[1]
        assert "differentiable=True does not work on DTensors" in messages[2]


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Invalid norm_group: a str \(allowed: None, a ProcessGroup of this rank\)"):
        FusedRegAdam([nn.Parameter(torch.ones(2))], norm_group="world")


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_a_parameter_in_the_backward_pass(max_grad_norm) -> None:
    """Each would be clipped by its own norm."""
    model, like = make_model(), make_model()
    apply = deprecated("torch.distributed.optim")._apply_optimizer_in_backward
    apply(FusedRegAdam, model.parameters(), {"lr": 0.05, "l1": 0.01, "max_grad_norm": max_grad_norm})
    if max_grad_norm is not None:
        with pytest.raises(RuntimeError, match="max_grad_norm does not work with _apply_optimizer_in_backward"):
            loss_of(model(make_batch(0))).backward()
        return
    loss_of(model(make_batch(0))).backward()
    optimizer = FusedRegAdam(like.parameters(), lr=0.05, l1=0.01)
    loss_of(like(make_batch(0))).backward()
    optimizer.step()
    assert all(map(torch.equal, whole(model).values(), whole(like).values()))
