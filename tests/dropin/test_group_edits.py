"""param_groups and state edited by their owner between steps: the next step reads what is there, as the twin's does."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict

import pytest
import torch
from helpers import REGULARIZED, TWINS, FusedRegAdam, FusedRegSGD, make_params, run, set_grads
from twin_pairs import (
    assert_alike,
    assert_close,
    contents,
    every_class,
    every_configuration,
    few_configurations,
    like_every_rival,
    like_the_twin,
    make_model,
    train,
    twin_must_make_state_late,
)

SHAPES = ((6, 3), (5,), (), (2, 3, 5))


def of_all(*params):
    """Contents by parameter, where a parameter is in no group any more."""
    return [param.detach().clone() for param in params]


# -- groups


@like_every_rival
@every_configuration
def test_groups_with_options_of_their_own(make):
    params = make_params(SHAPES, torch.float64)
    groups = [
        {"params": params[:1], "lr": 0.01},
        {"params": params[1:2], "weight_decay": 0.4, "maximize": True},
        {"params": params[2:]},
    ]
    optimizer = make(groups)
    run(optimizer, params, 4)
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_options_that_change_between_steps(make, configuration):
    """Each option of the rule, one after the other."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    (group,) = optimizer.param_groups
    edits = [("lr", 0.02), ("weight_decay", 0.3), ("maximize", True), ("weight_decay", 0), ("lr", 0.1)]
    if configuration.startswith("rmsprop"):  # whose twin does not learn of momentum or centering later
        edits += [("alpha", 0.5), ("eps", 1e-3), ("maximize", False)]
        edits += [("momentum", 0.3), ("alpha", 0.8)] if group["momentum"] else []
    elif configuration.startswith("adagrad"):
        edits += [("lr_decay", 0.5), ("eps", 1e-3), ("maximize", False), ("lr_decay", 0.0)]
    elif "betas" in group:
        edits += [("betas", (0.5, 0.9)), ("eps", 1e-3), ("maximize", False), ("betas", [0.8, 0.99])]
    else:
        edits += [
            ("nesterov", False),
            ("momentum", 0.5),
            ("dampening", 0.2),
            ("maximize", False),
            ("momentum", 0.7),
        ]
    for i, (key, value) in enumerate(edits):
        run(optimizer, params, 1, first_seed=i)
        group[key] = value
    run(optimizer, params, 2, first_seed=90)
    return contents(optimizer)


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam", "adamw"])
def test_betas_changed_in_place(make):
    """Betas out of a YAML file are a list, and a list can be written."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    betas = optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    run(optimizer, params, 2)
    betas[0] = 0.1
    run(optimizer, params, 2)
    return contents(optimizer)


@pytest.mark.parametrize("which", ["lr", "betas", "weight_decay"])
def test_tensor_options_moved_in_place(which, backend) -> None:
    def flow(make):
        params = make_params(SHAPES, torch.float64)
        tensors = [torch.tensor(value, dtype=torch.float64) for value in (0.9, 0.99)]
        value = tuple(tensors) if which == "betas" else tensors[0]
        optimizer = make(params, **{which: value})
        for i in range(4):
            run(optimizer, params, 1, first_seed=i)
            for tensor in tensors:
                tensor.mul_(0.9)
        return contents(optimizer)

    assert_alike(flow, "sgd-dampening" if which == "weight_decay" else "adam", backend)


@like_every_rival
@pytest.mark.parametrize("configuration", ["sgd-dampening"])
@pytest.mark.parametrize("dampening", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps_without", [1, 2])
def test_momentum_switched_off_and_on(make, dampening, steps_without):
    """While it is off the buffer waits, and its gain with it; then both go on from there."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params, dampening=dampening)
    (group,) = optimizer.param_groups
    run(optimizer, params, 3)
    group["momentum"] = 0.0
    run(optimizer, params, steps_without, first_seed=20)
    group["momentum"] = 0.8
    run(optimizer, params, 3, first_seed=30)
    return contents(optimizer)


