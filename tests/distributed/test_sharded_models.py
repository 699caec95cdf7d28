"""sparsity_report, penalty and param_groups know a sharded model as the whole that it is, on each rank alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fusedreg
from fusedreg import FusedRegAdam, FusedRegSGD, flat_parameters

GROUPS = {"l1": 0.5, "l2": 0.25}


def make_model() -> nn.Module:
    """Some zeros, some rows and columns of nothing else, in dimensions that no number of ranks divides."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.Sequential(nn.Conv1d(7, 3, 2), nn.Linear(9, 6, bias=False))
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
            param[torch.rand(param.shape, generator=generator) < 0.4] = 0.0
            if param.ndim > 1:
                param[[0, 2]], param[:, 1] = 0.0, 0.0
        model[0].weight[3, 2] = float("nan")  # which is no zero
    return model


def names_of(groups: list[dict[str, Any]], model: nn.Module) -> list[list[str]]:
    names = {id(param): name.replace("_fsdp_wrapped_module.", "") for name, param in model.named_parameters()}
    return [[names[id(param)] for param in group["params"]] for group in groups]


Known = tuple[fusedreg.SparsityReport, list[list[str]], Tensor]


def known(model: nn.Module, norm_group: Any = None) -> Known:
    """What the three functions make of a model; a NaN that is in it is there for the first alone."""
    report = fusedreg.sparsity_report(model)
    with torch.no_grad():
        for param in model.parameters():
            param.nan_to_num_(1.0)
    groups = fusedreg.param_groups(model, **GROUPS)
    return report, names_of(groups, model), fusedreg.penalty(FusedRegAdam(groups, norm_group=norm_group))


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, also_fsdp: bool = False) -> nn.Module:
    """Columns and rows over one dimension of the mesh, beside plain parameters; rows over the other one, if so said."""
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp")) if also_fsdp else None
    tp = mesh["tp"] if mesh is not None else init_device_mesh("cpu", (size,))
    for module, placement in ((model[0], Shard(1)), (model[2][0], Shard(0)), (model[2][1], Shard(1))):
        weight = distribute_tensor(module.weight, tp, [placement])
        module.weight = nn.Parameter(weight)
    model[2][0].bias = nn.Parameter(distribute_tensor(model[2][0].bias, tp, [Replicate()]))
    if mesh is not None:
        for module in (model[1], model[2]):  # the rest stays plain, and replicated
            fully_shard(module, mesh=mesh["dp"])
    return model


def tensor_and_data_parallel(model: nn.Module) -> nn.Module:
    return tensor_parallel(model, also_fsdp=True)


def _known_of_sharded_models(ways: list[Callable[[nn.Module], nn.Module]]) -> list[Known]:
    return [known(shard(make_model())) for shard in ways]


@pytest.mark.parametrize(
    ("world_size", "ways"), [(2, [fsdp2, tensor_parallel]), (4, [fsdp2, hsdp, tensor_and_data_parallel])]
)
def test_dtensors(world_size: int, ways: list[Callable[[nn.Module], nn.Module]]) -> None:
    expected_report, expected_names, expected_penalty = known(make_model())
    assert 0 < expected_report.empty_columns < expected_report.empty_rows < expected_report.zeros
    results = worlds.run(world_size, _known_of_sharded_models, ways)
    for found in results:
        for way, (report, names, penalty), of_the_first in zip(ways, found, results[0], strict=True):
            assert report == expected_report, way
            assert names == expected_names, way
            torch.testing.assert_close(penalty, expected_penalty)
            assert torch.equal(penalty, of_the_first[2]), way


def fsdp1(module: nn.Module, use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def _known_of_fsdp1() -> tuple[fusedreg.SparsityReport, Known]:
    reports = []
    for use_orig_params in (False, True):
        model = make_model()
        model[2] = fsdp1(model[2], use_orig_params)
        model = fsdp1(model, use_orig_params)
        with pytest.raises(ValueError, match="FullyShardedDataParallel has shared out"):
            fusedreg.sparsity_report(model.parameters())
        if not use_orig_params:
            reports.append(fusedreg.sparsity_report(model))
            with pytest.raises(ValueError, match="use_orig_params=True"):
                fusedreg.param_groups(model)
    with pytest.raises(RuntimeError, match=r"norm_group=model\.process_group"):
        fusedreg.penalty(FusedRegAdam(fusedreg.param_groups(model, l1=0.1)))
    return reports[0], known(model, norm_group=model.process_group)


def test_fsdp1() -> None:
    expected_report, expected_names, expected_penalty = known(make_model())
    results = worlds.run(2, _known_of_fsdp1)
    for report, (again, names, penalty) in results:
        assert report == again == expected_report
        assert names == expected_names
        torch.testing.assert_close(penalty, expected_penalty)
        assert torch.equal(penalty, results[0][1][2])


def test_what_was_gathered_is_gone_and_its_id_comes_again(monkeypatch) -> None:
    """The views of one wrapped module after the other, many of which lie where another one was."""
    wrapped = [nn.Identity() for _ in range(50)]
    monkeypatch.setattr(flat_parameters, "_wrapped_modules", lambda model: wrapped)
    monkeypatch.setattr(flat_parameters, "_gathered", lambda module, _: ((name, torch.zeros(1)) for name in "ab"))
    names = [name for name, _ in flat_parameters.whole_parameters(nn.Sequential(*wrapped))]
    assert names == [*"ab", *(f"{i}.{name}" for i in range(50) for name in "ab")]


def _flat_parameters_of_one_kind() -> tuple[int, ...]:
    model = nn.ModuleList(
        fsdp1(module, use_orig_params=False)
        for module in (
            nn.Linear(4, 3, bias=False),
            nn.LayerNorm(4),
            nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2, bias=False)),
        )
    )
    groups = fusedreg.param_groups(model, **GROUPS)
    return tuple(names_of(groups, model))


def test_flat_parameters_of_one_kind() -> None:
    for weights, exempt in worlds.run(2, _flat_parameters_of_one_kind):
        assert weights == ["0._flat_param", "2._flat_param"]
        assert exempt == ["1._flat_param"]


def _zero_penalties() -> tuple[Any, ...]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    whole = known(model)[2]
    groups = fusedreg.param_groups(model, l1=0.5)
    inner = functools.partial(FusedRegSGD, norm_group=distributed.group.WORLD)
    zero = ZeroRedundancyOptimizer(groups, inner, lr=0.1, l2=0.25)
    return whole, fusedreg.penalty(zero), fusedreg.penalty(zero.optim)


def test_zero_redundancy_optimizer() -> None:
    results = worlds.run(2, _zero_penalties)
    for whole, of_the_wrapper, of_the_inner in results:
        torch.testing.assert_close(of_the_wrapper, whole)
        torch.testing.assert_close(of_the_inner, whole)
        assert torch.equal(of_the_inner, results[0][2])
