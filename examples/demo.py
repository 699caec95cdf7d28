# %% [markdown]
"""What fusedreg does, on data that ships with scikit-learn: sparse and small digits classifiers, and the Lasso.

Run it with ``python examples/demo.py``; ``make demo`` installs what it needs. Tables go to the terminal, plots to
``demo-output/``.
"""

# %%
from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import _shrinking as shrinking
import demo_plots
import torch
from _common import (
    CONSOLE,
    Split,
    correct,
    descend,
    half_mean_square,
    load_split,
    mlp,
    parse_arguments,
    percent,
    print_table,
    seconds,
    show_number,
    standardise,
    track,
)
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
        # What the penalty is on: every weight matrix, no bias. It is what fusedreg.param_groups chooses.
        self.weights = [param for param in self.model.parameters() if param.ndim >= 2]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.model(inputs), targets)

    def absolute_sum(self) -> Tensor:
        return torch.stack([weight.abs().sum() for weight in self.weights]).sum()

    def backward(self, inputs: Tensor, targets: Tensor, with_penalty: bool = True) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        if with_penalty and self.l1_in_loss:
            loss = loss + self.l1_in_loss * self.absolute_sum()
        loss.backward()

    def step(self) -> None:
        if self.clip_by_hand:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()


def make_ways(initial: nn.Module, l1: float, lr: float) -> list[Way]:
    """The three competitors, each with its own copy of the same initial weights."""
    plain, tutorial, fused = (copy.deepcopy(initial) for _ in range(3))
    ours = fusedreg.FusedRegAdam(fusedreg.param_groups(fused, l1=l1), lr=lr, max_grad_norm=MAX_GRAD_NORM)
    return [
        Way(PLAIN, plain, torch.optim.Adam(plain.parameters(), lr=lr)),
        Way(TUTORIAL, tutorial, torch.optim.Adam(tutorial.parameters(), lr=lr), l1_in_loss=l1, clip_by_hand=True),
        Way(FUSED, fused, ours),
    ]


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
        self.test_accuracy.append(100.0 * correct(way.model, digits.test_x, digits.test_y))
        self.zeros.append(100.0 * fusedreg.sparsity_report(way.weights).fraction)


def train(way: Way, digits: Split, epochs: int, seed: int) -> History:
    """Trains on minibatches, whose order depends on the seed only."""
    order = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(digits.train_x) // BATCH_SIZE)
    schedule = CosineAnnealingLR(way.optimizer, T_max=epochs * steps_per_epoch)
    history = History()
    history.measure(way, digits, step=0)
    for epoch in track(range(1, epochs + 1), f"train: {way.name}"):
        for batch in torch.randperm(len(digits.train_x), generator=order).split(BATCH_SIZE):
            way.backward(digits.train_x[batch], digits.train_y[batch])
            way.step()
            schedule.step()
        history.measure(way, digits, step=epoch * steps_per_epoch)
    return history


def print_digits(ways: Sequence[Way], histories: dict[str, History], digits: Split, l1: float) -> None:
    with torch.no_grad():
        objectives = [way.loss(digits.train_x, digits.train_y) + l1 * way.absolute_sum() for way in ways]
    reports = [fusedreg.sparsity_report(way.weights) for way in ways]
    first, second = zip(*(report.tensors for report in reports), strict=True)
    rows = [
        ("test accuracy", *(f"{histories[way.name].test_accuracy[-1]:.1f} %" for way in ways)),
        ("loss + lambda * sum |w|", *(f"{objective:.4f}" for objective in objectives)),
        ("weights exactly zero", *(percent(report.fraction) for report in reports)),
        (f"pixels unused, of {first[0].shape[1]}", *(str(tensor.empty_columns) for tensor in first)),
        (f"units without input, of {first[0].shape[0]}", *(str(tensor.empty_rows) for tensor in first)),
        (f"units never read, of {second[0].shape[1]}", *(str(tensor.empty_columns) for tensor in second)),
    ]
    print_table(f"Digits, MLP 64-256-10, lambda = {l1:g}", ["", *(way.name for way in ways)], rows, highlight=FUSED)


