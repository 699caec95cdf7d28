"""The ways to a network with a given share of zeros. Each trains for the problem's epochs in all, and no longer.

What they share: the schedule of gradual pruning (from 10 % to 75 % of the training, every 10 steps, cubic), the
learning rate that falls to 0 as a cosine, and that what was made zero stays zero by ``freeze_zeros``. A mask comes to
the same weights, bit by bit, which ``tests/test_experiments.py`` proves. Biases and norm layers are spared. Whole units
are the rows of all layers but the last, and each layer keeps its best one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedreg
from fusedreg.penalties import OPTIONS

from .problems import Problem

BEGIN, END, EVERY = 0.1, 0.75, 10
OPTIMIZERS = {"Adam": fusedreg.FusedRegAdam, "AdamW": fusedreg.FusedRegAdamW, "SGD": fusedreg.FusedRegSGD}
HAS_GROUP_L1 = any(option.name == "group_l1" for option in OPTIONS)

AfterStep = Callable[[int], None]


class Result(NamedTuple):
    accuracy: float
    """on the test set, after the last step"""
    zeros: float
    """share of the weights that are exactly zero, or of the units without a weight"""


@dataclass(frozen=True)
class Run:
    problem: Problem
    optimizer_name: str
    seed: int
    share: float
    """of zeros"""
    units: bool = False
    """whole rows instead of weights"""

    @property
    def steps(self) -> int:
        return self.problem.epochs * self.problem.steps_per_epoch

    def model(self) -> nn.Module:
        return self.problem.model(self.seed)

    def optimizer(self, model: nn.Module, **options: Any) -> fusedreg.FusedRegOptimizer:
        """What may become zero is its first group."""
        cls, lr = OPTIMIZERS[self.optimizer_name], self.problem.lr[self.optimizer_name]
        own = {"momentum": 0.9} if self.optimizer_name == "SGD" else {}
        groups = fusedreg.param_groups(model, exempt=[self.problem.output] if self.units else [], **options)
        return cls(groups, lr=lr, **own)

    def train(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        after_step: AfterStep | None = None,
        epochs: int | None = None,
        first_epoch: int = 0,
        penalty: Callable[[], Tensor] | None = None,
    ) -> nn.Module:
        """All epochs of the problem, or ``epochs`` of them, in which the learning rate falls to 0. ``penalty`` is added
        to the loss."""
        x, y = self.problem.data[:2]
        epochs = self.problem.epochs if epochs is None else epochs
        order = torch.Generator().manual_seed(self.seed + 1000 * first_epoch)
        falling = CosineAnnealingLR(optimizer, epochs * self.problem.steps_per_epoch)
        step = 0
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=order).split(self.problem.batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(model(x[batch]), y[batch])
                (loss if penalty is None else loss + penalty()).backward()
                optimizer.step()
                falling.step()
                step += 1
                if after_step is not None:
                    after_step(step)
        return model

    def is_renewal(self, step: int, end: float = END) -> bool:
        return (BEGIN * self.steps <= step < end * self.steps and step % EVERY == 0) or step == int(end * self.steps)

    def share_at(self, step: int, end: float = END) -> float:
        """The share of zeros that the schedule of gradual pruning asks for."""
        done = 1.0 if step == int(end * self.steps) else (step / self.steps - BEGIN) / (end - BEGIN)
        return self.share * (1 - (1 - done) ** 3)


# -- the ways


def dense(run: Run) -> nn.Module:
    model = run.model()
    return run.train(model, run.optimizer(model))


def target_sparsity(run: Run) -> nn.Module:
    """The library's own: by ``sqrt(d) * abs(w)``, d the optimizer's metric; SGD has none."""
    model = run.model()
    optimizer = run.optimizer(model, sparsity=run.share, sparsity_unit="rows" if run.units else None)
    schedule = fusedreg.SparsitySchedule(optimizer, run.steps, begin=BEGIN, end=END, every=EVERY)
    return run.train(model, optimizer, lambda step: schedule.step())


Scores = Callable[[Run, nn.Module, Optimizer], list[Tensor]]
"""A score for each weight, or for each unit, of the first group: the smallest go."""


def gradual(scores: Scores, layerwise: bool = False) -> Callable[[Run], nn.Module]:
    """By scores of one's own, over all layers together or in each layer alone."""

    def way(run: Run) -> nn.Module:
        model = run.model()
        optimizer = run.optimizer(model)

        def after_step(step: int) -> None:
            if run.is_renewal(step):
                zero_smallest(weights_of(optimizer), scores(run, model, optimizer), run.share_at(step), layerwise)
                optimizer.param_groups[0]["freeze_zeros"] = True

        return run.train(model, optimizer, after_step)

    return way


