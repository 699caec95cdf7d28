# %% [markdown]
"""The loop that tutorials teach for L1 and L2, and the same in FusedRegSGD.

The loop adds ``lambda * sum |w|`` or ``lambda * sum w^2`` to the loss, for ``torch.optim.SGD``. Three ways to train:

* *in the loss*: that loop.
* *subgradient*: ``penalty_mode="subgradient"``, the same weights after every step. That is asserted.
* *proximal*: the default. The same objective, and weights that reach zero stay exactly there.

Mind the factor: tutorials write ``lambda * sum w^2``, whose gradient is ``2 * lambda * w``. fusedreg's ``l2`` is the
strength of ``(l2 / 2) * sum w^2``, whose gradient is ``l2 * w``, as ``weight_decay`` has it in ``torch.optim.SGD``. So
``lambda * sum w^2`` is ``l2=2 * lambda``. There is no such factor in L1.

Run it with ``python examples/tutorial_l1_l2.py``.
"""

# %%
from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from _common import CONSOLE, breast_cancer, mlp, parse_arguments, percent, print_table, random_labels, track
from _plots import plot_tutorial
from torch import Tensor, nn

from fusedreg import FusedRegSGD, sparsity_report

LR = 0.01
BATCH_SIZE = 32
WAYS = IN_THE_LOSS, SUBGRADIENT, PROXIMAL = "in the loss", "subgradient", "proximal"

# %% [markdown]
# ## The data and the net
# Random labels have nothing to learn but noise; breast cancer has. Float64 throughout: in float32, rounding can flip
# the sign of a weight that is all but zero, and from there two runs of the *same* loop go apart.


# %%
def make_net(inputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(inputs, 50, 1).double()


# %% [markdown]
# ## The three ways
# All of them penalise every parameter, biases included, because the tutorials' loop does.


# %%
def penalty_in_the_loss(model: nn.Module, kind: str, strength: float) -> Tensor:
    sums = [w.abs().sum() if kind == "l1" else w.square().sum() for w in model.parameters()]
    return strength * torch.stack(sums).sum()


def make_optimizer(way: str, model: nn.Module, kind: str, strength: float) -> torch.optim.Optimizer:
    if way == IN_THE_LOSS:
        return torch.optim.SGD(model.parameters(), lr=LR)
    strengths = {"l1": strength} if kind == "l1" else {"l2": 2 * strength}
    return FusedRegSGD(model.parameters(), lr=LR, penalty_mode=way, **strengths)


@dataclass
class Run:
    """The objective before the first epoch and after each; the weights after each step, in one vector."""

    objective: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    loss: float = 0.0
    zeros: float = 0.0


def train(
    way: str, initial: nn.Module, data: tuple[Tensor, Tensor], kind: str, strength: float, epochs: int, seed: int
) -> Run:
    x, y = data
    model, criterion, run = copy.deepcopy(initial), nn.BCEWithLogitsLoss(), Run()
    optimizer = make_optimizer(way, model, kind, strength)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs + 1):
        for batch in torch.randperm(len(x), generator=order).split(BATCH_SIZE) if epoch > 0 else ():
            optimizer.zero_grad()
            loss = criterion(model(x[batch]), y[batch])
            if way == IN_THE_LOSS:
                loss = loss + penalty_in_the_loss(model, kind, strength)
            loss.backward()
            optimizer.step()
            run.weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        with torch.no_grad():
            run.loss = criterion(model(x), y).item()
            run.objective.append(run.loss + penalty_in_the_loss(model, kind, strength).item())
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


# %%
def main() -> None:
    arguments = parse_arguments(__doc__, epochs=(20, "of each training"), strength=(0.01, "the tutorials' lambda"))
    epochs, strength, seed = arguments.epochs, arguments.strength, arguments.seed
    sets = {"random labels": random_labels(seed), "breast cancer": breast_cancer(seed)}
    runs, sections = {}, []
    for name, kind in track([(name, kind) for name in sets for kind in ("l1", "l2")], "data, penalty"):
        initial = make_net(sets[name][0].shape[1], seed)
        ways = {way: train(way, initial, sets[name], kind, strength, epochs, seed) for way in WAYS}
        assert_same_steps(ways[IN_THE_LOSS], ways[SUBGRADIENT])
        runs[name, kind] = ways
        rows = []
        for way, run in ways.items():
            is_first = way == IN_THE_LOSS
            distance = "" if is_first else f"{largest_difference(ways[IN_THE_LOSS], run):.0e}"
            label = f"{name}, {kind}" if is_first else ""
            rows.append((label, way, f"{run.loss:.4f}", f"{run.objective[-1]:.4f}", distance, percent(run.zeros)))
        sections.append(rows)
    columns = ["data, penalty", "way", "loss", "+ penalty", "off the loop", "zeros"]
    print_table(f"SGD, lr {LR:g}, lambda = {strength:g}", columns, *sections)
    CONSOLE.print(
        "Off the loop: the largest difference of a weight, over all steps. 'subgradient' took the loop's weights in "
        "every step, to rounding (asserted). 'proximal' has the same objective and takes its steps another way: it "
        "stays beside the loop's weights, and with L1 has zeros.",
        style="dim",
    )
    plot_tutorial(runs, strength, arguments.output / "tutorial-l1-l2.png")


if __name__ == "__main__":
    main()
