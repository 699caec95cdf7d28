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

import argparse
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _common import (
    BLUE,
    GREY,
    ORANGE,
    Split,
    example_parser,
    load_split,
    make_console,
    make_table,
    parse,
    percent,
    positive_int,
    print_plots,
    progress_bar,
    save,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusedreg import FusedRegAdam, FusedRegSGD, param_groups, sparsity_report

BATCH_SIZE = 50
TRAINING_IMAGES = 200
WRONG_LABELS = 0.2
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
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((64, 64, 64)):
        layers.append(nn.Linear(inputs, outputs))
        if recipe.batch_norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
        if recipe.dropout:
            layers.append(nn.Dropout(recipe.dropout))
    return nn.Sequential(*layers, nn.Linear(64, 10))


def make_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    if recipe.sgd is not None:
        return FusedRegSGD(net.parameters(), lr=LARGE_LR, momentum=0.9, **recipe.sgd)
    return FusedRegAdam(param_groups(net, **recipe.strengths), lr=3e-3)


@dataclass
class Run:
    recipe: Recipe
    net: nn.Module
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    stop: int = 0
    """the epoch whose weights were kept: the last, or that of the lowest validation loss"""


def with_wrong_labels(data: Split, seed: int) -> Split:
    """Moves a share of the training labels to another class."""
    rng = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(len(data.train_y), generator=rng) < WRONG_LABELS
    shift = torch.randint(1, 10, (len(data.train_y),), generator=rng)
    return data._replace(train_y=torch.where(is_wrong, (data.train_y + shift) % 10, data.train_y))


def loss_and_accuracy(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    net.eval()
    with torch.no_grad():
        scores = net(x)
    net.train()
    return cross_entropy(scores, y).item(), (scores.argmax(dim=1) == y).double().mean().item()


def train(recipe: Recipe, data: Split, epochs: int, seed: int, on_epoch: Callable[[], None] = lambda: None) -> Run:
    """Half of the held-out images are for validation, which only early stopping looks at; half are the test."""
    half = len(data.test_y) // 2
    validation, test = (data.test_x[:half], data.test_y[:half]), (data.test_x[half:], data.test_y[half:])
    net = make_net(recipe, seed)
    optimizer = make_optimizer(recipe, net)
    order = torch.Generator().manual_seed(seed)
    run = Run(recipe, net)
    best = math.inf
    kept: dict[str, Tensor] = {}
    for epoch in range(epochs + 1):
        if epoch > 0:
            for batch in torch.randperm(len(data.train_x), generator=order).split(BATCH_SIZE):
                optimizer.zero_grad()
                cross_entropy(net(data.train_x[batch]), data.train_y[batch]).backward()
                optimizer.step()
        run.train_loss.append(loss_and_accuracy(net, data.train_x, data.train_y)[0])
        loss, accuracy = loss_and_accuracy(net, *test)
        run.test_loss.append(loss)
        run.accuracy.append(accuracy)
        run.stop = epoch
        if recipe.stops_early:
            validation_loss, _ = loss_and_accuracy(net, *validation)
            if validation_loss < best:
                best, kept, best_epoch = validation_loss, copy.deepcopy(net.state_dict()), epoch
        on_epoch()
    if kept:
        net.load_state_dict(kept)
        run.stop = best_epoch
    return run


def zeros(net: nn.Module) -> float:
    """The share of exact zeros in the linear layers' matrices."""
    return sparsity_report(param for param in net.parameters() if param.ndim >= 2).fraction


def plot(runs: list[Run], path: Path) -> Path:
    figure, panels = plt.subplots(2, 5, figsize=(17, 7), layout="constrained", sharex=True, sharey=True)
    for axes, run in zip(panels.flat, runs, strict=True):
        recipe = run.recipe
        axes.plot(run.train_loss, color=ORANGE, label="200 training images")
        axes.plot(run.test_loss, color=BLUE, label="test images")
        note = f"test {percent(run.accuracy[run.stop])} correct"
        if "l1" in recipe.strengths:
            note += f"\n{percent(zeros(run.net), 0)} exact zeros"
        if recipe.stops_early:
            axes.axvline(run.stop, color="black", linestyle=":", linewidth=1.5)
            note += f"\nstops at epoch {run.stop}"
        axes.annotate(note, (0.97, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=11)
        axes.axhline(math.log(10), color=GREY, linestyle="--", linewidth=1)
        axes.set_title(recipe.name, fontsize=13)
        axes.set(ylim=(0, 3.4))
    for axes in panels[-1]:
        axes.set_xlabel("epochs")
    for axes in panels[:, 0]:
        axes.set_ylabel("cross-entropy (nats)")
    panels[0, 0].annotate("guessing", (len(runs[0].test_loss) - 1, 2.32), ha="right", va="bottom", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("A net that learns wrong labels by heart, and what keeps it from that", fontsize=16)
    return save(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__)
    parser.add_argument("--epochs", type=positive_int, default=200, help="of each training (default: %(default)s)")
    return parse(parser)


def train_all(epochs: int, seed: int, on_run: Callable[[], None] = lambda: None) -> list[Run]:
    data = with_wrong_labels(load_split(train_size=TRAINING_IMAGES, test_size=None), seed)
    runs = []
    for recipe in RECIPES:
        runs.append(train(recipe, data, epochs, seed))
        on_run()
    return runs


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    with progress_bar(console) as progress:
        task = progress.add_task("trainings", total=len(RECIPES))
        runs = train_all(arguments.epochs, arguments.seed, partial(progress.advance, task))
    columns = ["", "training loss", "test loss", "lowest", "correct", "zeros"]
    table = make_table(f"Digits, {TRAINING_IMAGES} images, {arguments.epochs} epochs", columns)
    for run in runs:
        table.add_row(
            run.recipe.name,
            f"{run.train_loss[run.stop]:.4f}",
            f"{run.test_loss[run.stop]:.3f}",
            f"{min(run.test_loss):.3f}",
            percent(run.accuracy[run.stop]),
            percent(zeros(run.net), 0),
        )
    console.print(table)
    print_plots(console, [plot(runs, arguments.output / "overfitting.png")])


if __name__ == "__main__":
    main()
