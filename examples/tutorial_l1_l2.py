# %% [markdown]
"""The loop that tutorials teach for L1 and L2, and the same in FusedRegSGD.

The loop adds ``lambda * sum |w|`` or ``lambda * sum w^2`` to the loss, for ``torch.optim.SGD``. Three ways to train:

* *in the loss*: that loop.
* *subgradient*: ``l1_mode="subgradient"``, the same weights after every step. That is asserted.
* *proximal*: the default. The same objective, and weights that reach zero stay exactly there.

Mind the factor: tutorials write ``lambda * sum w^2``, whose gradient is ``2 * lambda * w``. fusedreg's ``l2`` is the
strength of ``(l2 / 2) * sum w^2``, whose gradient is ``l2 * w``, as ``weight_decay`` has it in ``torch.optim.SGD``. So
``lambda * sum w^2`` is ``l2=2 * lambda``. There is no such factor in L1.

Run it with ``python examples/tutorial_l1_l2.py``.
"""

# %%
from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from _common import (
    BLUE,
    GREY,
    ORANGE,
    example_parser,
    make_console,
    make_table,
    parse,
    percent,
    positive_int,
    print_plots,
    progress_bar,
    save,
    standardise,
)
from rich.console import Console
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from fusedreg import FusedRegSGD, sparsity_report

LR = 0.01
BATCH_SIZE = 32
IN_THE_LOSS, SUBGRADIENT, PROXIMAL = "in the loss", "subgradient", "proximal"

# %% [markdown]
# ## The data and the net
# Random labels have nothing to learn but noise; breast cancer has. Float64 throughout: in float32, rounding can flip
# the sign of a weight that is all but zero, and from there two runs of the *same* loop go apart.

# %%


def random_labels(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, 10, generator=rng, dtype=torch.float64)
    return x, torch.randint(2, (1000, 1), generator=rng).double()


def breast_cancer(seed: int) -> tuple[Tensor, Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    return torch.from_numpy(standardise(x)), torch.from_numpy(y).double().unsqueeze(1)


def make_net(inputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 50), nn.ReLU(), nn.Linear(50, 1)).double()


# %% [markdown]
# ## The three ways
# All of them penalise every parameter, biases included, because the tutorials' loop does.

# %%


def penalty_in_the_loss(model: nn.Module, kind: str, strength: float) -> Tensor:
    if kind == "l1":
        return strength * torch.stack([w.abs().sum() for w in model.parameters()]).sum()
    return strength * torch.stack([w.square().sum() for w in model.parameters()]).sum()


def make_optimizer(way: str, model: nn.Module, kind: str, strength: float) -> torch.optim.Optimizer:
    if way == IN_THE_LOSS:
        return torch.optim.SGD(model.parameters(), lr=LR)
    if kind == "l1":
        return FusedRegSGD(model.parameters(), lr=LR, l1=strength, l1_mode=way)
    return FusedRegSGD(model.parameters(), lr=LR, l2=2 * strength, l1_mode=way)


@dataclass
class Run:
    """One training: the objective (loss and penalty) before the first epoch and after each, and its end."""

    objective: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    """after every step, all parameters in one vector"""
    loss: float = 0.0
    zeros: float = 0.0


