"""State dicts cut in mid-training, resumed on either class; old layouts, copies, pickles: always one continuation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    TWINS,
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    through_a_file,
    variant_of,
)
from torch import Tensor, nn
from twin_pairs import (
    CONFIGURATIONS,
    OURS_ALONE,
    as_resumed,
    assert_alike,
    contents,
    every_class,
    every_configuration,
    every_configuration_of_torch,
    few_configurations,
    like_every_rival,
    like_the_twin,
    loss_of,
    make_model,
    plain,
    tolerance,
    train,
)

every_optimizer = pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)
DOUBLE = tolerance(torch.float64)


def through_memory(state_dict):
    return state_dict


@every_optimizer
@pytest.mark.parametrize("direction", ["to-torch", "from-torch"])
@pytest.mark.parametrize("way", [through_memory, through_a_file, copy.deepcopy], ids=lambda way: way.__name__)
def test_state_dicts_go_both_ways_in_mid_training(cls, flags, direction, way, backend) -> None:
    """The continuation is the uninterrupted twin's, and so are the state's keys, shapes and dtypes."""
    options = {**plain(cls), **variant_of(cls, flags)}

    def make(fused_reg, params):
        return cls(params, backend=backend, **options) if fused_reg else TWINS[cls](params, **options)

    first = direction == "to-torch"
    params = make_params(dtype=torch.float64)
    before = make(first, params)
    run(before, params, 4)
    after = make(not first, params)
    after.load_state_dict(way(before.state_dict()))
    run(after, params, 4, first_seed=200)

    uninterrupted = make_params(dtype=torch.float64)
    twin = make(False, uninterrupted)
    run(twin, uninterrupted, 4)
    twin = as_resumed(twin, cls, lambda params: make(False, params))
    run(twin, uninterrupted, 4, first_seed=200)
    torch.testing.assert_close(contents(after), contents(twin), **DOUBLE)


@every_configuration
def test_there_and_back_again(configuration, backend) -> None:
    """Ours, the twin, ours, the twin: handed over after every two steps."""
    cls, flags = CONFIGURATIONS[configuration]
    options = {**plain(cls), **flags}
    params, uninterrupted = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    state_dict, twin = None, TWINS[cls](uninterrupted, **options)
    for turn in range(4):
        optimizer = TWINS[cls](params, **options) if turn % 2 else cls(params, backend=backend, **options)
        if state_dict is not None:
            optimizer.load_state_dict(through_a_file(state_dict))
            twin = as_resumed(twin, cls, lambda params: TWINS[cls](params, **options))
        run(optimizer, params, 2, first_seed=10 * turn)
        run(twin, uninterrupted, 2, first_seed=10 * turn)
        state_dict = optimizer.state_dict()
    torch.testing.assert_close(contents(optimizer), contents(twin), **DOUBLE)


@every_configuration
def test_a_state_dict_has_the_twins_shape(configuration, backend) -> None:
    """The same top keys, the same entries in "state" with the same names, and at least the twin's group keys."""
    cls, flags = CONFIGURATIONS[configuration]
    dicts = []
    for make, more in ((cls, {"backend": backend}), (TWINS[cls], {})):
        params = make_params(dtype=torch.float64)
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}], **flags, **more)
        dicts.append([optimizer.state_dict()])
        set_grads(params, 1)
        params[3].grad = None
        optimizer.step()
        dicts[-1].append(optimizer.state_dict())
    for ours, theirs in zip(*dicts, strict=True):
        assert list(ours) == list(theirs)
        assert {key: set(state) - OURS_ALONE for key, state in ours["state"].items()} == {
            key: set(state) for key, state in theirs["state"].items()
        }
        for our_group, their_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert their_group.items() <= our_group.items()


@every_optimizer
def test_our_own_state_dict_resumes_to_the_bit(cls, flags, backend) -> None:
    options = {**regularized(cls, flags), "backend": backend}
    params, resumed = make_params(), make_params()
    optimizer = cls(params, **options)
    run(optimizer, params, 3)
    other = cls(resumed, **options)
    with torch.no_grad():
        for a, b in zip(resumed, params, strict=True):
            a.copy_(b)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, 3, first_seed=7)
    run(other, resumed, 3, first_seed=7)
    assert_same_bits(snapshot(optimizer), snapshot(other))


