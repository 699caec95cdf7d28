"""What a minibatch run on digits ends with, way by way: zeros, accuracy and objective, as a Markdown table.

    python experiments/minibatch_sparsity.py [--seeds 3] [--epochs 60] [--batch-size 64] [--l1 1e-4 1e-3]

An MLP 64-256-10, lr 3e-3 falling to 0 as a cosine. The seeds change initial weights and batch order, not the split.
Biases are never penalised and never pruned. It measures no time.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from fusedreg import FusedRegAdam, param_groups

LR = 3e-3
FINETUNE_LR = 1e-3
L1 = (1e-4, 3e-4, 1e-3, 3e-3)
RISE = 0.6  # the share of the steps over which a rising lambda rises
# "decoupled" is scale-free: its lambda is measured against Adam's normalised step, so it has lambdas of its own.
DECOUPLED_L1 = (0.03, 0.1, 0.3)

DENSE = "no penalty"
PROXIMAL = "FusedRegAdam, proximal"
RISING = "FusedRegAdam, proximal, lambda rising"
PENALTY = "penalty in the loss, Adam"
PENALTY_PRUNED = "penalty in the loss, then pruned"
DENSE_PRUNED = "no penalty, then pruned"
DENSE_FINETUNED = "no penalty, pruned, finetuned"
DECOUPLED = "FusedRegAdam, decoupled"


@dataclass(frozen=True)
class Digits:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        train_x, test_x, train_y, test_y = train_test_split(
            pixels / 16.0, labels, test_size=0.25, random_state=0, stratify=labels
        )
        return cls(
            torch.from_numpy(train_x).float(),
            torch.from_numpy(train_y),
            torch.from_numpy(test_x).float(),
            torch.from_numpy(test_y),
        )


def mlp(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def weights_of(model: nn.Module) -> list[Tensor]:
    """What is penalised: the weight matrices, as param_groups chooses them."""
    return [param for param in model.parameters() if param.ndim >= 2]


def absolute_sum(model: nn.Module) -> Tensor:
    return torch.stack([weight.abs().sum() for weight in weights_of(model)]).sum()


@dataclass(frozen=True)
class Setting:
    """Everything about a training run but the way to regularise it."""

    digits: Digits
    epochs: int
    batch_size: int
    seed: int

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        l1_in_loss: float = 0.0,
        rising_l1: float = 0.0,
        keep_zeros: bool = False,
    ) -> nn.Module:
        """Trains in place; with ``keep_zeros``, the weights that are zero at the start stay zero."""
        train_x, train_y = self.digits.train_x, self.digits.train_y
        order = torch.Generator().manual_seed(self.seed)
        steps = epochs * -(-len(train_x) // self.batch_size)
        schedule = CosineAnnealingLR(optimizer, T_max=steps)
        masks = [(weight, weight.detach() != 0) for weight in weights_of(model)] if keep_zeros else []
        step = 0
        for _ in range(epochs):
            for batch in torch.randperm(len(train_x), generator=order).split(self.batch_size):
                if rising_l1:
                    optimizer.param_groups[0]["l1"] = rising_l1 * min(1.0, step / (RISE * steps))
                optimizer.zero_grad()
                loss = cross_entropy(model(train_x[batch]), train_y[batch])
                if l1_in_loss:
                    loss = loss + l1_in_loss * absolute_sum(model)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                with torch.no_grad():
                    for weight, mask in masks:
                        weight.mul_(mask)
        return model

    def fusedreg(self, l1: float, penalty_mode: str = "proximal", rising: bool = False) -> nn.Module:
        model = mlp(self.seed)
        optimizer = FusedRegAdam(param_groups(model, l1=l1), lr=LR, penalty_mode=penalty_mode)
        return self.train(model, optimizer, self.epochs, rising_l1=l1 if rising else 0.0)

    def adam(self, l1_in_loss: float = 0.0) -> nn.Module:
        model = mlp(self.seed)
        return self.train(model, torch.optim.Adam(model.parameters(), lr=LR), self.epochs, l1_in_loss)

    def finetuned(self, sparse: nn.Module) -> nn.Module:
        """A copy after a sixth of the epochs more, with its zeros kept."""
        model = copy.deepcopy(sparse)
        optimizer = torch.optim.Adam(model.parameters(), lr=FINETUNE_LR)
        return self.train(model, optimizer, max(1, self.epochs // 6), keep_zeros=True)


@torch.no_grad()
def pruned(model: nn.Module, zeros: float) -> nn.Module:
    """A copy with its smallest weights set to zero, a share of ``zeros`` of all weight matrices together."""
    model = copy.deepcopy(model)
    sizes = torch.cat([weight.abs().flatten() for weight in weights_of(model)])
    count = round(zeros * sizes.numel())
    if count:
        threshold = sizes.kthvalue(count).values
        for weight in weights_of(model):
            weight.mul_(weight.abs() > threshold)
    return model


@dataclass(frozen=True)
class Result:
    zeros: float
    """share of exact zeros in the weight matrices"""
    accuracy: float
    """on the test set"""
    loss: float
    """on the training set, without the penalty"""
    objective: float
    """the same with the penalty"""


@torch.no_grad()
def measure(model: nn.Module, digits: Digits, l1: float) -> Result:
    weights = torch.cat([weight.flatten() for weight in weights_of(model)])
    loss = cross_entropy(model(digits.train_x), digits.train_y).item()
    hits = model(digits.test_x).argmax(dim=1) == digits.test_y
    return Result(
        zeros=(weights == 0).double().mean().item(),
        accuracy=hits.double().mean().item(),
        loss=loss,
        objective=loss + l1 * absolute_sum(model).item(),
    )


Row = tuple[float, str]  # lambda, way


def run_seed(setting: Setting, strengths: Iterable[float]) -> Iterable[tuple[Row, Result]]:
    """Every way under every lambda; what is pruned is pruned to the zeros that the proximal run of this seed has."""
    digits = setting.digits
    dense = setting.adam()
    yield (0.0, DENSE), measure(dense, digits, 0.0)
    for l1 in strengths:
        result = measure(setting.fusedreg(l1), digits, l1)
        yield (l1, PROXIMAL), result
        yield (l1, RISING), measure(setting.fusedreg(l1, rising=True), digits, l1)
        penalised = setting.adam(l1_in_loss=l1)
        yield (l1, PENALTY), measure(penalised, digits, l1)
        yield (l1, PENALTY_PRUNED), measure(pruned(penalised, result.zeros), digits, l1)
        sparse = pruned(dense, result.zeros)
        yield (l1, DENSE_PRUNED), measure(sparse, digits, l1)
        yield (l1, DENSE_FINETUNED), measure(setting.finetuned(sparse), digits, l1)
        yield (l1, DECOUPLED), measure(setting.fusedreg(l1, "decoupled"), digits, l1)
    for l1 in DECOUPLED_L1:
        # No objective: nothing says what this lambda's penalty would be.
        yield (l1, DECOUPLED), measure(setting.fusedreg(l1, "decoupled"), digits, math.nan)


def markdown(results: dict[Row, list[Result]]) -> str:
    lines = [
        "| lambda | way | exact zeros | test accuracy | worst to best seed | training loss | objective |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (l1, way), runs in results.items():
        zeros, accuracy, loss, objective = map(statistics.median, zip(*map(astuple, runs), strict=True))
        worst, best = min(run.accuracy for run in runs), max(run.accuracy for run in runs)
        penalised = "" if math.isnan(objective) else f"{objective:.4f}"
        lines.append(
            f"| {l1:g} | {way} | {zeros:.1%} | {accuracy:.1%} | {worst:.1%} to {best:.1%} | {loss:.4f} | {penalised} |"
        )
    return "\n".join(lines).replace("%", " %")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="of training; finetuning takes a sixth (default: 60)")
    parser.add_argument("--batch-size", type=int, default=64, help="the training set has 1347 (default: %(default)s)")
    parser.add_argument("--l1", type=float, nargs="+", default=L1, help="lambdas (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    digits = Digits.load()
    results: dict[Row, list[Result]] = {}
    n_rows = 1 + 7 * len(arguments.l1) + len(DECOUPLED_L1)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=arguments.seeds * n_rows)
        for seed in range(arguments.seeds):
            setting = Setting(digits, arguments.epochs, arguments.batch_size, seed)
            for row, result in run_seed(setting, arguments.l1):
                results.setdefault(row, []).append(result)
                progress.advance(task)
    print(
        f"Digits, MLP 64-256-10, {arguments.epochs} epochs in batches of {arguments.batch_size}, "
        f"medians of {arguments.seeds} seeds.\n"
    )
    print(markdown(results))


if __name__ == "__main__":
    main()