def train(
    way: str,
    initial: nn.Module,
    data: tuple[Tensor, Tensor],
    kind: str,
    strength: float,
    epochs: int,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Run:
    x, y = data
    model = copy.deepcopy(initial)
    criterion = nn.BCEWithLogitsLoss()
    optimizer = make_optimizer(way, model, kind, strength)
    order = torch.Generator().manual_seed(seed)
    run = Run()

    @torch.no_grad()
    def measure() -> None:
        run.loss = criterion(model(x), y).item()
        run.objective.append(run.loss + penalty_in_the_loss(model, kind, strength).item())

    measure()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = criterion(model(x[batch]), y[batch])
            if way == IN_THE_LOSS:
                loss = loss + penalty_in_the_loss(model, kind, strength)
            loss.backward()
            optimizer.step()
            run.weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        measure()
        on_epoch()
    run.zeros = sparsity_report(model).fraction
    return run


# %% [markdown]
# ## The claim: the same weights, step by step

# %%


def largest_difference(one: Run, other: Run) -> float:
    """Of any weight, after any step."""
    return max((a - b).abs().max().item() for a, b in zip(one.weights, other.weights, strict=True))


def assert_same_steps(loop: Run, ours: Run) -> None:
    difference = largest_difference(loop, ours)
    assert difference < 1e-12, f"the weights differ by up to {difference:.1e}"


Runs = dict[tuple[str, str], dict[str, Run]]  # (data, penalty) -> way -> run


def train_all(console: Console, strength: float, epochs: int, seed: int) -> Runs:
    runs: Runs = {}
    with progress_bar(console) as progress:
        for name, data in (("random labels", random_labels(seed)), ("breast cancer", breast_cancer(seed))):
            initial = make_net(data[0].shape[1], seed)
            for kind in ("l1", "l2"):
                task = progress.add_task(f"{name}, {kind}", total=3 * epochs)
                runs[name, kind] = {
                    way: train(way, initial, data, kind, strength, epochs, seed, partial(progress.advance, task))
                    for way in (IN_THE_LOSS, SUBGRADIENT, PROXIMAL)
                }
    return runs


def print_table(console: Console, runs: Runs, strength: float) -> None:
    columns = ["data, penalty", "way", "loss", "+ penalty", "off the loop", "zeros"]
    table = make_table(f"SGD, lr {LR:g}, lambda = {strength:g}", columns)
    for (data, kind), ways in runs.items():
        assert_same_steps(ways[IN_THE_LOSS], ways[SUBGRADIENT])
        for way, run in ways.items():
            distance = largest_difference(ways[IN_THE_LOSS], run)
            table.add_row(
                f"{data}, {kind}" if way == IN_THE_LOSS else "",
                way,
                f"{run.loss:.4f}",
                f"{run.objective[-1]:.4f}",
                "" if way == IN_THE_LOSS else f"{distance:.0e}",
                percent(run.zeros),
                end_section=way == PROXIMAL,
            )
    console.print(table)
    console.print(
        "Off the loop: the largest difference of a weight, over all steps. 'subgradient' took the loop's weights in "
        "every step, to rounding (asserted). 'proximal' has the same objective and takes its steps another way: it "
        "stays beside the loop's weights, and with L1 has zeros.",
        style="dim",
    )


def plot(runs: Runs, strength: float, path: Path) -> Path:
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True)
    styles = {IN_THE_LOSS: (GREY, "-", 6.0), SUBGRADIENT: (ORANGE, "-", 2.2), PROXIMAL: (BLUE, (0, (2, 2)), 2.2)}
    formulas = {"l1": r"$\lambda \sum |w|$", "l2": r"$\lambda \sum w^2$"}
    for axes, ((data, kind), ways) in zip(panels.flat, runs.items(), strict=True):
        for way, run in ways.items():
            colour, line, width = styles[way]
            label = f"{way}: {percent(run.zeros, 0)} exact zeros"
            axes.plot(run.objective, color=colour, linestyle=line, linewidth=width, label=label)
        axes.set_title(f"{data}, loss + {formulas[kind]}")
        axes.legend(title="trained with")
    for axes in panels[-1]:
        axes.set_xlabel("epochs")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss + penalty (nats)")
    figure.suptitle(
        rf"One objective, three ways to it, the same curves: only proximal L1 has zeros ($\lambda$ = {strength:g})",
        fontsize=15,
    )
    return save(figure, path)


# %%


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__)
    parser.add_argument("--epochs", type=positive_int, default=20, help="of each training (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=0.01, help="the tutorials' lambda (default: %(default)s)")
    return parse(parser)


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    runs = train_all(console, arguments.strength, arguments.epochs, arguments.seed)
    print_table(console, runs, arguments.strength)
    print_plots(console, [plot(runs, arguments.strength, arguments.output / "tutorial-l1-l2.png")])


if __name__ == "__main__":
    main()
