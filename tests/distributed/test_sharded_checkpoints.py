"""torch.distributed.checkpoint: saved on four ranks, loaded on one, two and three, to go on as if nothing had been.

One world saves all rules' optimizers, ours and torch's; others load them. A norm is taken and does not clip: where it
clips, its sum depends on the number of ranks, and bits could not be compared.
"""

from __future__ import annotations

import copy
import functools
import itertools
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import worlds
from helpers import IDS, OPTIMIZER_VARIANTS, TWINS, assert_same_bits, known, variant_of
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fusedreg
from fusedreg import FusedRegAdam, FusedRegSGD

FORMS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}
STRENGTHS = {"l2": 0.1, "clip_value": 1.5, "max_grad_norm": 1e6}
STEPS = 2

Contents = dict[str, dict[str, Tensor]]


def _cases() -> dict[str, tuple[type, str, torch.dtype]]:
    """Of each class whose twin takes DTensors, the variant with the most options. torch's Rprop writes by masks, and
    its ASGD reads its scalars, which DTensors refuse."""
    fullest = {}
    for case, (cls, variant) in zip(IDS, OPTIMIZER_VARIANTS, strict=True):
        if cls.spec.twin in (None, torch.optim.Rprop, torch.optim.ASGD):
            continue
        if cls not in fullest or len(variant_of(cls, variant)) > len(variant_of(*fullest[cls][1])):
            fullest[cls] = case, (cls, variant)
    return {case: (*each, torch.float32) for case, each in fullest.values()}


CASES = _cases()
# 16 bits are what the parameters have, and not their scalars: a step count, a momentum's gain.
CASES |= {
    f"{case}-bfloat16": (cls, variant, torch.bfloat16)
    for case, (cls, variant, _) in _cases().items()
    if cls in (FusedRegAdam, FusedRegSGD)
}


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


class Net(nn.Module):
    """Shards of other sizes on each number of ranks, and on four an empty one. On one rank, plain parameters."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.last = nn.Linear(7, 3, bias=False, dtype=dtype)
        self._shard()

    def _shard(self) -> None:
        if distributed.get_world_size() > 1:
            fully_shard(self, mesh=mesh())


def as_param(whole: Tensor, param: Tensor) -> Tensor:
    """A tensor with the dtype of ``whole``, laid out as ``param`` is."""
    if isinstance(param, DTensor) and whole.shape == param.shape:
        return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
    return whole.clone()


def groups_of(model: nn.Module, l1: float, is_other: bool = False, is_split: bool = False) -> list[dict[str, Any]]:
    """Weights and the rest. In another order if ``is_other``; if ``is_split``, more groups, and in another order."""
    weights, rest = [model.first.weight, model.last.weight], [model.first.bias, model.norm.weight, model.norm.bias]
    if is_other:
        weights, rest = weights[::-1], rest[::-1]
    if not is_split:
        return [{"params": weights, "l1": l1}, {"params": rest, "lr": 0.03}]
    return [{"params": rest, "lr": 0.03}, *({"params": [weight], "l1": l1} for weight in weights)]


def make(case: str, model: nn.Module, l1: float = 0.02, is_torch: bool = False, **order: bool) -> torch.optim.Optimizer:
    cls, variant, _ = CASES[case]
    options = {**known(cls, lr=0.05, weight_decay=0.01), **variant_of(cls, variant)}
    groups = groups_of(model, l1, **order)
    if is_torch:
        return TWINS[cls]([{key: group[key] for key in group if key != "l1"} for group in groups], **options)
    return cls(groups, **STRENGTHS, **options)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
    """Steps whose gradients depend on the parameter's name and on nothing else."""
    for step in range(first, first + STEPS):
        for name, param in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
            param.grad = as_param(torch.randn(param.shape, generator=generator).to(param.dtype), param)
        optimizer.step()
    optimizer.zero_grad()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contents:
    """Copies of all weights and states, whole, by name."""
    found = {}
    for name, param in model.named_parameters():
        own = {"weight": param.detach(), **optimizer.state[param]}
        found[name] = {
            key: value.full_tensor() if isinstance(value, DTensor) else value.clone() for key, value in own.items()
        }
    return found