def pruned_and_finetuned(run: Run) -> nn.Module:
    """Dense for half of the epochs, pruned by magnitude at once, finetuned with the learning rate from the start."""
    model = run.model()
    optimizer = run.optimizer(model)
    half = run.problem.epochs // 2
    run.train(model, optimizer, epochs=half)
    scores = row_norms if run.units else magnitude
    zero_smallest(weights_of(optimizer), scores(run, model, optimizer), run.share)
    return run.train(model, run.optimizer(model, freeze_zeros=True), epochs=run.problem.epochs - half, first_epoch=half)


REFIT = 0.5
"""The part of the training after which a penalty goes, and what it has left is refitted."""


def penalised(option: str, flat_at: float | None = None) -> Callable[[Run], nn.Module]:
    """A penalty, its strength steered along the schedule; then refitted without it, with frozen zeros.

    Where it ends with too few zeros, the smallest weights are added to them.

    Args:
        option: the strength's name.
        flat_at: for the minimax concave penalty, the weight from which on it does not pull, in root mean squares of the
            initial weights.
    """

    def way(run: Run) -> nn.Module:
        model = run.model()
        unit = {"unit": "rows"} if option == "group_l1" else {}
        optimizer = run.optimizer(model, **{option: 1e-5}, **unit)
        group = optimizer.param_groups[0]
        flat = None if flat_at is None else flat_at * root_mean_square(weights_of(optimizer))

        def after_step(step: int) -> None:
            if not run.is_renewal(step, REFIT):
                return
            share, wanted = zero_share(weights_of(optimizer), run.units), run.share_at(step, REFIT)
            if step < int(REFIT * run.steps):
                # Units that shrink together go together: their penalty falls at once where there are enough.
                factor = 0.5 if run.units and share >= wanted else math.exp(4.0 * (wanted - share))
                group[option] = min(max(group[option] * factor, 1e-7), 1.0)
                if flat is not None:
                    group["mcp_gamma"] = flat / group[option]
                return
            group[option], group["freeze_zeros"] = 0.0, True
            if flat is not None:
                group["mcp_gamma"] = math.inf
            scores = row_norms if run.units else magnitude
            zero_smallest(weights_of(optimizer), scores(run, model, optimizer), run.share)

        return run.train(model, optimizer, after_step)

    return way


# -- what is small


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


@torch.no_grad()
def zero_smallest(weights: list[Tensor], scores: list[Tensor], share: float, layerwise: bool = False) -> None:
    """Makes the share with the smallest scores zero. A score may be a row's; each layer keeps its best."""
    scores = [score.double().clone() for score in scores]
    for score in scores:
        score.view(-1)[score.argmax()] = math.inf
    pools = [[i] for i in range(len(scores))] if layerwise else [range(len(scores))]
    for pool in pools:
        in_pool = torch.cat([scores[i].flatten() for i in pool])
        count = round(share * len(in_pool))
        if count == 0:
            continue
        goes = torch.zeros(len(in_pool), dtype=torch.bool)
        goes[in_pool.sort(stable=True).indices[:count]] = True
        goes &= in_pool.isfinite()
        for i, mask in zip(pool, goes.split([scores[i].numel() for i in pool]), strict=True):
            weights[i][mask.view_as(scores[i])] = 0.0


@torch.no_grad()
def zero_share(weights: list[Tensor], units: bool) -> float:
    zeros = [(w.flatten(1) == 0).all(dim=1) if units else (w == 0).flatten() for w in weights]
    return torch.cat(zeros).double().mean().item()


@torch.no_grad()
def root_mean_square(weights: list[Tensor]) -> float:
    return torch.cat([w.flatten() for w in weights]).square().mean().sqrt().item()


