"""torch.optim.swa_utils beside our optimizers: averaged models, their batch norms and their schedule, as the twin's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from twin_pairs import (
    contents,
    few_configurations,
    like_every_rival,
    like_the_twin,
    make_model,
    on_default_device,
    train,
)

pytestmark = pytest.mark.usefixtures("in_one_thread")


AVERAGES = {
    "swa": {},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)},
    "ema-one-by-one": {"avg_fn": swa_utils.get_ema_avg_fn(0.7)},
    "swa-with-buffers": {"avg_fn": swa_utils.get_swa_avg_fn(), "use_buffers": True},
}


def make_model_with_batch_norm() -> nn.Module:
    first, last = make_model()[0], make_model()[2]
    return nn.Sequential(first, nn.BatchNorm1d(7, dtype=torch.float64), nn.Tanh(), last)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@like_every_rival
@few_configurations
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_model(make, average):
    model = make_model_with_batch_norm()
    averaged = swa_utils.AveragedModel(model, **AVERAGES[average])
    optimizer = make(model.parameters())
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
    for i in range(6):
        train(model, optimizer, 1, seed=i)
        if i >= 2:
            averaged.update_parameters(model)
            schedule.step()
    assert averaged.n_averaged == 4
    assert not averaged.module[0].weight.equal(model[0].weight)
    return [contents(optimizer), tensors_of(averaged)]


@like_the_twin
@few_configurations
def test_update_bn(make):
    """update_bn resets the running statistics and takes them anew, with the averaged weights."""
    model = make_model_with_batch_norm()
    averaged = swa_utils.AveragedModel(model)
    optimizer = make(model.parameters())
    for i in range(4):
        train(model, optimizer, 1, seed=i)
        averaged.update_parameters(model)
    stale = averaged.module[1].running_mean.clone()
    swa_utils.update_bn([on_default_device((11, 5), 50 + i) for i in range(3)], averaged)
    assert not averaged.module[1].running_mean.equal(stale)
    return tensors_of(averaged)


@like_the_twin
@few_configurations
def test_training_goes_on_from_the_average(make):
    """The average is copied into the trained model: its parameters change under the optimizer's plan."""
    model = make_model()
    averaged = swa_utils.AveragedModel(model)
    optimizer = make(model.parameters())
    for i in range(6):
        train(model, optimizer, 1, seed=i)
        averaged.update_parameters(model)
        if i == 3:
            model.load_state_dict(averaged.module.state_dict())
    return [contents(optimizer), tensors_of(averaged)]
