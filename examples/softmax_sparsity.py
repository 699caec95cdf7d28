"""Softmax regression with ``cost = loss + c * norm(weight, p)``, beside FusedRegAdam.

Tutorials then count the weights below some fraction of the largest, and call them sparse. Two findings, on digits:

* p = 1 is the L1 penalty, and ``l1=c`` minimises the same cost. After the loop, how many weights are "zero" depends on
  the fraction one picks; after FusedRegAdam it does not, because they are zero.
* p = 2 is **not** the L2 penalty. ``norm(W, 2)`` is the root of the sum of squares: a group penalty, with the whole
  matrix as its one group. L2 is the sum of squares itself. The group penalty empties the matrix at a finite c; L2
  never does. At the strength ``l2 = c / norm(W, 2)`` both end at the same weights: the one is the other with a
  strength that depends on the answer. fusedreg has L2, and no group penalty.

Run it with ``python examples/softmax_sparsity.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import (
    BLUE,
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
from torch.optim.lr_scheduler import CosineAnnealingLR

from fusedreg import FusedRegAdam, param_groups

LR = 0.03
P1_STRENGTHS = (1e-3, 3e-3, 1e-2)
P2_STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.6)
FRACTIONS = (0.1, 0.01, 0.001)


@dataclass
class Fit:
    weight: Tensor
    accuracy: float
    """on the test set"""
    cost: float
    """loss + c * norm(weight, p) on the training set, for the c and p that were asked for"""

    def share_below(self, fraction: float) -> float:
        """The tutorials' sparsity: the share of weights below a fraction of the largest; 0 counts exact zeros."""
        sizes = self.weight.abs()
        return (sizes <= fraction * sizes.max()).double().mean().item()


Penalty = Callable[[Tensor], Tensor]


def fit(
    data: Split,
    steps: int,
    penalty: Penalty | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    lr_falls: bool = False,
    cost_penalty: Penalty | None = None,
) -> Fit:
    """Full-batch softmax regression: with ``penalty`` in the loss, or with strengths for FusedRegAdam.

    The bias is never penalised. ``cost_penalty`` is what the cost is reported with where none was in the loss. Adam
    comes to rest at the minimum only where its lr falls; the tutorials' loop has a constant one.
    """
    model = nn.Linear(data.train_x.shape[1], 10)
    nn.init.normal_(model.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(model.bias)
    if penalty is not None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    else:
        optimizer = FusedRegAdam(param_groups(model, l1=l1, l2=l2), lr=LR)
    schedule = CosineAnnealingLR(optimizer, T_max=steps) if lr_falls else None
    for _ in range(steps):
        optimizer.zero_grad()
        cost = cross_entropy(model(data.train_x), data.train_y)
        if penalty is not None:
            cost = cost + penalty(model.weight)
        cost.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    with torch.no_grad():
        accuracy = (model(data.test_x).argmax(dim=1) == data.test_y).double().mean().item()
        cost = cross_entropy(model(data.train_x), data.train_y)
        penalty = penalty or cost_penalty
        if penalty is not None:
            cost = cost + penalty(model.weight)
    return Fit(model.weight.detach(), accuracy, cost.item())


def norm_penalty(c: float, p: int) -> Penalty:
    return lambda weight: c * torch.linalg.vector_norm(weight, p)


def size(result: Fit) -> float:
    return torch.linalg.vector_norm(result.weight).item()


def emptying_strength(data: Split) -> float:
    """The c from which ``c * norm(W, 2)`` leaves nothing: the gradient's norm at W = 0, with the best bias."""
    frequencies = torch.bincount(data.train_y).to(data.train_x.dtype) / len(data.train_y)
    residual = frequencies - nn.functional.one_hot(data.train_y, 10)
    return torch.linalg.vector_norm(residual.T @ data.train_x / len(data.train_x)).item()


P1 = dict[float, tuple[Fit, Fit]]  # c -> the loop's fit, FusedRegAdam's
P2 = dict[float, tuple[Fit, Fit, Fit | None]]  # c -> norm in the loss, l2 = c, l2 = c / norm(W, 2) where W is not empty


def plot(p1: P1, p2: P2, empties_at: float, path: Path) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    fractions = np.logspace(-6, 0, 200)
    for (c, (loop, fused)), line in zip(p1.items(), (":", "--", "-"), strict=True):
        for result, colour, name in ((loop, ORANGE, "norm(W, 1) in the loss"), (fused, BLUE, "FusedRegAdam, l1=c")):
            shares = [100 * result.share_below(fraction) for fraction in fractions]
            left.plot(fractions, shares, color=colour, linestyle=line, label=f"{name}, c = {c:g}")
    left.set(
        title="p = 1: true zeros need no threshold",
        xlabel="threshold, as a fraction of the largest weight",
        ylabel="weights that count as zero (%)",
        xscale="log",
        ylim=(-2, 102),
    )
    left.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, 0.62))
    strengths = list(p2)
    grouped, plain, matched = zip(*p2.values(), strict=True)
    right.plot(strengths, list(map(size, grouped)), "o-", color=ORANGE, label="c * norm(W, 2) in the loss")
    right.plot(strengths, list(map(size, plain)), "s-", color=BLUE, label="FusedRegAdam, l2=c")
    same = [(c, size(result)) for c, result in zip(strengths, matched, strict=True) if result is not None]
    crosses: dict[str, Any] = {"color": "black", "markersize": 10, "markeredgewidth": 2, "zorder": 3}
    right.plot(*zip(*same, strict=True), "x", **crosses, label="FusedRegAdam, l2 = c / norm(W, 2)")
    right.axvline(empties_at, ymax=0.75, color="black", linewidth=1, linestyle=":")
    right.annotate(
        "the group penalty\nempties W here", (empties_at, 3), xytext=(-8, 0), textcoords="offset points", ha="right"
    )
    right.set(
        title="p = 2: a norm is not L2",
        xlabel="c",
        ylabel="norm(W, 2) of the trained weights",
        ylim=(0, None),
    )
    right.legend(fontsize=10)
    return save(figure, path)