def by_hand(case: str, saved: Contents) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Ours, as it was saved, without a checkpoint."""
    model = Net(CASES[case][2], seed=2)
    optimizer = make(case, model)
    for name, param in model.named_parameters():
        own = {key: as_param(value, param) for key, value in saved[name].items()}
        with torch.no_grad():
            param.copy_(own.pop("weight"))
        if own:
            optimizer.state[param] = own
    return model, optimizer


def assert_close(ours: Tensor, expected: Tensor, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(ours, expected, **tolerance, msg=lambda message: f"{what}: {message}")


def assert_same(ours: Contents, expected: Contents, but: tuple[str, ...] = ()) -> None:
    """The same bits under the same names, ``but`` for some states that only ``expected`` has."""
    assert ours.keys() == expected.keys()
    for name in expected:
        assert ours[name].keys() == expected[name].keys() - set(but), name
        for key, value in ours[name].items():
            assert_close(value, expected[name][key], f"{name} {key}", rtol=0, atol=0)


def saved_by(model: nn.Module, optimizer: torch.optim.Optimizer, forms: Iterable[str] = FORMS) -> dict[str, Any]:
    states = {form: get_optimizer_state_dict(model, optimizer, options=FORMS[form]) for form in forms}
    return {"model": get_model_state_dict(model), **states}


def _save(folder: str) -> tuple[dict[str, dict[str, Contents]], dict[str, Contents]]:
    """Saves ours and torch's; returns what they had come to, and where ours then goes without a checkpoint."""
    runs: dict[str, dict[str, Any]] = {"ours": {}, "torch": {}}
    for case in CASES:
        for source in runs:
            model = Net(CASES[case][2], seed=0)
            optimizer = make(case, model, is_torch=source == "torch")
            go_on(model, optimizer, 0)
            runs[source][case] = model, optimizer
    saved = {source: {case: saved_by(*run) for case, run in runs[source].items()} for source in runs}
    dcp.save(saved, checkpoint_id=folder)
    before = {source: {case: contents(*run) for case, run in runs[source].items()} for source in runs}
    for run in runs["ours"].values():
        go_on(*run, STEPS)
    return before, {case: contents(*run) for case, run in runs["ours"].items()}


def _load(folder: str, source: str, target: str, form: str, saved: dict[str, Contents]) -> dict[str, Contents]:
    """Loads into optimizers that are made in another order and with other strengths; returns where they then go."""
    runs, templates = {}, {}
    for case in saved:
        model = Net(CASES[case][2], seed=1)
        # torch reads a nested dict by groups, a flat one by parameters
        order = {"is_other": True, "is_split": form == "flat"}
        optimizer = make(case, model, 0.02 if source == "torch" else 0.9, target == "torch", **order)
        reader = fusedreg.torch_twin(optimizer) if source == "torch" else optimizer
        runs[case] = model, optimizer, reader
        templates[case] = saved_by(model, reader, [form])
    dcp.load({source: templates}, checkpoint_id=folder)
    results = {}
    for case, (model, optimizer, reader) in runs.items():
        set_model_state_dict(model, templates[case]["model"])
        set_optimizer_state_dict(model, reader, templates[case][form], options=FORMS[form])
        if reader is not optimizer:
            optimizer.load_state_dict(reader.state_dict())
        # torch has no use for our scalar
        assert_same(contents(model, optimizer), saved[case], but=("momentum_gain",) if target == "torch" else ())
        if target == "ours":
            same = by_hand(case, saved[case])
            go_on(model, optimizer, STEPS)
            go_on(*same, STEPS)
            results[case] = contents(model, optimizer)
            assert_same(results[case], contents(*same))
            assert {group["l1"] for group in optimizer.param_groups} == {0.0, 0.02}
    return results