@torch.no_grad()
def magnitude(run: Run, model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    return [w.abs() for w in weights_of(optimizer)]


@torch.no_grad()
def damage(run: Run, model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The root of optimal brain damage's saliency, h * w^2, with Adam's second moment in the place of h."""
    scores = []
    for w in weights_of(optimizer):
        state, (_, beta2) = optimizer.state[w], optimizer.param_groups[0]["betas"]
        scores.append(w.abs() * (state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))).sqrt())
    return scores


@torch.no_grad()
def lamp(run: Run, model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The layer-adaptive magnitude: w^2 over the sum of squares of all weights of the layer that are not smaller."""
    scores = []
    for w in weights_of(optimizer):
        squares, order = w.double().square().flatten().sort()
        not_smaller = squares.flip(0).cumsum(0).flip(0)
        score = torch.empty_like(squares)
        score[order] = squares / not_smaller.clamp(min=1e-300)
        scores.append(score.view_as(w))
    return scores


@torch.no_grad()
def row_norms(run: Run, model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    return [w.flatten(1).norm(dim=1) for w in weights_of(optimizer)]


def torch_pruning(importance: str) -> Scores:
    """An importance of Torch-Pruning, with its defaults: also over what reads the unit, normalised in each layer."""

    def scores(run: Run, model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
        import torch_pruning as tp

        measure = getattr(tp.importance, importance)()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=run.problem.data.train_x[:1])
        layers = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
        by_weight = {id(layer.weight): layer for layer in layers}
        found = []
        for w in weights_of(optimizer):
            layer = by_weight[id(w)]
            prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
            with torch.no_grad():
                found.append(measure(graph.get_pruning_group(layer, prune, idxs=list(range(len(w))))))
            # What is empty has nothing left to send, whatever its readers and its bias still are.
            found[-1] = torch.where((w.detach().flatten(1) == 0).all(dim=1), -1.0, found[-1])
        return found

    return scores


# -- the list


class Way(NamedTuple):
    title: str
    make: Callable[[Run], nn.Module]
    adaptive_only: bool = False
    """Whether it needs a rule that has a metric, because it reads one, or would be another way's twin without."""


DENSE = Way("dense", dense)
WAYS = {
    "metric": Way("`sparsity=`: sqrt(d) * abs(w)", target_sparsity),
    "magnitude": Way("gradual, abs(w), global", gradual(magnitude), adaptive_only=True),
    "damage": Way("gradual, d * abs(w)", gradual(damage), adaptive_only=True),
    "uniform": Way("gradual, abs(w), layerwise uniform", gradual(magnitude, layerwise=True)),
    "lamp": Way("gradual, LAMP", gradual(lamp)),
    "l1": Way("`l1`, then refitted", penalised("l1")),
    "mcp": Way("`l1` with `mcp_gamma`, then refitted", penalised("l1", flat_at=6.0)),
    "finetuned": Way("pruned by abs(w), finetuned", pruned_and_finetuned),
}
UNIT_WAYS = {
    "metric": Way('`sparsity=`, `sparsity_unit="rows"`', target_sparsity),
    "magnitude": Way("gradual, norm of the row, global", gradual(row_norms), adaptive_only=True),
    "uniform": Way("gradual, norm of the row, layerwise uniform", gradual(row_norms, layerwise=True)),
    "tp": Way("gradual, Torch-Pruning's group magnitude", gradual(torch_pruning("GroupMagnitudeImportance"))),
    "taylor": Way("gradual, Torch-Pruning's group Taylor", gradual(torch_pruning("GroupTaylorImportance"))),
    "finetuned": Way("pruned by the norm of the row, finetuned", pruned_and_finetuned),
}
if HAS_GROUP_L1:
    UNIT_WAYS["group_l1"] = Way("`group_l1`, then refitted", penalised("group_l1"))


@torch.no_grad()
def measure(run: Run, model: nn.Module) -> Result:
    _, _, x, y = run.problem.data
    model.eval()
    hits = (model(x).argmax(dim=1) == y).double().mean().item()
    return Result(hits, zero_share(weights_of(run.optimizer(model)), run.units))


def run_way(way: Way, run: Run) -> Result:
    with warnings.catch_warnings():
        # A layer that keeps its best weight or unit alone is what some ways come to, and the table shows it.
        warnings.filterwarnings("ignore", message=".*would become all zeros", category=UserWarning)
        return measure(run, way.make(run))
