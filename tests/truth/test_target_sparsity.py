"""Why the scores are in the metric: on digits it leaves a better network than magnitude, at the same zeros."""

from __future__ import annotations

import statistics

import pytest
import torch
from helpers import one_thread
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fusedreg
from fusedreg.sparsity.weights import Weights

EPOCHS, BATCH, LR, SEEDS = 15, 64, 3e-3, 2


@pytest.fixture(scope="module")
def digits() -> list[torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16.0, y, test_size=0.25, random_state=0, stratify=y)
    images, test_images, labels, test_labels = map(torch.from_numpy, parts)
    return [images.float(), test_images.float(), labels, test_labels]


def accuracy(digits: list[torch.Tensor], sparsity: float, seed: int) -> float:
    """On the test images, in percent; the zeros are checked."""
    images, test_images, labels, test_labels = digits
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = fusedreg.FusedRegAdam(fusedreg.param_groups(model, sparsity=sparsity), lr=LR)
    steps = EPOCHS * -(-len(images) // BATCH)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = fusedreg.SparsitySchedule(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            rates.step()
            schedule.step()
    weights = [model[0].weight, model[2].weight]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(sparsity * (64 * 256 + 256 * 10))
    with torch.no_grad():
        return 100 * (model(test_images).argmax(1) == test_labels).double().mean().item()


@one_thread()
def test_the_metric_beats_magnitude(digits, monkeypatch) -> None:
    in_metric = [accuracy(digits, 0.95, seed) for seed in range(SEEDS)]
    monkeypatch.setattr(Weights, "in_metric", property(lambda weights: False))
    by_magnitude = [accuracy(digits, 0.95, seed) for seed in range(SEEDS)]
    print(f"in the metric {in_metric}, by magnitude {by_magnitude}")
    assert statistics.mean(in_metric) > statistics.mean(by_magnitude)
