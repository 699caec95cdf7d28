"""One small net, few data: what each way to regularise does to the training and the test loss.

Digits, 200 images to train on, a fifth of them with a wrong label, a net 64-64-64-10. Without anything it learns its
images by heart, wrong labels included, and its test loss rises. Beside that: L1, L2 and elastic net by
``FusedRegAdam``, dropout, batch normalisation, early stopping, and gradient clipping, which is no regulariser but lets
a net train at a learning rate that is too large.

``fusedreg.param_groups`` keeps biases and the whole of batch normalisation out of the penalty. What it cannot change:
the layer before a batch norm may have any scale, the norm divides it away. So a penalty there does not restrain the
net; it only makes the steps larger, relative to the weights. The table shows it: with batch norm, L1 does not help.

L2 leaves a few exact zeros too, of pixels without ink and units that never fire: no gradient holds their weights up.

Run it with ``python examples/overfitting.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from _common import (
    Run,
    Split,
    load_split,
    mlp,
    parse_arguments,
    percent,
    print_table,
    track,
    train_classifier,
    with_wrong_labels,
)
from _plots import plot_overfitting
from torch import nn

from fusedreg import FusedRegAdam, FusedRegSGD, param_groups, sparsity_report

BATCH_SIZE = 50
TRAINING_IMAGES = 200
LARGE_LR = 0.5  # of SGD with momentum


@dataclass(frozen=True)
class Recipe:
    """What is different from plain FusedRegAdam on the plain net."""

    name: str
    strengths: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    batch_norm: bool = False
    stops_early: bool = False
    sgd: dict[str, Any] | None = None


RECIPES = (
    Recipe("nothing"),
    Recipe("L1, 0.0015", {"l1": 1.5e-3}),
    Recipe("L2, 0.02", {"l2": 2e-2}),
    Recipe("L1 0.001, L2 0.01", {"l1": 1e-3, "l2": 1e-2}),
    Recipe("dropout, p = 0.5", dropout=0.5),
    Recipe("batch norm", batch_norm=True),
    Recipe("batch norm, L1 0.001", {"l1": 1e-3}, batch_norm=True),
    Recipe("early stopping", stops_early=True),
    Recipe(f"lr {LARGE_LR:g}", sgd={}),
    Recipe(f"lr {LARGE_LR:g}, norm <= 0.1", sgd={"max_grad_norm": 0.1}),
)


def make_net(recipe: Recipe, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(64, 64, 64, 10, batch_norm=recipe.batch_norm, dropout=recipe.dropout)


def make_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    if recipe.sgd is not None:
        return FusedRegSGD(net.parameters(), lr=LARGE_LR, momentum=0.9, **recipe.sgd)
    return FusedRegAdam(param_groups(net, **recipe.strengths), lr=3e-3)


def train(recipe: Recipe, data: Split, epochs: int, seed: int) -> Run:
    net = make_net(recipe, seed)
    return train_classifier(net, make_optimizer(recipe, net), data, epochs, BATCH_SIZE, seed, recipe.stops_early)


def zeros(net: nn.Module) -> float:
    """The share of exact zeros in the linear layers' matrices."""
    return sparsity_report(param for param in net.parameters() if param.ndim >= 2).fraction


def main() -> None:
    arguments = parse_arguments(__doc__, epochs=(200, "of each training"))
    data = with_wrong_labels(load_split(train_size=TRAINING_IMAGES, test_size=None), arguments.seed)
    runs = [train(recipe, data, arguments.epochs, arguments.seed) for recipe in track(RECIPES, "trainings")]
    rows, shares = [], {}
    for recipe, run in zip(RECIPES, runs, strict=True):
        losses = f"{run.train_loss[run.stop]:.4f}", f"{run.test_loss[run.stop]:.3f}", f"{min(run.test_loss):.3f}"
        rows.append((recipe.name, *losses, percent(run.accuracy[run.stop]), percent(zeros(run.net), 0)))
        if "l1" in recipe.strengths:
            shares[recipe.name] = zeros(run.net)
    columns = ["", "training loss", "test loss", "lowest", "correct", "zeros"]
    print_table(f"Digits, {TRAINING_IMAGES} images, {arguments.epochs} epochs", columns, rows)
    plot_overfitting(RECIPES, runs, shares, arguments.output / "overfitting.png")


if __name__ == "__main__":
    main()
