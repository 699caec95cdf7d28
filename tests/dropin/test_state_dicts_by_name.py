"""State dicts by parameter name, as torch.distributed.checkpoint makes them, in a single process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import FusedRegAdam, assert_same_bits, through_a_file
from twin_pairs import (
    CONFIGURATIONS,
    TWINS,
    as_resumed,
    assert_close,
    contents,
    every_configuration,
    every_configuration_of_torch,
    few_configurations,
    make_model,
    plain,
    train,
)

import fusedreg

distributed = pytest.importorskip("torch.distributed")
checkpointing = pytest.importorskip("torch.distributed.checkpoint.state_dict")
pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


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
        return cls(params, backend=backend, **plain(cls), **flags)

    def twin(params):
        return TWINS[cls](params, **plain(cls), **flags)

    first, second = {"to-torch": (ours, twin), "from-torch": (twin, ours), "to-ours": (ours, ours)}[direction]
    options = checkpointing.StateDictOptions(**FORMS[form])

    model = make_model()
    optimizer = first(model.parameters())
    train(model, optimizer, 3)
    optimizer.zero_grad()
    saved = through_a_file(checkpointing.get_optimizer_state_dict(model, optimizer, options=options))
    resumed = second(model.parameters())
    checkpointing.set_optimizer_state_dict(model, resumed, saved, options=options)
    train(model, resumed, 3, seed=20)

    whole = make_model()
    uncut = twin(whole.parameters())
    train(whole, uncut, 3)
    uncut = as_resumed(uncut, cls, twin)
    train(whole, uncut, 3, seed=20)
    assert_close(contents(resumed), contents(uncut))


@every_configuration_of_torch
def test_a_flat_state_dict_of_a_twin_is_read_by_a_twin(configuration, backend) -> None:
    """torch asks it for the value of every key that a group here has, and it lacks ours."""
    cls, flags = CONFIGURATIONS[configuration]
    model = make_model()
    twin = TWINS[cls](model.parameters(), **plain(cls), **flags)
    train(model, twin, 2)
    twin.zero_grad()
    options = checkpointing.StateDictOptions(**FORMS["flat"])
    flat = checkpointing.get_optimizer_state_dict(model, twin, options=options)
    optimizer = cls(model.parameters(), lr=1.0, l1=0.25, backend=backend, **flags)
    with pytest.raises(KeyError, match=r"param_groups\..*\.l1"):
        checkpointing.set_optimizer_state_dict(model, optimizer, flat, options=options)
    optimizer = cls(model.parameters(), lr=1.0, l1=0.25, backend=backend, **flags)
    reader = fusedreg.torch_twin(optimizer)
    assert type(reader) is TWINS[cls]
    assert reader.param_groups[0].keys() == twin.param_groups[0].keys()
    checkpointing.set_optimizer_state_dict(model, reader, flat, options=options)
    optimizer.load_state_dict(reader.state_dict())
    twin = as_resumed(twin, cls, lambda params: TWINS[cls](params, **plain(cls), **flags))
    assert_close(contents(optimizer), contents(twin))
    group = optimizer.param_groups[0]
    assert {**plain(cls), "l1": 0.25}.items() <= group.items()


def test_a_rule_without_a_twin_has_none_to_read_with() -> None:
    class Alone(FusedRegAdam):
        spec = dataclasses.replace(FusedRegAdam.spec, twin=None)

    with pytest.raises(ValueError, match="Alone has no twin"):
        fusedreg.torch_twin(Alone([torch.zeros(1)]))


def test_a_nested_state_dict_into_groups_that_are_split() -> None:
    """torch gives all that a saved group says to one of them; to load the others would leave them without an lr."""
    model = make_model()
    optimizer = FusedRegAdam(model.parameters(), lr=0.125)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    nested = checkpointing.get_optimizer_state_dict(model, optimizer)
    split = FusedRegAdam([{"params": [param]} for param in model.parameters()], lr=0.5)
    with pytest.raises(ValueError, match=r"group 0 has no 'lr'.*flatten_optimizer_state_dict"):
        checkpointing.set_optimizer_state_dict(model, split, nested)
    assert {group["lr"] for group in split.param_groups} == {0.5}


def test_a_flat_state_dict_without_a_state_that_is_needed_now(backend) -> None:
    """torch reads an empty dict for it; it begins at zero, as out of a nested dict."""
    found = []
    for form in FORMS.values():
        model = make_model()
        optimizer = FusedRegAdam(model.parameters(), backend=backend)
        train(model, optimizer, 1)
        optimizer.zero_grad()
        options = checkpointing.StateDictOptions(**form)
        saved = checkpointing.get_optimizer_state_dict(model, optimizer, options=options)
        resumed = FusedRegAdam(model.parameters(), amsgrad=True, backend=backend)
        checkpointing.set_optimizer_state_dict(model, resumed, saved, options=options)
        resumed.param_groups[0]["amsgrad"] = True
        train(model, resumed, 2)
        found.append(contents(resumed))
    assert_close(*found)


@few_configurations
def test_a_regularized_run_resumes_by_name(configuration, backend) -> None:
    """Strengths, clips and SGD's gains go with it; loading takes a step of its own with lr = 0, which moves nothing."""
    cls, flags = CONFIGURATIONS[configuration]
    results = []
    for resume in (False, True):
        model = make_model()
        groups = [{"params": model[0].parameters(), "l1": 0.02}, {"params": model[2].parameters()}]
        optimizer = cls(groups, backend=backend, l1=0.01, l2=0.1, max_grad_norm=0.5, **plain(cls), **flags)
        train(model, optimizer, 3)
        if resume:
            optimizer.zero_grad()  # a step of its own is what loading takes where there are no gradients
            saved = checkpointing.get_optimizer_state_dict(model, optimizer)
            before = [param.detach().clone() for param in model.parameters()]
            groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
            optimizer = cls(groups, backend=backend, max_grad_norm=0.5, **plain(cls), **flags)
            checkpointing.set_optimizer_state_dict(model, optimizer, saved)
            assert_same_bits(before, [param.detach() for param in model.parameters()])
            assert [group["l1"] for group in optimizer.param_groups] == [0.02, 0.01]
        train(model, optimizer, 3, seed=20)
        results.append(contents(optimizer))
    assert_close(results[1], results[0])