Saved = tuple[str, dict[str, dict[str, Contents]], dict[str, Contents]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    return folder, *worlds.run(4, _save, folder)[0]


def load(
    saved: Saved, world_size: int, source: str, target: str, form: str, cases: Iterable[str]
) -> dict[str, Contents]:
    folder, before, _ = saved
    some = {case: before[source][case] for case in cases}
    return worlds.run(world_size, _load, folder, source, target, form, some)[0]


# Every rule once in each form; the other numbers of ranks with two of them, which have all kinds of state and dtype.
SOME = [case for case, (cls, _, _) in CASES.items() if cls in (FusedRegAdam, FusedRegSGD)]


@pytest.mark.parametrize(
    ("world_size", "form", "cases"),
    [(1, "nested", SOME), (2, "nested", CASES), (2, "flat", SOME), (3, "flat", CASES)],
    ids=["1-nested", "2-nested", "2-flat", "3-flat"],
)
def test_ours_goes_on_as_it_would_have(saved, world_size: int, form: str, cases: Iterable[str]) -> None:
    expected = saved[2]
    for case, found in load(saved, world_size, "ours", "ours", form, cases).items():
        for name in found:
            for key, value in found[name].items():  # the kernels may round otherwise at a shard's end
                assert_close(value, expected[case][name][key], f"{case} {name} {key}")


@pytest.mark.parametrize(
    ("world_size", "form", "cases"),
    [(1, "flat", CASES), (2, "nested", CASES), (3, "flat", SOME)],
    ids=["1-flat", "2-nested", "3-flat"],
)
def test_torch_s_goes_on_with_ours(saved, world_size: int, form: str, cases: Iterable[str]) -> None:
    load(saved, world_size, "torch", "ours", form, cases)


@pytest.mark.parametrize(("form", "cases"), [("nested", CASES), ("flat", SOME)], ids=FORMS)
def test_ours_goes_on_with_torch_s(saved, form: str, cases: Iterable[str]) -> None:
    load(saved, 2, "ours", "torch", form, cases)


# -- ZeroRedundancyOptimizer, whose state dict is that of one process


class WholeNet(Net):
    """With plain parameters on any number of ranks."""

    def _shard(self) -> None:
        pass


def tensors_of(saved: dict[str, Any]) -> list[Tensor]:
    states = saved["optimizer"]["state"]
    found = [*saved["model"].values()]
    return found + [states[index][name] for index in sorted(states) for name in sorted(states[index])]


def zero_of(case: str, model: nn.Module, l1: float) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    cls, variant, _ = CASES[case]
    options = {"lr": 0.05, "weight_decay": 0.01, **STRENGTHS, **variant_of(cls, variant)}
    on_each_rank = functools.partial(cls, norm_group=distributed.group.WORLD)
    return ZeroRedundancyOptimizer(groups_of(model, l1), on_each_rank, **options)


def _zero(saved: dict[str, Any] | None) -> dict[str, Any]:
    """Steps, consolidates and goes on: in ZeRO, and in one process. If ``saved``, that is what it starts from."""
    results = {}
    for case in CASES:
        model = WholeNet(CASES[case][2], seed=0 if saved is None else 1)
        zero = zero_of(case, model, 0.02 if saved is None else 0.9)
        if saved is not None:
            model.load_state_dict(saved[case]["model"])
            zero.load_state_dict(saved[case]["optimizer"])
        else:
            go_on(model, zero, 0)
            zero.consolidate_state_dict()
        if distributed.get_rank() == 0 and saved is None:
            results[case] = copy.deepcopy({"model": model.state_dict(), "optimizer": zero.state_dict()})
        go_on(model, zero, STEPS)
        zero.consolidate_state_dict()
        if distributed.get_rank() == 0:
            results.setdefault(case, {})["then"] = {"model": model.state_dict(), "optimizer": zero.state_dict()}
    return results


def test_zero_consolidated_into_one_process_and_into_another_number() -> None:
    (saved, *_) = worlds.run(4, _zero, None)
    (again, *_) = worlds.run(2, _zero, saved)
    for case in CASES:
        assert_same_bits(tensors_of(again[case]["then"]), tensors_of(saved[case]["then"]))
        model = WholeNet(CASES[case][2], seed=1)
        optimizer = make(case, model, 0.9)
        model.load_state_dict(saved[case]["model"])
        optimizer.load_state_dict(saved[case]["optimizer"])
        go_on(model, optimizer, STEPS)
        assert_same_bits(
            tensors_of({"model": model.state_dict(), "optimizer": optimizer.state_dict()}),
            tensors_of(saved[case]["then"]),
        )


# -- states in a dtype of their own


def _into_another_state_dtype() -> None:
    for first, second, form in [(None, torch.bfloat16, "nested"), (torch.bfloat16, None, "flat")]:
        model = Net(torch.float32, seed=0)
        optimizer = FusedRegAdam(model.parameters(), lr=0.05, l1=0.02, state_dtype=first)
        go_on(model, optimizer, 0)
        saved = saved_by(model, optimizer, [form])
        narrow = saved_by(model, optimizer, ["flat"])["flat"]["state.first.weight.exp_avg_sq"]
        assert narrow.dtype == (first or torch.float32)
        resumed_model = Net(torch.float32, seed=1)
        resumed = FusedRegAdam(resumed_model.parameters(), state_dtype=second)
        set_model_state_dict(resumed_model, saved["model"])
        set_optimizer_state_dict(resumed_model, resumed, saved[form], options=FORMS[form])
        dtype = second or torch.float32
        found, expected = contents(resumed_model, resumed), contents(model, optimizer)
        for name, own in expected.items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert_close(found[name][key], own[key].to(dtype), f"{name} {key}", rtol=0, atol=0)
        go_on(resumed_model, resumed, STEPS)
        assert {own["exp_avg_sq"].dtype for own in resumed.state.values()} == {dtype}


def test_into_another_state_dtype() -> None:
    worlds.run(2, _into_another_state_dtype)


def _states_in_8_bits() -> None:
    """Saved as float32, and loaded into the very codes, which are a process's own; and by neither as they are."""
    options = {"state_dtype": "int8", "stochastic_rounding": True}
    for form in FORMS:
        model = Net(torch.float32, seed=0)
        optimizer = FusedRegAdam(model.parameters(), lr=0.05, l1=0.02, **options)
        go_on(model, optimizer, 0)
        saved = copy.deepcopy(saved_by(model, optimizer, [form]))
        resumed_model = Net(torch.float32, seed=1)
        resumed = FusedRegAdam(resumed_model.parameters(), **options)
        set_model_state_dict(resumed_model, saved["model"])
        set_optimizer_state_dict(resumed_model, resumed, saved[form], options=FORMS[form])
        go_on(model, optimizer, STEPS)
        go_on(resumed_model, resumed, STEPS)
        expected = contents(model, optimizer)
        for name, own in contents(resumed_model, resumed).items():
            assert_same_bits([own[key] for key in expected[name]], list(expected[name].values()))
            assert own["exp_avg_sq"].dtype == torch.uint8
    with pytest.raises(ValueError, match="Invalid native value: True with states of DTensors"):
        optimizer.state_dict(native=True)


def test_states_in_8_bits() -> None:
    worlds.run(2, _states_in_8_bits)


# -- FSDP1: a scalar state of a FlatParameter is that of all parameters in it


def _fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def make_fsdp1(use_orig_params: bool, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        how = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        model = nn.Sequential(nn.Linear(5, 7), FullyShardedDataParallel(nn.Linear(7, 3), **how))
        return FullyShardedDataParallel(model, **how)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(STEPS):
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    runs = [(cls, variant_of(cls, variant)) for cls, variant, _ in (CASES[case] for case in _cases())]
    model = make_fsdp1(True, 0)
    with pytest.raises(ValueError, match=r"torch\.int8 for parameters of FullyShardedDataParallel"):
        train(model, FusedRegAdam(model.parameters(), state_dtype="int8"), 1)
    every_way = list(itertools.product((True, False), FORMS))
    for i, (cls, options) in enumerate((*runs, (FusedRegAdam, {"state_dtype": torch.bfloat16}))):
        # The others in one way each: what is by rule here is the names of states, and which are scalars.
        for use_orig_params, form in every_way if cls in (FusedRegAdam, FusedRegSGD) else [every_way[i % 4]]:
            model = make_fsdp1(use_orig_params, 0)
            optimizer = cls(model.parameters(), lr=0.05, l1=0.02, **options)
            train(model, optimizer, 1)
            saved = copy.deepcopy(saved_by(model, optimizer, [form]))
            train(model, optimizer, 2)

            resumed_model = make_fsdp1(use_orig_params, 3)
            resumed = cls(resumed_model.parameters(), lr=0.5, l1=0.9, **options)
            set_model_state_dict(resumed_model, saved["model"])
            set_optimizer_state_dict(resumed_model, resumed, saved[form], options=FORMS[form])
            train(resumed_model, resumed, 2)
            assert_same_bits(list(resumed_model.parameters()), list(model.parameters()))


def test_fsdp1() -> None:
    worlds.run(2, _fsdp1)
