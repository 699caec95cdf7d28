# %% [markdown]
"""What fusedreg does, on data that ships with scikit-learn: a sparse digits classifier, and the Lasso.

Run it with ``python examples/demo.py``; ``make demo`` installs what it needs. Tables go to the terminal, plots to
``demo-output/``.
"""

# %%
from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import demo_plots
import torch
from _common import (
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
    show_number,
    standardise,
)
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedreg

LR = 3e-3
MAX_GRAD_NORM = 1.0
BATCH_SIZE = 64
# The timing repeats one batch. At the training's rate the unregularized ways would fit it so well that their squared
# gradients become denormal numbers, on which a CPU is slow (torch's fused Adam took 3 times as long). At this rate all
# of them keep working on ordinary numbers.
TIMING_LR = 1e-6
LASSO_ALPHA = 5.0
LASSO_LR = 1.0
LASSO_STEPS = 3000
LASSO_EVERY = 25  # steps between two points of the convergence plot

PLAIN, TUTORIAL, FUSED = "plain Adam", "L1 in the loss", "FusedRegAdam"
TORCH_FUSED = "Adam(fused=True)"


# %% [markdown]
# ## The three ways to train

# %%


@dataclass
class Way:
    """A model with its optimizer, and what its user has to write around ``optimizer.step()``."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    l1_in_loss: float = 0.0
    clip_by_hand: bool = False

    def __post_init__(self) -> None:
        self.weights = weight_matrices(self.model)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.model(inputs), targets)

    def penalty(self) -> Tensor:
        return self.l1_in_loss * torch.stack([weight.abs().sum() for weight in self.weights]).sum()

    def backward(self, inputs: Tensor, targets: Tensor, with_penalty: bool = True) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        if with_penalty and self.l1_in_loss:
            loss = loss + self.penalty()
        loss.backward()

    def step(self) -> None:
        if self.clip_by_hand:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()


def weight_matrices(model: nn.Module) -> list[Tensor]:
    """What the penalty is on: every weight matrix, no bias. It is what ``fusedreg.param_groups`` chooses."""
    return [param for param in model.parameters() if param.ndim >= 2]


def make_ways(initial: nn.Module, l1: float, lr: float) -> list[Way]:
    """The three competitors, each with its own copy of the same initial weights."""
    plain, tutorial, fused = (copy.deepcopy(initial) for _ in range(3))
    return [
        Way(PLAIN, plain, torch.optim.Adam(plain.parameters(), lr=lr)),
        Way(TUTORIAL, tutorial, torch.optim.Adam(tutorial.parameters(), lr=lr), l1_in_loss=l1, clip_by_hand=True),
        Way(
            FUSED,
            fused,
            fusedreg.FusedRegAdam(fusedreg.param_groups(fused, l1=l1), lr=lr, max_grad_norm=MAX_GRAD_NORM),
        ),
    ]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# %% [markdown]
# ## Part 1: digits

# %%


@dataclass
class History:
    """One training run, measured before the first epoch and after each."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)

    @torch.no_grad()
    def measure(self, way: Way, digits: Split, step: int) -> None:
        self.steps.append(step)
        # Without the penalty, so that the three curves show the same quantity.
        self.train_loss.append(way.loss(digits.train_x, digits.train_y).item())
        hits = way.model(digits.test_x).argmax(dim=1) == digits.test_y
        self.test_accuracy.append(100.0 * hits.float().mean().item())
        self.zeros.append(100.0 * fusedreg.sparsity_report(way.weights).fraction)