@like_every_rival
@pytest.mark.parametrize("configuration", ["sgd"])
def test_momentum_switched_on_late(make):
    """The first buffer is the first gradient after the switch."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    run(optimizer, params, 3)
    return contents(optimizer)


@like_the_twin
@pytest.mark.parametrize("configuration", ["adam-amsgrad", "adamw"])
def test_amsgrad_switched_off(make):
    """The maximum waits in the state, as the twin's."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params, amsgrad=True)
    for amsgrad in (True, False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        run(optimizer, params, 2, first_seed=int(amsgrad))
    return contents(optimizer)


def test_amsgrad_switched_on_late(backend) -> None:
    """The twin knows no maximum then, and raises a KeyError; ours starts it at 0. Nothing else differs."""
    results = []
    for switched in (True, False):
        params = make_params(SHAPES, torch.float64)
        optimizer = FusedRegAdam(params, lr=0.1, amsgrad=not switched, backend=backend)
        optimizer.param_groups[0]["amsgrad"] = True
        run(optimizer, params, 1)
        results.append(contents(optimizer))
    assert_close(results[0], results[1])


@like_every_rival
@every_configuration
def test_groups_added_deleted_and_reordered(make, configuration, rival):
    twin_must_make_state_late(configuration, rival)

    params = make_params(SHAPES, torch.float64)
    late, later = (make_params(((4, 4), (3,)), torch.float64, seed=seed) for seed in (8, 9))
    everything = [*params, *late, *later]
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}])
    run(optimizer, everything, 2)
    optimizer.add_param_group({"params": late, "lr": 0.02})
    run(optimizer, everything, 2, first_seed=10)
    del optimizer.param_groups[1]
    run(optimizer, everything, 2, first_seed=20)
    optimizer.add_param_group({"params": later, "weight_decay": 0.5})
    optimizer.param_groups.reverse()
    run(optimizer, everything, 2, first_seed=30)
    optimizer.param_groups = [optimizer.param_groups[1]]
    run(optimizer, everything, 1, first_seed=40)
    return of_all(*everything)


@like_every_rival
@every_configuration
def test_parameters_appended_removed_and_replaced(make, configuration, rival):
    """In group["params"] itself, past add_param_group."""
    twin_must_make_state_late(configuration, rival)

    params = make_params(SHAPES, torch.float64)
    late = make_params(((4, 4), (3,)), torch.float64, seed=8)
    everything = [*params, *late]
    optimizer = make(params[:3])
    (group,) = optimizer.param_groups
    # every parameter at the same count, so that the gains do not depend on their place
    run(optimizer, everything, 1)
    group["params"].append(params[3])
    run(optimizer, everything, 1, first_seed=10)
    group["params"].remove(params[0])
    run(optimizer, everything, 1, first_seed=20)
    group["params"] = [*group["params"], *late]
    run(optimizer, everything, 1, first_seed=30)
    group["params"][0] = params[0]
    run(optimizer, everything, 1, first_seed=40)
    return of_all(*everything)


@like_every_rival
@every_configuration
def test_parameters_reordered(make):
    """One has begun later than the others: what belongs to it must go with it."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    for i in range(3):
        set_grads(params, i)
        params[0].grad = None
        optimizer.step()
    run(optimizer, params, 1)
    optimizer.param_groups[0]["params"].reverse()
    run(optimizer, params, 2)
    return of_all(*params)


def in_place(params, edit: str):
    late = make_params(((4, 4),), torch.float64, seed=8)
    return {
        "reversed": params[::-1],
        "one-appended": [*params, *late],
        "one-put-first": [*late, *params],
        "first-removed": params[1:],
    }[edit]


@pytest.mark.parametrize("edit", ["reversed", "one-appended", "one-put-first", "first-removed"])
def test_the_gain_goes_with_its_parameter(edit, backend) -> None:
    """Where the list is edited, those that stay must move as if it had not been: the prox's step size is their own."""
    results = []
    for edited in (False, True):
        params = make_params(SHAPES, torch.float64)
        optimizer = FusedRegSGD(params, lr=0.05, momentum=0.9, l1=0.1, backend=backend)
        for i in range(3):
            set_grads(params, i)
            params[0].grad = None
            optimizer.step()
        run(optimizer, params, 1)
        if edited:
            optimizer.param_groups[0]["params"] = in_place(params, edit)
        run(optimizer, params, 2)
        results.append(of_all(*params[1:]))
    assert_close(results[1], results[0])