def run_digits(epochs: int, l1: float, seed: int, output: Path) -> None:
    CONSOLE.rule("1. A sparse classifier, trained three ways")
    torch.manual_seed(seed)
    digits = load_split()
    ways = make_ways(mlp(64, 256, 10), l1, LR)
    histories = {way.name: train(way, digits, epochs, seed) for way in ways}
    print_digits(ways, histories, digits, l1)
    weights = {way.name: torch.cat([w.detach().flatten() for w in way.weights]).numpy() for way in ways}
    demo_plots.training_curves(histories, output / "training-curves.png")
    demo_plots.exact_zeros(histories, l1, output / "exact-zeros.png")
    demo_plots.weight_histogram(weights, l1, output / "weight-histogram.png")


# %% [markdown]
# ## Part 2: what the optimizer's part of a step takes


# %%
def time_optimizers(ways: Sequence[Way], inputs: Tensor, targets: Tensor, rounds: int, label: str) -> dict[str, float]:
    """Median seconds a step that each way spends on its optimizer and regularizer.

    The ways take turns within a round, so that a busy moment of the machine hits all of them. The penalty's share is
    the extra time of a forward and backward with it over one without it: in the loss it shares their graph, and timing
    it alone would count the start of a second backward.
    """
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    warm_up = max(3, rounds // 10)
    for i in track(range(warm_up + rounds), f"time: {label}"):
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
    return {name: statistics.median(costs) for name, costs in samples.items()}


def run_timing(l1: float, seed: int, rounds: int) -> None:
    CONSOLE.rule("2. What it costs")
    torch.manual_seed(seed)
    rows, plain, torch_fused = [], [], []
    # A net like the first part's, and one that fits in no cache, which takes 20 times as long.
    for widths, batch_size, n in (((64, 256, 10), 64, rounds), ((1024, 2048, 2048, 10), 16, -(-rounds // 20))):
        model = mlp(*widths)
        size = sum(param.numel() for param in model.parameters())
        label = f"{size / 1e3:.0f}k weights" if size < 1e6 else f"{size / 1e6:.1f}M weights"
        ways, other = make_ways(model, l1, TIMING_LR), copy.deepcopy(model)
        ways.append(Way(TORCH_FUSED, other, torch.optim.Adam(other.parameters(), TIMING_LR, fused=True)))
        inputs, targets = torch.rand(batch_size, widths[0]), torch.randint(10, (batch_size,))
        medians = time_optimizers(ways, inputs, targets, n, label)
        rows.append((label, *(f"{medians[name] / medians[PLAIN]:.2f} x" for name in (PLAIN, TUTORIAL, FUSED))))
        plain.append(f"{1e6 * medians[PLAIN]:,.0f} us")
        torch_fused.append(f"{medians[TORCH_FUSED] / medians[PLAIN]:.2f} x")
    print_table("Optimizer time", ["", PLAIN, TUTORIAL, FUSED], rows, highlight=FUSED)
    CONSOLE.print(
        "Medians of steps taken in turns, relative to plain torch.optim.Adam "
        f"({' and '.join(plain)} a step, {torch.get_num_threads()} threads). For '{TUTORIAL}' it is clip_grad_norm_ + "
        "step() + what the penalty adds to forward and backward (a step's time with it minus without it). "
        f"{FUSED} clips and regularizes inside step(). Plain Adam does neither; nor does torch's own {TORCH_FUSED}, "
        f"which takes {' and '.join(torch_fused)}.",
        style="dim",
    )


# %% [markdown]
# ## Part 3: the Lasso


# %%
def fit_linear(x: Tensor, y: Tensor, fused: bool, solution: Tensor) -> tuple[Tensor, list[float]]:
    """Minimises ``1/(2n) |y - Xw|^2 + alpha |w|_1``; also returns how far from ``solution`` it was after each step."""
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    distances: list[float] = []

    def loss() -> Tensor:
        loss = half_mean_square(x @ w, y)
        return loss if fused else loss + LASSO_ALPHA * w.abs().sum()

    def measure() -> None:
        distances.append((w.detach() - solution).abs().max().item())

    optimizer = fusedreg.FusedRegAdam([w], LASSO_LR, l1=LASSO_ALPHA) if fused else torch.optim.Adam([w], LASSO_LR)
    measure()
    descend(optimizer, loss, LASSO_STEPS, after_step=measure)
    return w.detach(), distances


def run_lasso(output: Path) -> None:
    CONSOLE.rule("3. The same lambda as the Lasso's")
    data = load_diabetes()
    x, y = torch.from_numpy(standardise(data.data)), torch.from_numpy(data.target - data.target.mean())
    lasso = Lasso(alpha=LASSO_ALPHA, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x.numpy(), y.numpy())
    solution = torch.from_numpy(lasso.coef_)
    fits = {name: fit_linear(x, y, name == FUSED, solution) for name in track((FUSED, TUTORIAL), "fits")}

    coefficients = {"scikit-learn Lasso": solution, **{name: w for name, (w, _) in fits.items()}}
    features = [
        (name, *(show_number(w[i].item()) for w in coefficients.values())) for i, name in enumerate(data.feature_names)
    ]
    zeros = ("exact zeros", *(str(int((w == 0).sum())) for w in coefficients.values()))
    title = f"Diabetes, {len(y)} patients, alpha = l1 = {LASSO_ALPHA:g}, fp64, {LASSO_STEPS} full-batch steps"
    print_table(title, ["coefficient", *coefficients], features, [zeros], highlight=FUSED)
    for name, (w, distances) in fits.items():
        same_support = "yes" if torch.equal(w != 0, solution != 0) else "no"
        CONSOLE.print(
            f"{name:<{max(map(len, fits))}} and Lasso: same support: [bold]{same_support}[/bold], "
            f"largest difference: [bold]{distances[-1]:.1e}[/bold]"
        )
    demo_plots.lasso_comparison(
        data.feature_names,
        solution.numpy(),
        fits[FUSED][0].numpy(),
        {name: distances for name, (_, distances) in fits.items()},
        LASSO_EVERY,
        LASSO_ALPHA,
        output / "lasso-coefficients.png",
    )


# %% [markdown]
# ## Part 4: zeros that pay


# %%
def run_shrinking(seed: int, steps: int, output: Path) -> None:
    CONSOLE.rule("4. A smaller, faster model with the same outputs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are so small that threads would only wait for one another
    results = shrinking.run_all(load_split(), steps, range(seed, seed + 3))
    shrinking.print_shrinking(results)
    torch.set_num_threads(threads)
    points: dict[str, list[tuple[float, float]]] = {}
    for runs in results:
        size = statistics.mean(shrinking.numbers(run.net) for run in runs)
        points.setdefault(runs[0].way, []).append((size, 100 * statistics.mean(run.accuracy for run in runs)))
    demo_plots.accuracy_against_size(points, output / "accuracy-against-size.png")
    one = results[1][0]
    matrices = [
        [param.detach().numpy() for param in net.parameters() if param.ndim == 2] for net in (one.trained, one.net)
    ]
    demo_plots.before_and_after(*matrices, output / "before-and-after.png")


# %% [markdown]
# ## The program


# %%
def main() -> None:
    arguments = parse_arguments(
        __doc__,
        output="demo-output",
        threads=None,  # it times large tensors too
        epochs=(60, "epochs on digits"),
        l1=(3e-4, "lambda on digits"),
        rounds=(300, "of timing"),
        steps=(550, "of each net that is made smaller"),
    )
    run_digits(arguments.epochs, arguments.l1, arguments.seed, arguments.output)
    run_timing(arguments.l1, arguments.seed, arguments.rounds)
    run_lasso(arguments.output)
    run_shrinking(arguments.seed, arguments.steps, arguments.output)


if __name__ == "__main__":
    main()