def train(way: Way, digits: Split, epochs: int, seed: int, on_epoch: Callable[[], None]) -> History:
    """Trains on minibatches, whose order depends on the seed only."""
    order = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(digits.train_x) // BATCH_SIZE)
    schedule = CosineAnnealingLR(way.optimizer, T_max=epochs * steps_per_epoch)
    history = History()
    history.measure(way, digits, step=0)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(digits.train_x), generator=order).split(BATCH_SIZE):
            way.backward(digits.train_x[batch], digits.train_y[batch])
            way.step()
            schedule.step()
        history.measure(way, digits, step=epoch * steps_per_epoch)
        on_epoch()
    return history


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def time_optimizers(
    ways: Sequence[Way], inputs: Tensor, targets: Tensor, rounds: int, on_round: Callable[[], None]
) -> dict[str, float]:
    """Median seconds a step that each way spends on its optimizer and regularizer.

    The ways take turns within a round, so that a busy moment of the machine hits all of them. The penalty's share is
    the extra time of a forward and backward with it over one without it: in the loss it shares their graph, and timing
    it alone would count the start of a second backward.
    """
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    warm_up = max(3, rounds // 10)
    for i in range(warm_up + rounds):
        for way in ways:
            # Untimed: it brings this way's tensors back to the caches, which another way used last.
            way.backward(inputs, targets)
            cost = 0.0
            if way.l1_in_loss:
                without = seconds(partial(way.backward, inputs, targets, with_penalty=False))
                cost = seconds(partial(way.backward, inputs, targets)) - without
            cost += seconds(way.step)
            if i >= warm_up:
                samples[way.name].append(cost)
        on_round()
    return {name: statistics.median(costs) for name, costs in samples.items()}


def digits_table(
    ways: Sequence[Way],
    histories: dict[str, History],
    digits: Split,
    timings: Sequence[tuple[str, dict[str, float]]],
    l1: float,
) -> Table:
    table = make_table(f"Digits, MLP 64-256-10, lambda = {l1:g}", ["", *(way.name for way in ways)], highlight=FUSED)
    with torch.no_grad():
        absolute_sums = [sum(weight.abs().sum().item() for weight in way.weights) for way in ways]
        losses = [way.loss(digits.train_x, digits.train_y).item() for way in ways]
    objectives = [loss + l1 * absolute_sum for loss, absolute_sum in zip(losses, absolute_sums, strict=True)]
    reports = [fusedreg.sparsity_report(way.weights) for way in ways]
    first, second = zip(*(report.tensors for report in reports), strict=True)

    table.add_row("test accuracy", *(f"{histories[way.name].test_accuracy[-1]:.1f} %" for way in ways))
    table.add_row("loss + lambda * sum |w|", *(f"{objective:.4f}" for objective in objectives))
    table.add_row("weights exactly zero", *(percent(report.fraction) for report in reports))
    table.add_row(f"pixels unused, of {first[0].shape[1]}", *(str(tensor.empty_columns) for tensor in first))
    table.add_row(f"units without input, of {first[0].shape[0]}", *(str(tensor.empty_rows) for tensor in first))
    table.add_row(f"units never read, of {second[0].shape[1]}", *(str(t.empty_columns) for t in second))
    table.add_section()
    for label, medians in timings:
        table.add_row(f"optimizer time, {label}", *(f"{medians[way.name] / medians[PLAIN]:.2f} x" for way in ways))
    return table


def run_digits(console: Console, epochs: int, l1: float, seed: int, rounds: int, output: Path) -> list[Path]:
    console.rule("1. A sparse classifier, trained three ways")
    torch.manual_seed(seed)
    digits = load_split()
    initial = mlp(64, 256, 10)
    ways = make_ways(initial, l1, LR)
    with progress_bar(console) as progress:
        histories = {}
        for way in ways:
            task = progress.add_task(f"train: {way.name}", total=epochs)
            histories[way.name] = train(way, digits, epochs, seed, partial(progress.advance, task))

        timings = []
        wide = mlp(1024, 2048, 2048, 10)
        wide_batch = (torch.randn(16, 1024), torch.randint(10, (16,)))
        digits_batch = (digits.train_x[:BATCH_SIZE], digits.train_y[:BATCH_SIZE])
        for model, (inputs, targets), n in ((initial, digits_batch, rounds), (wide, wide_batch, -(-rounds // 20))):
            size = sum(param.numel() for param in model.parameters())
            label = f"{size / 1e3:.0f}k weights" if size < 1e6 else f"{size / 1e6:.1f}M weights"
            competitors = make_ways(model, l1, TIMING_LR)
            copied = copy.deepcopy(model)
            competitors.append(Way(TORCH_FUSED, copied, torch.optim.Adam(copied.parameters(), TIMING_LR, fused=True)))
            task = progress.add_task(f"time: {label}", total=n + max(3, n // 10))
            medians = time_optimizers(competitors, inputs, targets, n, partial(progress.advance, task))
            timings.append((label, medians))

    console.print(digits_table(ways, histories, digits, timings, l1))
    torch_fused_ratios = " and ".join(f"{medians[TORCH_FUSED] / medians[PLAIN]:.2f} x" for _, medians in timings)
    microseconds = " and ".join(f"{1e6 * medians[PLAIN]:,.0f} us" for _, medians in timings)
    console.print(
        "Optimizer time: medians of steps taken in turns after training, relative to plain torch.optim.Adam "
        f"({microseconds} a step, {torch.get_num_threads()} threads). For '{TUTORIAL}' it is clip_grad_norm_ + step() "
        "+ what the penalty adds to forward and backward (a step's time with it minus without it). "
        f"{FUSED} clips and regularizes inside step(). Plain Adam does neither; nor does torch's own {TORCH_FUSED}, "
        f"which takes {torch_fused_ratios}.",
        style="dim",
        highlight=False,
    )
    weights = {way.name: torch.cat([w.detach().flatten() for w in way.weights]).numpy() for way in ways}
    return [
        demo_plots.training_curves(histories, output / "training-curves.png"),
        demo_plots.exact_zeros(histories, l1, output / "exact-zeros.png"),
        demo_plots.weight_histogram(weights, l1, output / "weight-histogram.png"),
    ]


# %% [markdown]
# ## Part 2: the Lasso

# %%


def fit_linear(
    x: Tensor, y: Tensor, alpha: float, fused: bool, solution: Tensor, on_step: Callable[[], None]
) -> tuple[Tensor, list[int], list[float]]:
    """Minimises ``1/(2n) |y - Xw|^2 + alpha |w|_1``; also returns at which steps it was how far from ``solution``."""
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    optimizer = fusedreg.FusedRegAdam([w], lr=LASSO_LR, l1=alpha) if fused else torch.optim.Adam([w], lr=LASSO_LR)
    schedule = CosineAnnealingLR(optimizer, T_max=LASSO_STEPS)
    steps, distances = [], []
    for step in range(LASSO_STEPS + 1):
        if step % LASSO_EVERY == 0:
            steps.append(step)
            distances.append((w.detach() - solution).abs().max().item())
        if step == LASSO_STEPS:
            break
        optimizer.zero_grad()
        loss = (y - x @ w).square().mean() / 2
        if not fused:
            loss = loss + alpha * w.abs().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()
    return w.detach(), steps, distances


def run_lasso(console: Console, output: Path) -> Path:
    console.rule("2. The same lambda as the Lasso's")
    data = load_diabetes()
    x, y = torch.from_numpy(standardise(data.data)), torch.from_numpy(data.target - data.target.mean())
    lasso = Lasso(alpha=LASSO_ALPHA, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x.numpy(), y.numpy())
    solution = torch.from_numpy(lasso.coef_)

    fits = {}
    with progress_bar(console) as progress:
        for name, fused in ((FUSED, True), (TUTORIAL, False)):
            task = progress.add_task(f"fit: {name}", total=LASSO_STEPS)
            fits[name] = fit_linear(x, y, LASSO_ALPHA, fused, solution, partial(progress.advance, task))
    coefficients = {"scikit-learn Lasso": solution, **{name: w for name, (w, _, _) in fits.items()}}

    title = f"Diabetes, {len(y)} patients, alpha = l1 = {LASSO_ALPHA:g}, fp64, {LASSO_STEPS} full-batch steps"
    table = make_table(title, ["coefficient", *coefficients], highlight=FUSED)
    for i, feature in enumerate(data.feature_names):
        table.add_row(feature, *(show_number(w[i].item()) for w in coefficients.values()))
    table.add_section()
    table.add_row("exact zeros", *(str(int((w == 0).sum())) for w in coefficients.values()))
    console.print(table)

    for name, (w, _, _) in fits.items():
        same_support = torch.equal(w != 0, solution != 0)
        difference = (w - solution).abs().max().item()
        console.print(
            f"{name:<{max(map(len, fits))}} and Lasso: same support: [bold]{'yes' if same_support else 'no'}[/bold], "
            f"largest difference: [bold]{difference:.1e}[/bold]",
            highlight=False,
        )
    return demo_plots.lasso_comparison(
        data.feature_names,
        {name: w.numpy() for name, w in coefficients.items()},
        {name: (steps, distances) for name, (_, steps, distances) in fits.items()},
        LASSO_ALPHA,
        output / "lasso-coefficients.png",
    )


# %% [markdown]
# ## The program

# %%


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__, output="demo-output")
    parser.add_argument("--epochs", type=positive_int, default=60, help="epochs on digits (default: %(default)s)")
    parser.add_argument("--l1", type=float, default=3e-4, help="lambda on digits (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=300, help="of timing (default: %(default)s)")
    return parse(parser, threads=None)  # it times large tensors too


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    plots = run_digits(console, arguments.epochs, arguments.l1, arguments.seed, arguments.rounds, arguments.output)
    plots.append(run_lasso(console, arguments.output))
    console.rule("3. Plots")
    print_plots(console, plots)


if __name__ == "__main__":
    main()
