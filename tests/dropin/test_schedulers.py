"""Every scheduler of torch.optim moves our groups as the twin's, to the same rates, momenta and weights."""

from __future__ import annotations

import pytest
import torch
from helpers import TWINS, FusedRegAdam, FusedRegSGD, known, make_params, run, through_a_file
from torch.optim import lr_scheduler, swa_utils
from twin_pairs import CONFIGURATIONS, contents, few_configurations, like_every_rival, like_the_twin, tolerance

STEPS = 12
SHAPES = ((4, 3), (5,), ())

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 1 / (1 + i), lambda i: 0.9**i]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=7),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[4]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "CyclicLR-momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    # at the top of each cycle the momentum, or beta1, is 0 for one step
    "CyclicLR-momentum-to-zero": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, base_momentum=0.0),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "OneCycleLR-three-phases": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2], total_steps=STEPS + 1, three_phase=True, base_momentum=0.5
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=6),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def test_every_scheduler_of_torch_is_here() -> None:
    theirs = set(lr_scheduler.__all__) - {"LRScheduler"} | {"SWALR"}
    assert {name.partition("-")[0] for name in SCHEDULERS} == theirs


def make_groups(dtype=torch.float64):
    """Two groups, so that a scheduler has two rates to keep apart."""
    params = make_params(SHAPES, dtype)
    return params, [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]


def go_on(optimizer, scheduler, params, first: int, last: int) -> list:
    seen = []
    for i in range(first, last):
        run(optimizer, params, 1, first_seed=i)
        # for ReduceLROnPlateau: a loss that stops falling
        scheduler.step(*([max(5, 9 - i)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        seen.append([(float(g["lr"]), g.get("momentum"), g.get("betas")) for g in optimizer.param_groups])
    return seen


@like_every_rival
@few_configurations
@every_scheduler
def test_every_scheduler(make, scheduler):
    params, groups = make_groups()
    optimizer = make(groups)
    seen = go_on(optimizer, SCHEDULERS[scheduler](optimizer), params, 0, STEPS)
    assert len({str(each) for each in seen}) > 1, "a scheduler that moves nothing proves nothing"
    return contents(optimizer), seen


@like_the_twin
@few_configurations
@every_scheduler
def test_a_tensor_lr_is_moved_in_place(make, scheduler):
    params = make_params(SHAPES, torch.float64)
    rates = [torch.tensor(0.05, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)]
    optimizer = make([{"params": params[:2], "lr": rates[0]}, {"params": params[2:], "lr": rates[1]}])
    seen = go_on(optimizer, SCHEDULERS[scheduler](optimizer), params, 0, STEPS)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    return contents(optimizer), seen


@pytest.mark.parametrize("direction", ["to-torch", "from-torch", "to-ours"])
@few_configurations
@every_scheduler
def test_state_dicts_of_both_in_mid_schedule(scheduler, configuration, direction, backend) -> None:
    """Cut after 7 of 12 steps, at an odd place in every schedule, and resumed on the other class or our own."""
    cls, flags = CONFIGURATIONS[configuration]
    options = {**known(cls, lr=0.05, weight_decay=0.1), **flags}
    ours, twin = lambda groups: cls(groups, backend=backend, **options), lambda groups: TWINS[cls](groups, **options)
    first, second = {"to-torch": (ours, twin), "from-torch": (twin, ours), "to-ours": (ours, ours)}[direction]

    params, groups = make_groups()
    optimizer = first(groups)
    schedule = SCHEDULERS[scheduler](optimizer)
    seen = go_on(optimizer, schedule, params, 0, 7)
    saved = through_a_file([optimizer.state_dict(), schedule.state_dict()])
    resumed = second([{"params": group["params"]} for group in groups])
    schedule = SCHEDULERS[scheduler](resumed)
    resumed.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    seen += go_on(resumed, schedule, params, 7, STEPS)

    expected_params, groups = make_groups()
    uncut = twin(groups)
    assert seen == go_on(uncut, SCHEDULERS[scheduler](uncut), expected_params, 0, STEPS)
    torch.testing.assert_close(contents(resumed), contents(uncut), **tolerance(torch.float64))


@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_a_scheduler_counts_our_steps(cls) -> None:
    """A scheduler wraps optimizer.step to see that it was called; ours must be seen, or it warns (an error here)."""
    params = make_params(SHAPES)
    optimizer = cls(params, lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    optimizer = cls(params, lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    run(optimizer, params, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_our_own_strengths_can_be_scheduled(backend) -> None:
    """l1 stands in the groups beside lr: moved by hand between steps, it must act from the next step on."""
    results = []
    for name in (backend, "reference"):
        params = make_params(SHAPES, torch.float64)
        optimizer = FusedRegAdam(params, lr=0.05, l1=0.0, backend=name)
        zeros = []
        for i in range(6):
            optimizer.param_groups[0]["l1"] = 0.8 * i
            run(optimizer, params, 1, first_seed=i)
            zeros.append(sum(int((param == 0).sum()) for param in params))
        assert zeros[0] == 0
        assert zeros[-1] > 0
        results.append((contents(optimizer), zeros))
    torch.testing.assert_close(results[0], results[1], **tolerance(torch.float64))