@every_optimizer
def test_a_regularized_run_resumes_on_another_backend(cls, flags, backend) -> None:
    options = {**regularized(cls, flags)}
    params, uninterrupted = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    first, whole = cls(params, backend="reference", **options), cls(uninterrupted, backend="reference", **options)
    run(first, params, 3)
    second = cls(params, backend=backend, **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    run(second, params, 3, first_seed=200)
    run(whole, uninterrupted, 3)
    whole = as_resumed(whole, cls, lambda params: cls(params, backend="reference", **options))
    run(whole, uninterrupted, 3, first_seed=200)
    torch.testing.assert_close(contents(second), contents(whole), **DOUBLE)


def test_groups_of_a_torch_checkpoint_keep_our_strengths() -> None:
    params = make_params()
    optimizer = FusedRegAdam([{"params": params[:2], "l1": 0.5}, {"params": params[2:]}], l1=0.1, max_grad_norm=2.0)
    twin = torch.optim.Adam([{"params": params[:2]}, {"params": params[2:]}], lr=0.7)
    optimizer.load_state_dict(twin.state_dict())
    assert [group["l1"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [2.0, 2.0]


@every_class
def test_checkpoints_that_do_not_fit_are_refused_as_by_the_twin(cls, backend) -> None:
    """The same error, and afterwards nothing has changed."""
    params = make_params(((3,), (2, 3)))
    one_group = {"more-groups": cls([{"params": params[:1]}, {"params": params[1:]}]).state_dict()}
    one_group["fewer-parameters"] = cls(params[:1]).state_dict()
    messages = {}
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend})):
        optimizer = make(params, **more)
        run(optimizer, params, 1)
        before = snapshot(optimizer)
        for name, state_dict in one_group.items():
            with pytest.raises(ValueError, match="loaded state dict") as caught:
                optimizer.load_state_dict(state_dict)
            messages.setdefault(name, []).append(str(caught.value))
        assert_same_bits(before, snapshot(optimizer))
    assert all(ours == theirs for ours, theirs in messages.values())


# -- what older versions of torch wrote


NOT_ALWAYS_THERE = {
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "nesterov",
}


def of_an_older_torch(state_dict, step_type, missing):
    """Steps as numbers, momentum buffers that are None, groups without the keys that came later."""
    old = copy.deepcopy(state_dict)
    for state in old["state"].values():
        if "step" in state:
            state["step"] = step_type(state["step"])
    for group in old["param_groups"]:
        for key in missing:
            group.pop(key, None)
    return old