def run_p1(data: Split, steps: int, on_fit: Callable[[], None] = lambda: None) -> P1:
    results: P1 = {}
    for c in P1_STRENGTHS:
        penalty = norm_penalty(c, 1)
        results[c] = fit(data, steps, penalty), fit(data, steps, l1=c, cost_penalty=penalty)
        on_fit()
    return results


def run_p2(data: Split, steps: int, on_fit: Callable[[], None] = lambda: None) -> P2:
    results: P2 = {}
    empties_at = emptying_strength(data)
    for c in P2_STRENGTHS:
        penalty = norm_penalty(c, 2)
        grouped = fit(data, steps, penalty, lr_falls=True)
        norm = torch.linalg.vector_norm(grouped.weight).item()
        results[c] = (
            grouped,
            fit(data, steps, l2=c, lr_falls=True),
            fit(data, steps, l2=c / norm, lr_falls=True) if c < empties_at else None,
        )
        on_fit()
    return results


def parse_arguments() -> argparse.Namespace:
    parser = example_parser(__doc__)
    parser.add_argument(
        "--steps", type=positive_int, default=600, help="full-batch, of each fit (default: %(default)s)"
    )
    return parse(parser)


def main() -> None:
    arguments = parse_arguments()
    console = make_console()
    data = load_split()
    with progress_bar(console) as progress:
        task = progress.add_task("p = 1", total=len(P1_STRENGTHS))
        p1 = run_p1(data, arguments.steps, partial(progress.advance, task))
        task = progress.add_task("p = 2", total=len(P2_STRENGTHS))
        p2 = run_p2(data, arguments.steps, partial(progress.advance, task))

    columns = ["c", "", "cost", "correct", *(f"< {fraction:g}" for fraction in FRACTIONS), "zeros"]
    table = make_table("p = 1, and the shares of weights below a fraction of the largest", columns)
    for c, fits in p1.items():
        for i, (name, result) in enumerate(zip(("Adam", "ours"), fits, strict=True)):
            shares = (percent(result.share_below(fraction), 0) for fraction in (*FRACTIONS, 0))
            accuracy = percent(result.accuracy)
            table.add_row(f"{c:g}" if i == 0 else "", name, f"{result.cost:.4f}", accuracy, *shares, end_section=i == 1)
    console.print(table)

    empties_at = emptying_strength(data)
    columns = ["c", "norm in the loss", "l2 = c", "l2 = c / norm(W, 2)", "off the first"]
    table = make_table(f"p = 2: norm(W, 2) after training; the penalty empties W from c = {empties_at:.3f} on", columns)
    for c, (grouped, plain, matched) in p2.items():
        row = [f"{c:g}", f"{size(grouped):.4f}", f"{size(plain):.4f}"]
        if matched is not None:
            distance = torch.linalg.vector_norm(grouped.weight - matched.weight).item() / size(grouped)
            row += [f"{size(matched):.4f}", f"{distance:.0e}"]
        table.add_row(*row)
    console.print(table)
    print_plots(console, [plot(p1, p2, empties_at, arguments.output / "softmax-sparsity.png")])


if __name__ == "__main__":
    main()
