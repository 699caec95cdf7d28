"""Softmax regression with ``cost = loss + c * norm(weight, p)``, beside FusedRegAdam.

Tutorials then count the weights below some fraction of the largest, and call them sparse. Two findings, on digits:

* p = 1 is the L1 penalty, and ``l1=c`` minimises the same cost. After the loop, how many weights are "zero" depends on
  the fraction one picks; after FusedRegAdam it does not, because they are zero.
* p = 2 is **not** the L2 penalty. ``norm(W, 2)`` is the root of the sum of squares: a group penalty, with the whole
  matrix as its one group. L2 is the sum of squares itself. The group penalty empties the matrix at a finite c; L2
  never does. At the strength ``l2 = c / norm(W, 2)`` both end at the same weights: the one is the other with a
  strength that depends on the answer. ``group_l1=c, unit="tensor"`` is the group penalty itself, and empties the matrix
  exactly where the formula says.

Run it with ``python examples/softmax_sparsity.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import Split, correct, descend, load_split, parse_arguments, percent, print_table, track
from _plots import plot_softmax_sparsity
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from fusedreg import FusedRegAdam, param_groups

LR = 0.03
P1_STRENGTHS = (1e-3, 3e-3, 1e-2)
P2_STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.6)
FRACTIONS = (0.1, 0.01, 0.001)
Penalty = Callable[[Tensor], Tensor] | None


def norm_penalty(c: float, p: int) -> Penalty:
    return lambda weight: c * torch.linalg.vector_norm(weight, p)


@dataclass
class Fit:
    weight: Tensor
    accuracy: float
    cost: float

    def share_below(self, fraction: float) -> float:
        """The tutorials' sparsity: the share of weights below a fraction of the largest; 0 counts exact zeros."""
        sizes = self.weight.abs()
        return (sizes <= fraction * sizes.max()).double().mean().item()


def fit(
    data: Split,
    steps: int,
    penalty: Penalty = None,
    lr_falls: bool = False,
    cost_penalty: Penalty = None,
    **strengths: float | str,
) -> Fit:
    """Full-batch softmax regression: with ``penalty`` in the loss, or with ``strengths`` for FusedRegAdam.

    The bias is never penalised. The cost is reported with ``cost_penalty`` where no penalty was in the loss. The
    tutorials' loop has a constant lr.
    """
    model = nn.Linear(data.train_x.shape[1], 10)
    nn.init.normal_(model.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(model.bias)
    if penalty is None:
        optimizer = FusedRegAdam(param_groups(model, **strengths), lr=LR)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def cost(penalty: Penalty = penalty) -> Tensor:
        loss = cross_entropy(model(data.train_x), data.train_y)
        return loss if penalty is None else loss + penalty(model.weight)

    descend(optimizer, cost, steps, lr_falls)
    with torch.no_grad():
        end = cost(penalty or cost_penalty).item()
    return Fit(model.weight.detach(), correct(model, data.test_x, data.test_y), end)


def size(result: Fit) -> float:
    return torch.linalg.vector_norm(result.weight).item()


def emptying_strength(data: Split) -> float:
    """The c from which ``c * norm(W, 2)`` leaves nothing: the gradient's norm at W = 0, with the best bias."""
    frequencies = torch.bincount(data.train_y).to(data.train_x.dtype) / len(data.train_y)
    residual = frequencies - one_hot(data.train_y, 10)
    return torch.linalg.vector_norm(residual.T @ data.train_x / len(data.train_x)).item()


def compare_norm_1(data: Split, steps: int) -> dict[float, tuple[Fit, Fit]]:
    """For each c the fit of the loop and ours, as a table too."""
    fits = {}
    for c in track(P1_STRENGTHS, "p = 1"):
        penalty = norm_penalty(c, 1)
        fits[c] = fit(data, steps, penalty), fit(data, steps, l1=c, cost_penalty=penalty)
    sections = [
        [
            (c, way, f"{x.cost:.4f}", percent(x.accuracy), *(percent(x.share_below(f), 0) for f in (*FRACTIONS, 0)))
            for c, way, x in ((f"{c:g}", "Adam", loop), ("", "ours", ours))
        ]
        for c, (loop, ours) in fits.items()
    ]
    columns = ["c", "", "cost", "correct", *(f"< {fraction:g}" for fraction in FRACTIONS), "zeros"]
    print_table("p = 1, and the shares of weights below a fraction of the largest", columns, *sections)
    return fits


def compare_norm_2(data: Split, steps: int) -> dict[float, tuple[float, float, float | None]]:
    """For each c the size of W: with the norm in the loss, l2 = c, l2 = c / norm(W, 2) where W is not empty."""
    sizes, rows, empties_at = {}, [], emptying_strength(data)
    for c in track(P2_STRENGTHS, "p = 2"):
        grouped = fit(data, steps, norm_penalty(c, 2), lr_falls=True)
        plain = fit(data, steps, l2=c, lr_falls=True)
        sizes[c] = size(grouped), size(plain), None
        exact = fit(data, steps, group_l1=c, unit="tensor", lr_falls=True)
        off = torch.linalg.vector_norm(grouped.weight - exact.weight).item()
        rows.append([f"{c:g}", f"{size(grouped):.4f}", f"{size(exact):.4f}", f"{off:.0e}", f"{size(plain):.4f}"])
        if c < empties_at:
            matched = fit(data, steps, l2=c / size(grouped), lr_falls=True)
            sizes[c] = size(grouped), size(plain), size(matched)
            distance = torch.linalg.vector_norm(grouped.weight - matched.weight).item() / size(grouped)
            rows[-1] += [f"{size(matched):.4f}", f"{distance:.0e}"]
    columns = ["c", "norm in the loss", "group_l1 = c", "apart", "l2 = c", "l2 = c / norm(W, 2)", "off the first"]
    print_table(f"p = 2: norm(W, 2) after training; the penalty empties W from c = {empties_at:.3f} on", columns, rows)
    return sizes


def main() -> None:
    arguments = parse_arguments(__doc__, steps=(600, "full-batch, of each fit"))
    data = load_split()
    norm_1, norm_2 = compare_norm_1(data, arguments.steps), compare_norm_2(data, arguments.steps)
    plot_softmax_sparsity(norm_1, norm_2, emptying_strength(data), arguments.output / "softmax-sparsity.png")


if __name__ == "__main__":
    main()