@like_every_rival
@pytest.mark.parametrize("configuration", ["adam", "adamw", "sgd-dampening", "sgd"])
@pytest.mark.parametrize("step_type", [int, float], ids=["int", "float"])
@pytest.mark.parametrize("missing", [set(), NOT_ALWAYS_THERE], ids=["all-keys", "old-keys"])
def test_checkpoints_of_older_torch(make, step_type, missing):
    params = make_params(dtype=torch.float64)
    optimizer = make(params)
    run(optimizer, params, 3)
    resumed = make(params)
    resumed.load_state_dict(through_a_file(of_an_older_torch(optimizer.state_dict(), step_type, missing)))
    filled_in = [{key: group[key] for key in missing & set(group)} for group in resumed.param_groups]
    run(resumed, params, 3, first_seed=50)
    return contents(resumed), filled_in


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_groups_without_amsgrad(make, amsgrad):
    """The oldest Adam checkpoints have no amsgrad: it is off, whatever this optimizer was made with."""
    params = make_params(dtype=torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    resumed = make(params, amsgrad=amsgrad)
    resumed.load_state_dict(of_an_older_torch(optimizer.state_dict(), float, {"amsgrad", *NOT_ALWAYS_THERE}))
    run(resumed, params, 2)
    return contents(resumed), [group["amsgrad"] for group in resumed.param_groups]


@like_the_twin
@pytest.mark.parametrize("configuration", ["sgd-dampening"])
def test_momentum_buffers_that_are_none(make):
    """torch's SGD wrote None for a parameter that had not been stepped."""
    params = make_params(dtype=torch.float64)
    optimizer = make(params)
    set_grads(params, 1)
    params[1].grad = None
    optimizer.step()
    state_dict = optimizer.state_dict()
    state_dict["state"][1] = {"momentum_buffer": None}
    resumed = make(params)
    resumed.load_state_dict(state_dict)
    run(resumed, params, 2)
    return contents(resumed)


@like_the_twin
@every_configuration_of_torch
def test_a_pickle_of_an_older_optimizer(make):
    """__setstate__ fills in what the pickled groups and defaults lack, as the twin's does."""
    params = make_params(dtype=torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.__getstate__())
    old = of_an_older_torch({"state": state["state"], "param_groups": state["param_groups"]}, float, NOT_ALWAYS_THERE)
    fresh = type(optimizer).__new__(type(optimizer))
    fresh.__setstate__({**state, **old})
    own = [param for group in fresh.param_groups for param in group["params"]]
    run(fresh, own, 2)
    filled_in = [{key: group[key] for key in NOT_ALWAYS_THERE & set(group)} for group in fresh.param_groups]
    return contents(fresh), filled_in


# -- copies


COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
every_copier = pytest.mark.parametrize("copier", COPIERS)


@every_optimizer
@every_copier
def test_copies_go_on_alike(cls, flags, copier, backend) -> None:
    params = make_params()
    optimizer = cls(params, backend=backend, **regularized(cls, flags))
    run(optimizer, params, 2)
    copied = COPIERS[copier](optimizer)
    own = [param for group in copied.param_groups for param in group["params"]]
    assert all(a is not b for a, b in zip(own, params, strict=True))
    run(optimizer, params, 2, first_seed=9)
    run(copied, own, 2, first_seed=9)
    assert copied._backend == backend
    assert_same_bits(snapshot(optimizer), snapshot(copied))


@like_every_rival
@every_configuration
@every_copier
def test_a_model_copied_with_its_optimizer(make, copier):
    """In one copy, the copied optimizer steps the copied model; the original stays where it was."""
    model = make_model()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    before = snapshot(optimizer)
    copied_model, copied = COPIERS[copier]((model, optimizer))
    assert copied.param_groups[0]["params"][0] is copied_model[0].weight
    train(copied_model, copied, 3, seed=30)
    assert_same_bits(before, snapshot(optimizer))
    train(model, optimizer, 2, seed=60)
    return [contents(optimizer), contents(copied)]


@like_the_twin
@pytest.mark.parametrize("configuration", ["sgd-dampening"])
@every_copier
def test_a_copy_before_the_first_step(make, copier):
    model, optimizer = COPIERS[copier]((model := make_model(), make(model.parameters())))
    train(model, optimizer, 2)
    return contents(optimizer)


@every_configuration
def test_the_tensors_of_a_state_dict_are_the_live_ones(configuration, backend) -> None:
    """As the twin's: state_dict() copies nothing, and later steps show in it."""
    cls, flags = CONFIGURATIONS[configuration]
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend})):
        params = make_params()
        optimizer = make(params, **plain(cls), **flags, **more)
        run(optimizer, params, 1)
        state_dict = optimizer.state_dict()
        held = [tensor for state in state_dict["state"].values() for tensor in state.values()]
        names = [name for state in state_dict["state"].values() for name in state]
        before = [tensor.clone() for tensor in held]
        run(optimizer, params, 1, first_seed=7)
        for name, a, b in zip(names, held, before, strict=True):
            # ASGD's step size may stay the same, and nothing holds FTRL's weights back.
            assert a.numel() == 0 or name in ("eta", "mu", "held_back", "l1_sum") or not a.equal(b)
        now = [tensor for state in optimizer.state.values() for tensor in state.values()]
        assert all(a is b for a, b in zip(held, now, strict=True))


@like_the_twin
@every_configuration
def test_two_optimizers_loaded_from_one_state_dict(make):
    """load_state_dict keeps tensors that fit as they are: the two then share their state, as the twin's do."""
    params, own, others = (make_params(dtype=torch.float64, seed=seed) for seed in (1, 2, 3))
    optimizer = make(params)
    run(optimizer, params, 2)
    state_dict = optimizer.state_dict()
    pair = make(own), make(others)
    for each in pair:
        each.load_state_dict(state_dict)
    for i in range(3):
        run(pair[0], own, 1, first_seed=i)
        run(pair[1], others, 1, first_seed=20 + i)
    return [contents(each) for each in pair]


# -- by name, over other dtypes, and with extras


@like_the_twin
@every_configuration
def test_named_parameters_resume(make):
    """param_names stand in the groups and go with the state dict; a checkpoint without names keeps ours."""
    model = make_model()
    named, plain = make(model.named_parameters()), make(model.parameters())
    train(model, named, 2)
    plain.load_state_dict(named.state_dict())
    names = [plain.param_groups[0]["param_names"]]
    train(model, plain, 2)
    unnamed = plain.state_dict()
    for group in unnamed["param_groups"]:
        del group["param_names"]
    again = make(model.named_parameters())
    again.load_state_dict(unnamed)
    names.append(again.param_groups[0]["param_names"])
    train(model, again, 2)
    return contents(again), names