@like_the_twin
@every_configuration
def test_a_parameter_moved_to_another_group(make):
    """It takes its state along, which is kept by parameter."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}])
    run(optimizer, params, 2)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())
    run(optimizer, params, 2)
    return contents(optimizer)


@every_class
def test_nothing_to_optimize(cls, backend) -> None:
    """No parameters in a group, no groups at all: a step that does nothing, as the twin's."""
    for make, more in ((TWINS[cls], {}), (cls, {"backend": backend, "max_grad_norm": 1.0})):
        params = make_params(SHAPES)
        optimizer = make([{"params": []}, {"params": params}], **more)
        run(optimizer, params, 1)
        optimizer.param_groups[1]["params"] = []
        optimizer.step()
        optimizer.zero_grad()
        del optimizer.param_groups[:]
        before = of_all(*params)
        optimizer.step()
        assert all(map(torch.equal, of_all(*params), before))


def test_the_norm_of_nothing(backend) -> None:
    """An optimizer whose groups are all empty has a norm of 0."""
    optimizer = FusedRegAdam([{"params": []}], max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm == 0


@every_class
def test_groups_are_read_as_they_are_typed(cls, backend) -> None:
    """Tuples of groups and of parameters, an OrderedDict for a group, an int and a tensor for lr."""
    results = []
    for make, more in ((cls, {"backend": backend}), (TWINS[cls], {})):
        params = make_params(SHAPES, torch.float64)
        optimizer = make(tuple(params), **more)
        run(optimizer, params, 1)
        optimizer.param_groups[0]["params"] = tuple(params)
        run(optimizer, params, 1)
        optimizer.param_groups = (OrderedDict(optimizer.param_groups[0], lr=torch.tensor([0.02], dtype=torch.float64)),)
        run(optimizer, params, 1)
        optimizer.param_groups[0]["lr"] = 1
        run(optimizer, params, 1)
        results.append(contents(optimizer))
    assert_close(*results)


@like_the_twin
@few_configurations
def test_a_group_added_for_every_layer_that_thaws(make):
    """Gradual unfreezing: parameters join group by group, each from its own first step."""
    model = make_model()
    optimizer = make(model[2].parameters())
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model[0].bias, "lr": 0.01})
    train(model, optimizer, 2, seed=10)
    optimizer.add_param_group({"params": [model[0].weight], "lr": 0.001})
    train(model, optimizer, 2, seed=20)
    return contents(optimizer)


def test_an_added_group_takes_the_optimizers_strengths(backend) -> None:
    """What add_param_group is not told comes from the constructor's arguments, ours as the twin's."""
    params = make_params(SHAPES)
    optimizer = FusedRegSGD(params[:1], backend=backend, **REGULARIZED)
    optimizer.add_param_group({"params": params[1], "l1": 0.0})
    assert {key: optimizer.param_groups[1][key] for key in REGULARIZED} == {**REGULARIZED, "l1": 0.0}


# -- state


