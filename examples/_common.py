"""What the examples share: the command line, tables, data, models, the loop of full-batch steps. See also _plots.py."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import rich.progress
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

CONSOLE = Console(highlight=False)
IN_NOTEBOOK = "ipykernel" in sys.modules

Item = TypeVar("Item")


# -- the command line


def parse_arguments(
    description: str | None, output: str = "examples-output", threads: int | None = 1, **options: tuple[Any, str]
) -> argparse.Namespace:
    """Parses ``--seed``, ``--output`` and the options, each given as (default, help); makes the folder for plots.

    A notebook has no command line: it reads the variable EXAMPLE_ARGUMENTS. PyTorch gets one thread unless told: the
    examples' matrices are so small that threads would only wait for one another.
    """
    parser = argparse.ArgumentParser(description=(description or "").strip().split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="plots' folder (default: %(default)s)")
    for name, (default, text) in options.items():
        kind = positive_int if isinstance(default, int) else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: %(default)s)")
    arguments = parser.parse_args(shlex.split(os.environ.get("EXAMPLE_ARGUMENTS", "")) if IN_NOTEBOOK else None)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    return arguments


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


# -- the terminal


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """The items, with a progress bar."""
    yield from rich.progress.track(items, f"{description:<24}", console=CONSOLE)


def print_table(title: str, columns: Sequence[str], *sections: Iterable[Sequence[str]], highlight: str = "") -> None:
    """A table whose first column is text and whose others are numbers. A line stands between two sections of rows."""
    table = Table(title=title, title_style="bold", title_justify="left")
    for i, column in enumerate(columns):
        style = "bold green" if column == highlight else None
        table.add_column(column, justify="left" if i == 0 else "right", style=style)
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    CONSOLE.print(table)


def show_number(value: float, digits: int = 6) -> str:
    """An exact zero as a bare 0, so that it cannot be mistaken for a small number."""
    if value == 0:
        return "0" + " " * (digits + 1)
    return f"{value:.{digits}f}" if abs(value) >= 0.5 * 10**-digits else f"{value:.0e}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


# -- data


class Split(NamedTuple):
    """Tensors; of ratings, numpy's arrays."""

    train_x: Any
    train_y: Any
    test_x: Any
    test_y: Any


def standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / x.std(axis=0)


def load_split(**options: Any) -> Split:
    """scikit-learn's digits, stratified. The split is fixed, so that another --seed changes the training only."""
    pixels, labels = load_digits(return_X_y=True)
    options = {"test_size": 0.25, "random_state": 0, "stratify": labels, **options}
    train_x, test_x, train_y, test_y = train_test_split(pixels / 16.0, labels, **options)
    dtype = torch.get_default_dtype()
    return Split(
        torch.from_numpy(train_x).to(dtype),
        torch.from_numpy(train_y),
        torch.from_numpy(test_x).to(dtype),
        torch.from_numpy(test_y),
    )


def random_labels(seed: int) -> tuple[Tensor, Tensor]:
    """Two classes and ten features that say nothing of them, in float64."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, 10, generator=rng, dtype=torch.float64)
    return x, torch.randint(2, (1000, 1), generator=rng).double()


def breast_cancer(seed: int) -> tuple[Tensor, Tensor]:
    """Two classes and thirty features, in float64; the same for every seed."""
    x, y = load_breast_cancer(return_X_y=True)
    return torch.from_numpy(standardise(x)), torch.from_numpy(y).double().unsqueeze(1)


def with_wrong_labels(digits: Split, seed: int) -> Split:
    """A fifth of the training images has the label of another digit."""
    rng = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(len(digits.train_y), generator=rng) < 0.2
    shift = torch.randint(1, 10, (len(digits.train_y),), generator=rng)
    return digits._replace(train_y=torch.where(is_wrong, (digits.train_y + shift) % 10, digits.train_y))


# What a film's rating depends on, in points per standard deviation of the feature. The last two are useless.
EFFECTS = {
    "director": 0.8,
    "cast": 0.5,
    "drama": 0.45,
    "horror": -0.35,
    "comedy": 0.3,
    "year": 0.0,
    "running time": 0.0,
}
NOISE = 0.8


def make_ratings(seed: int, films: int = 1000) -> Split:
    """A viewer's ratings of films, made up; half of the films are to learn from."""
    rng = np.random.default_rng(seed)
    genre = rng.choice(4, size=films, p=(0.4, 0.15, 0.3, 0.15))  # drama, horror, comedy, anything else
    director, cast = rng.multivariate_normal((0, 0), ((1, 0.4), (0.4, 1)), size=films).T  # good ones find each other
    year = rng.uniform(1960, 2020, size=films)
    running_time = 105 + 0.3 * (year - 1990) + 8 * (genre == 0) + 10 * rng.standard_normal(films)
    columns = {
        "director": director,
        "cast": cast,
        "drama": genre == 0,
        "horror": genre == 1,
        "comedy": genre == 2,
        "year": year,
        "running time": running_time,
    }
    x = standardise(np.column_stack([columns[name] for name in EFFECTS]).astype(float))
    y = 6.0 + x @ np.array(list(EFFECTS.values())) + NOISE * rng.standard_normal(films)
    half = films // 2
    x, y = x - x[:half].mean(axis=0), y - y[:half].mean()  # instead of an intercept
    return Split(x[:half], y[:half], x[half:], y[half:])


# -- models and training


def mlp(*widths: int, batch_norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        if batch_norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def half_mean_square(prediction: Tensor, y: Tensor) -> Tensor:
    """The loss of scikit-learn's linear regressions."""
    return (prediction - y).square().mean() / 2


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    steps: int,
    lr_falls: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimises the loss, step by step. The learning rate falls to zero as a cosine, or stays as it is.

    Adam's steps have about the size of its lr, whatever the gradient, and so come to rest only where the lr does.
    """
    schedule = CosineAnnealingLR(optimizer, T_max=steps) if lr_falls else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        after_step()


def endless_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of minibatches, epoch after epoch."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order).split(batch_size)


@dataclass
class Run:
    """A net's losses before the first epoch and after each. The net has the weights of the epoch ``stop``."""

    net: nn.Module
    stop: int = 0
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def train_classifier(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Split,
    epochs: int,
    batch_size: int,
    seed: int,
    stops_early: bool = False,
) -> Run:
    """Half of the held-out images are for validation, which only early stopping looks at; half are the test."""
    half = len(data.test_y) // 2
    validation, test = (data.test_x[:half], data.test_y[:half]), (data.test_x[half:], data.test_y[half:])
    order = torch.Generator().manual_seed(seed)
    run = Run(net)
    best, kept = math.inf, {}
    for epoch in range(epochs + 1):
        net.train()
        for batch in torch.randperm(len(data.train_x), generator=order).split(batch_size) if epoch > 0 else ():
            optimizer.zero_grad()
            cross_entropy(net(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            losses = [cross_entropy(net(x), y).item() for x, y in ((data.train_x, data.train_y), test, validation)]
        run.train_loss.append(losses[0])
        run.test_loss.append(losses[1])
        run.accuracy.append(correct(net, *test))
        if losses[2] < best or not stops_early:
            best, kept, run.stop = losses[2], copy.deepcopy(net.state_dict()), epoch
    net.load_state_dict(kept)
    return run


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images whose class the model finds."""
    return (model(x).argmax(dim=1) == y).double().mean().item()


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