@every_configuration
def test_state_is_cast_to_its_parameter(configuration, backend) -> None:
    """A float64 run resumed by float32 parameters: the state becomes float32, the step count stays."""

    def flow(make):
        params = make_params(dtype=torch.float64)
        optimizer = make(params)
        run(optimizer, params, 2)
        single = make_params(dtype=torch.float32)
        resumed = make(single)
        resumed.load_state_dict(optimizer.state_dict())
        run(resumed, single, 2)
        return contents(resumed)

    assert_alike(flow, configuration, backend, dtype=torch.float32)


@every_class
def test_what_else_a_user_keeps_in_a_state_dict(cls, backend) -> None:
    """Own keys in a group, in a parameter's state and beside the parameters survive, as with the twin."""
    kept = []
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend})):
        params = make_params()
        optimizer = make([{"params": params, "tag": "body"}], **more)
        run(optimizer, params, 1)
        optimizer.state[params[0]]["mask"] = torch.arange(3)
        optimizer.state["global"] = {"epoch": 5}
        resumed = make(params, **more)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        run(resumed, params, 2)
        mask = resumed.state[params[0]]["mask"]
        kept.append((resumed.param_groups[0]["tag"], mask.tolist(), resumed.state["global"]))
    assert kept[0] == kept[1]


@like_the_twin
@few_configurations
def test_a_checkpoint_taken_while_parameters_lack_gradients(make):
    """Some parameters have no state yet; they begin at their own first step after the resume."""
    params = make_params(dtype=torch.float64)
    optimizer = make(params)
    for i in range(2):
        set_grads(params, i)
        params[0].grad = params[3].grad = None
        optimizer.step()
    resumed = make(params)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(resumed, params, 2)
    return contents(resumed)


def test_the_gain_of_a_checkpoint_is_used(backend) -> None:
    """A resumed SGD knows how far its momentum has come; without that, the prox would take the stationary gain."""
    results = []
    for resume in (False, True):
        params = make_params(((4, 3),), torch.float64)
        options = dict(lr=0.1, momentum=0.9, l1=0.1, backend=backend)
        optimizer = FusedRegSGD(params, **options)
        run(optimizer, params, 2)
        if resume:
            state_dict = through_a_file(optimizer.state_dict())
            optimizer = FusedRegSGD(params, **options)
            optimizer.load_state_dict(state_dict)
        run(optimizer, params, 2)
        results.append([*contents(optimizer), *(optimizer.state[param]["momentum_gain"] for param in params)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_gains_that_stood_in_their_group(backend) -> None:
    """Checkpoints were once written with a number for each parameter in `momentum_gain` of the group."""
    results = []
    for in_group in (False, True):
        params = make_params(((4, 3), (5,)), torch.float64)
        options = dict(lr=0.1, momentum=0.9, l1=0.1, backend=backend)
        optimizer = FusedRegSGD(params, **options)
        set_grads(params, 1)
        params[1].grad = None
        optimizer.step()
        run(optimizer, params, 1)
        saved = through_a_file(optimizer.state_dict())
        if in_group:
            gains = [saved["state"][i].pop("momentum_gain") for i in range(2)]
            saved["param_groups"][0]["momentum_gain"] = torch.stack(gains)
            assert saved["param_groups"][0]["momentum_gain"].tolist() == [1.9, 1.0]
        optimizer = FusedRegSGD(params, **options)
        optimizer.load_state_dict(saved)
        assert "momentum_gain" not in optimizer.param_groups[0]
        run(optimizer, params, 2)
        gains = [optimizer.state[param]["momentum_gain"] for param in params]
        assert {gain.dtype for gain in gains} == {torch.float64}
        results.append([*contents(optimizer), *gains])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class Trainer(nn.Module):
    """An optimizer kept as an attribute of the module that it trains, as training frameworks do."""

    def __init__(self, make) -> None:
        super().__init__()
        self.body = make_model()
        self.optimizer = make(self.body.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@like_the_twin
@few_configurations
def test_a_module_that_holds_its_optimizer_is_copied_with_it(make):
    trainer = Trainer(make)
    train(trainer, trainer.optimizer, 2)
    copied = copy.deepcopy(trainer)
    assert copied.optimizer.param_groups[0]["params"][0] is copied.body[0].weight
    loss_of(copied, 3).backward()
    copied.optimizer.step()
    return [contents(trainer.optimizer), contents(copied.optimizer)]
