"""torch.distributed's wrappers around an optimizer, in a single process: what they do to the twin, they do to ours."""

from __future__ import annotations

import contextlib
import inspect
import io

import pytest
import torch
from helpers import FusedRegAdam, FusedRegSGD, assert_same_bits
from torch import nn
from twin_pairs import (
    CONFIGURATIONS,
    PLAIN,
    TWINS,
    as_resumed,
    assert_alike,
    assert_close,
    contents,
    every_configuration,
    every_rival,
    few_configurations,
    make_model,
    train,
)

distributed = pytest.importorskip("torch.distributed")
checkpointing = pytest.importorskip("torch.distributed.checkpoint.state_dict")
pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@contextlib.contextmanager
def a_group_of_one():
    backend = "nccl" if torch.get_default_device().type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


# -- torch.distributed.checkpoint: state dicts by parameter name


FORMS = {"nested": {}, "flat": {"flatten_optimizer_state_dict": True}}
# A flat dict is read by the keys of the optimizer that loads it, and a twin's lacks ours: see the test below.
WAYS = [
    (form, way)
    for form in FORMS
    for way in ("to-torch", "from-torch", "to-ours")
    if (form, way) != ("flat", "from-torch")
]


@pytest.mark.parametrize(("form", "direction"), WAYS, ids=map("-".join, WAYS))
@every_configuration
def test_state_dicts_by_name(configuration, direction, form, backend) -> None:
    """get_optimizer_state_dict and set_optimizer_state_dict, into an optimizer that has not stepped."""
    cls, flags = CONFIGURATIONS[configuration]

    def ours(params):
        return cls(params, backend=backend, **PLAIN, **flags)

    def twin(params):
        return TWINS[cls](params, **PLAIN, **flags)

    first, second = {"to-torch": (ours, twin), "from-torch": (twin, ours), "to-ours": (ours, ours)}[direction]
    options = checkpointing.StateDictOptions(**FORMS[form])

    model = make_model()
    optimizer = first(model.parameters())
    train(model, optimizer, 3)
    optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save(checkpointing.get_optimizer_state_dict(model, optimizer, options=options), buffer)
    buffer.seek(0)
    resumed = second(model.parameters())
    loaded = torch.load(buffer, weights_only=True)
    checkpointing.set_optimizer_state_dict(model, resumed, loaded, options=options)
    train(model, resumed, 3, seed=20)

    whole = make_model()
    uncut = twin(whole.parameters())
    train(whole, uncut, 3)
    uncut = as_resumed(uncut, cls, twin)
    train(whole, uncut, 3, seed=20)
    assert_close(contents(resumed), contents(uncut))


def test_a_flat_state_dict_of_a_twin_lacks_our_keys() -> None:
    """torch asks it for the value of every key that a group here has. Nested ones load; this is where it ends."""
    model = make_model()
    twin = torch.optim.Adam(model.parameters())
    train(model, twin, 1)
    twin.zero_grad()
    options = checkpointing.StateDictOptions(**FORMS["flat"])
    flat = checkpointing.get_optimizer_state_dict(model, twin, options=options)
    with pytest.raises(KeyError, match=r"param_groups\..*\.l1"):
        checkpointing.set_optimizer_state_dict(model, FusedRegAdam(model.parameters()), flat, options=options)


@few_configurations
def test_a_regularized_run_resumes_by_name(configuration, backend) -> None:
    """Strengths, clips and SGD's gains go with it; loading takes a step of its own with lr = 0, which moves nothing."""
    cls, flags = CONFIGURATIONS[configuration]
    results = []
    for resume in (False, True):
        model = make_model()
        groups = [{"params": model[0].parameters(), "l1": 0.02}, {"params": model[2].parameters()}]
        optimizer = cls(groups, backend=backend, l1=0.01, l2=0.1, max_grad_norm=0.5, **PLAIN, **flags)
        train(model, optimizer, 3)
        if resume:
            optimizer.zero_grad()  # a step of its own is what loading takes where there are no gradients
            saved = checkpointing.get_optimizer_state_dict(model, optimizer)
            before = [param.detach().clone() for param in model.parameters()]
            groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
            optimizer = cls(groups, backend=backend, max_grad_norm=0.5, **PLAIN, **flags)
            checkpointing.set_optimizer_state_dict(model, optimizer, saved)
            assert_same_bits(before, [param.detach() for param in model.parameters()])
            assert [group["l1"] for group in optimizer.param_groups] == [0.02, 0.01]
        train(model, optimizer, 3, seed=20)
        results.append(contents(optimizer))
    assert_close(results[1], results[0])


# -- ZeroRedundancyOptimizer


@every_rival
@few_configurations
def test_zero_redundancy_optimizer(configuration, backend, rival) -> None:
    """It builds our class from arguments, steps it, and gathers and loads its state."""
    zero = pytest.importorskip("torch.distributed.optim").ZeroRedundancyOptimizer

    def flow(make):
        model = make_model()
        # It wants the class and its options; an optimizer out of `make` knows them.
        like = make(model.parameters())
        taken = inspect.signature(type(like)).parameters
        options = {key: value for key, value in like.defaults.items() if key in taken}
        options |= {"backend": like._backend} if "backend" in taken else {}
        optimizer = zero(model.parameters(), type(like), **options)
        train(model, optimizer, 3)
        optimizer.consolidate_state_dict()
        resumed = zero(model.parameters(), type(like), **options)
        resumed.load_state_dict(optimizer.state_dict())
        train(model, resumed, 3, seed=20)
        return contents(resumed.optim)

    with a_group_of_one():
        assert_alike(flow, configuration, backend, rival)


# -- FSDP: sharded parameters


@every_configuration
def test_fully_sharded_parameters(configuration) -> None:
    """DTensors have no plain memory: the reference steps them, as the twin's loop does."""
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    device_mesh = pytest.importorskip("torch.distributed.device_mesh")
    cls, flags = CONFIGURATIONS[configuration]
    results = []
    with a_group_of_one():
        for make in (cls, TWINS[cls]):
            model = make_model()
            fully_shard(model, mesh=device_mesh.init_device_mesh("cpu", (1,)))
            optimizer = make(model.parameters(), **PLAIN, **flags)
            train(model, optimizer, 3)
            results.append(
                [
                    {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in each.items()}
                    for each in contents(optimizer)
                ]
            )
    assert_close(*results)


@pytest.mark.parametrize(("cls", "more"), [(FusedRegAdam, {}), (FusedRegSGD, {"momentum": 0.9})], ids=["adam", "sgd"])
def test_a_regularized_step_on_sharded_parameters(cls, more) -> None:
    """The penalties, and a norm that is over all shards: as without sharding."""
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    device_mesh = pytest.importorskip("torch.distributed.device_mesh")
    results = []
    with a_group_of_one():
        for shard in (True, False):
            model = make_model()
            if shard:
                fully_shard(model, mesh=device_mesh.init_device_mesh("cpu", (1,)))
            optimizer = cls(model.parameters(), lr=0.05, l1=0.05, l2=0.1, max_grad_norm=0.3, **more)
            train(model, optimizer, 3)
            norm = optimizer.grad_norm
            results.append([norm.full_tensor() if hasattr(norm, "full_tensor") else norm])
            results[-1] += [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    assert_close(*results)


def test_distributed_data_parallel(backend) -> None:
    """Its buckets own the gradients: each p.grad is a view into a flat tensor."""

    def flow(make):
        model = nn.parallel.DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
        optimizer = make(model.parameters())
        train(model, optimizer, 4)
        return contents(optimizer)

    with a_group_of_one():
        assert_alike(flow, "adam-amsgrad", backend)
