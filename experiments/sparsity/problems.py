"""The problems: data that scikit-learn bundles or makes, a model, and how it is trained.

The seeds change initial weights and the order of batches; data and split stay.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images, make_classification
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

LR = {"Adam": 3e-3, "AdamW": 3e-3, "SGD": 0.1}


class Data(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Problem:
    title: str
    make_data: Callable[[], Data]
    make_model: Callable[[], nn.Module]
    epochs: int
    output: str
    """The names of the last layer's parameters, whose rows are the classes; with ``*``."""
    batch_size: int = 64
    lr: dict[str, float] = field(default_factory=lambda: LR)
    """At the start; it falls to 0 as a cosine."""

    @functools.cached_property
    def data(self) -> Data:
        return self.make_data()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.train_x) // self.batch_size)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make_model()


def _split(x: np.ndarray, y: np.ndarray) -> Data:
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    return Data(
        torch.from_numpy(train_x).float(),
        torch.from_numpy(train_y).long(),
        torch.from_numpy(test_x).float(),
        torch.from_numpy(test_y).long(),
    )


def digits() -> Data:
    pixels, labels = load_digits(return_X_y=True)
    return _split(pixels / 16.0, labels)


def digits_and_noise(columns: int = 256) -> Data:
    """Beside the 64 pixels, columns of noise of a pixel's spread: inputs that say nothing."""
    pixels, labels = load_digits(return_X_y=True)
    noise = np.random.default_rng(0).normal(0.5, 0.37, (len(pixels), columns))
    return _split(np.concatenate([pixels / 16.0, noise], axis=1), labels)


def digits_in_a_field(copies: int = 2, size: int = 12) -> Data:
    """Each image at random places of a noisy field, so that a filter must find it wherever it is."""
    random = np.random.default_rng(0)

    def place(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        field = random.normal(0.0, 0.1, (copies * len(images), 1, size, size))
        for i in range(len(field)):
            top, left = random.integers(0, size - 8 + 1, 2)
            field[i, 0, top : top + 8, left : left + 8] += images[i % len(images)].numpy().reshape(8, 8)
        return torch.from_numpy(field).float(), labels.repeat(copies)

    each = digits()
    return Data(*place(each.train_x, each.train_y), *place(each.test_x, each.test_y))


def two_clusters_each() -> Data:
    x, y = make_classification(
        n_samples=4000, n_features=60, n_informative=15, n_redundant=10, n_classes=8, class_sep=1.5, random_state=0
    )
    return _split(x / x.std(axis=0), y)


def places_of_patches(size: int = 12) -> Data:
    """Patches of scikit-learn's two photographs, with noise: from which photograph, and which quarter of its height?"""
    random = np.random.default_rng(0)
    patches, places = [], []
    for i, photograph in enumerate(load_sample_images().images):
        height, width = photograph.shape[:2]
        for top in range(0, height - size + 1, size):
            for left in range(0, width - size + 1, size):
                patches.append(photograph[top : top + size, left : left + size].transpose(2, 0, 1) / 255.0 - 0.5)
                places.append(4 * i + 4 * top // height)
    return _split(np.stack(patches) + random.normal(0, 0.1, (len(patches), 3, size, size)), np.array(places))


def mlp(*sizes: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 9, 10),
    )


def conv_net_with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 36, 8),
    )


PROBLEMS = {
    "digits": Problem("digits, MLP 64-256-10", digits, mlp(64, 256, 10), epochs=70, output="2.*"),
    "conv": Problem("digits in a noisy field, conv net 16-32", digits_in_a_field, conv_net, epochs=20, output="5.*"),
    "wide": Problem(
        "digits and 256 columns of noise, MLP 320-64-10", digits_and_noise, mlp(320, 64, 10), epochs=70, output="2.*"
    ),
    "deep": Problem("digits, MLP 64-128-128-10", digits, mlp(64, 128, 128, 10), epochs=70, output="4.*"),
}
# Made when all else stood, and never tried while a way could still change.
UNSEEN = {
    "clusters": Problem(
        "make_classification, 15 of 60 inputs say something, MLP 60-128-64-8",
        two_clusters_each,
        mlp(60, 128, 64, 8),
        epochs=40,
        output="4.*",
    ),
    "patches": Problem(
        "from where a patch of a photograph is, conv net 16-32 with batch norm",
        places_of_patches,
        conv_net_with_batch_norm,
        epochs=15,
        output="8.*",
    ),
}