@like_every_rival
@every_configuration
@pytest.mark.parametrize("held", ["nothing-held", "state-dict-held"])
def test_state_cleared(make, configuration, held, rival):
    """optimizer.state.clear() starts anew, whoever still holds the old state."""
    twin_must_make_state_late(configuration, rival)

    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 3)
    kept = optimizer.state_dict() if held == "state-dict-held" else None
    before = copy.deepcopy(kept)
    optimizer.state.clear()
    run(optimizer, params, 2)
    if kept is not None:
        assert_close(kept["state"], before["state"])
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_state_replaced(make, configuration, rival):
    """By a new defaultdict; then one parameter's by a new dict, by a copy, and taken out."""
    twin_must_make_state_late(configuration, rival)

    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    optimizer.state = defaultdict(dict)
    run(optimizer, params, 2)
    optimizer.state[params[0]] = {}
    run(optimizer, params, 1)
    optimizer.state[params[1]] = {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    run(optimizer, params, 1)
    optimizer.state.pop(params[3], None)
    run(optimizer, params, 1)
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_one_parameters_state_taken_out_and_held(make, configuration, rival):
    """As when a parameter is reset, and its old state is kept to be looked at."""
    twin_must_make_state_late(configuration, rival)

    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 3)
    old = optimizer.state.pop(params[1], {})
    held = {name: tensor.clone() for name, tensor in old.items()}
    run(optimizer, params, 2)
    assert_close(old, held)
    return contents(optimizer)


@like_every_rival
@every_configuration
def test_state_tensors_written_and_replaced(make):
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    for state in optimizer.state.values():
        for name in state:
            if name != "step":
                state[name] = state[name] * 0.5
    run(optimizer, params, 1)
    for state in optimizer.state.values():
        for name in state:
            if name != "step":
                state[name].mul_(0.5)
            else:
                state[name].fill_(1)
    run(optimizer, params, 1)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(4.0, device=state["step"].device)
    run(optimizer, params, 1)
    return contents(optimizer)


@like_the_twin
@every_configuration
def test_state_tensors_swapped_under_their_data(make):
    """state["exp_avg"].data = ...: the same tensor over new memory, as offloading does it."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make(params)
    run(optimizer, params, 2)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.data = tensor.data.clone()
    run(optimizer, params, 2)
    return contents(optimizer)


@like_the_twin
@few_configurations
def test_keys_of_a_users_own(make):
    """In a group and in a parameter's state they are left alone, and disturb nothing."""
    params = make_params(SHAPES, torch.float64)
    optimizer = make([{"params": params, "name": "body", "initial": {"lr": 1}}])
    run(optimizer, params, 1)
    for param in params:
        optimizer.state[param]["mask"] = torch.ones(2, dtype=torch.bool)
        optimizer.state[param]["note"] = "seen"
    run(optimizer, params, 2)
    group = optimizer.param_groups[0]
    return contents(optimizer), group["name"], group["initial"], [optimizer.state[p]["note"] for p in params]


@like_every_rival
@every_configuration
def test_all_in_one_run(make, configuration, rival):
    """The edits of this suite one after the other, on one optimizer: a plan must survive them all."""
    twin_must_make_state_late(configuration, rival)

    params = make_params(SHAPES, torch.float64)
    late = make_params(((4, 4),), torch.float64, seed=8)
    optimizer = make(params)
    run(optimizer, params, 2)
    params[0].data = params[0].data * 2
    run(optimizer, params, 1)
    params[3].data = params[3].data.transpose(0, 2).contiguous().transpose(0, 2)
    run(optimizer, params, 1)
    optimizer.add_param_group({"params": late, "lr": 0.01})
    run(optimizer, [*params, *late], 2)
    set_grads(params, 77)
    params[1].grad = None
    optimizer.step()
    set_grads(params, 78)
    optimizer.step()
    for name in list(optimizer.state.get(params[0], {})):
        if name != "step":
            optimizer.state[params[0]][name] = optimizer.state[params[0]][name] * 0.5
    run(optimizer, params, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 1)
    optimizer.param_groups[0]["params"].pop()
    run(optimizer, params, 1)
    return of_all(*params, *late)
