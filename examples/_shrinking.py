"""Ways to a smaller digits classifier, for demo.py: a dense net, whole units cut out, single zeros."""

from __future__ import annotations

import copy
import io
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _common import CONSOLE, Split, correct, endless_batches, mlp, percent, print_table, seconds, track
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedreg

WIDTHS = (64, 256, 256, 10)
LR = 3e-3
BATCH_SIZE = 128
TIMED_BATCH = 4096  # so many rows that the time is arithmetic's
UNITS = (0.7, 0.85, 0.92)  # the first is the table's, the others are the plot's
SINGLE = (0.95, 0.98)

DENSE, ROWS, SINGLES, MAGNITUDE = "dense", "units cut", "zeros, ours", "zeros, |w|"


@dataclass
class Small:
    """A trained net as it would be stored and run."""

    way: str
    share: float
    net: nn.Module
    trained: nn.Module
    """Before anything was cut out."""
    accuracy: float


class MagnitudePruning:
    """Gradual magnitude pruning (Zhu and Gupta), in plain torch: masks over all weights, ranked together by size."""

    def __init__(self, net: nn.Module, share: float, steps: int, begin: float = 0.1, end: float = 0.75) -> None:
        self.weights = [param for param in net.parameters() if param.ndim >= 2]
        self.masks = [torch.ones_like(weight) for weight in self.weights]
        self.share, self.begin, self.end, self.done = share, int(begin * steps), int(end * steps), 0

    @torch.no_grad()
    def step(self) -> None:
        self.done += 1
        if self.begin <= self.done <= self.end and (self.done % 10 == 0 or self.done == self.end):
            t = (self.done - self.begin) / (self.end - self.begin)
            sizes = torch.cat([weight.abs().flatten() for weight in self.weights])
            count = round(self.share * (1 - (1 - t) ** 3) * len(sizes))
            if count:
                limit = sizes.kthvalue(count).values
                self.masks = [(weight.abs() > limit).to(weight.dtype) for weight in self.weights]
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.mul_(mask)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: Split, steps: int, seed: int, schedule: Any) -> None:
    lr = CosineAnnealingLR(optimizer, T_max=steps)
    for _, batch in zip(range(steps), endless_batches(len(data.train_x), BATCH_SIZE, seed), strict=False):
        optimizer.zero_grad()
        cross_entropy(net(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        lr.step()
        if schedule is not None:
            schedule.step()


def shrink(way: str, share: float, initial: nn.Module, data: Split, steps: int, seed: int) -> Small:
    """Trains a copy of the same net, and makes of it what would be stored."""
    net = copy.deepcopy(initial)
    last = f"{2 * len(WIDTHS) - 4}.*"
    schedule: Any = None
    if way == MAGNITUDE:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), LR)
        schedule = MagnitudePruning(net, share, steps)
    elif way == DENSE:
        optimizer = fusedreg.FusedRegAdam(net.parameters(), LR)
    else:
        options = {"sparsity_unit": "rows", "exempt": [last]} if way == ROWS else {}
        optimizer = ours = fusedreg.FusedRegAdam(fusedreg.param_groups(net, sparsity=share, **options), LR)
        schedule = fusedreg.SparsitySchedule(ours, steps, every=20 if way == ROWS else 10)
    train(net, optimizer, data, steps, seed, schedule)
    small = fusedreg.compact(net, data.test_x[:8]) if way == ROWS else net
    if way in (SINGLES, MAGNITUDE):
        small = fusedreg.to_sparse(net, zeros=0.0)
    return Small(way, share, small, net, correct(small, data.test_x, data.test_y))


def stored(net: nn.Module) -> int:
    """Bytes of the file that torch.save makes of the state dict."""
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.tell()


def numbers(net: nn.Module) -> int:
    """How many weights and biases there are, without the zeros that CSR does not store."""
    held = dict(net.named_parameters()) | dict(net.named_buffers())
    return sum(tensor.numel() for name, tensor in held.items() if not name.endswith("_indices"))


@torch.inference_mode()
def inference_seconds(nets: list[nn.Module], rounds: int = 30) -> list[float]:
    """Times of one large batch, the nets in turns: the shortest, since what others take of the machine only adds."""
    x = torch.rand(TIMED_BATCH, WIDTHS[0])
    samples: list[list[float]] = [[] for _ in nets]
    for i in range(rounds + 2):
        for net, times in zip(nets, samples, strict=True):
            took = seconds(partial(net, x))
            if i >= 2:
                times.append(took)
    return [min(times) for times in samples]


def run_all(data: Split, steps: int, seeds: range) -> list[list[Small]]:
    """For each way and share, a net for each seed. All of one seed start from the same weights."""
    cases = [(DENSE, 0.0), *((ROWS, share) for share in UNITS)]
    cases += [(way, share) for share in SINGLE for way in (SINGLES, MAGNITUDE)]
    results: list[list[Small]] = [[] for _ in cases]
    jobs = [(seed, i) for seed in seeds for i in range(len(cases))]
    initial = mlp(*WIDTHS)
    for seed, i in track(jobs, "train: ways to shrink"):
        if i == 0:
            torch.manual_seed(seed)
            initial = mlp(*WIDTHS)
        results[i].append(shrink(*cases[i], initial, data, steps, seed))
    return results


def print_shrinking(results: list[list[Small]]) -> None:
    mean = statistics.mean
    table = [runs for runs in results if runs[0].share in (0.0, UNITS[0], SINGLE[0])]
    times = inference_seconds([runs[0].net for runs in table])
    rows: list[tuple[str, ...]] = []
    for runs, took in zip(table, times, strict=True):
        zeros = mean(fusedreg.sparsity_report(run.trained).fraction for run in runs)
        rows.append(
            (
                runs[0].way + (f", {percent(runs[0].share, 0)}" if runs[0].share else ""),
                percent(mean(run.accuracy for run in runs)),
                f"{mean(numbers(run.net) for run in runs):,.0f}",
                f"{mean(stored(run.net) for run in runs) / 1e3:,.0f} kB",
                f"{1e3 * took:.2f} ms",
                f"{times[0] / took:.1f} x",
                percent(zeros),
            )
        )
    columns = ["", "correct", "numbers", "on disk", f"{TIMED_BATCH}", "faster", "zeros"]
    print_table(f"Digits, MLP {'-'.join(map(str, WIDTHS))}, mean of {len(table[0])} seeds", columns, rows)
    worst = max(run.net.report.max_difference for runs in results for run in runs if run.way == ROWS)
    CONSOLE.print(
        f"Correct of the test images; time of {TIMED_BATCH} images on one thread; zeros before anything is cut out, by "
        "fusedreg's scores (ours) or by magnitude (|w|). "
        f"Cut out by fusedreg.compact, the outputs differ by at most {worst:.0e} from the trained net's. Single zeros "
        "are stored and multiplied in CSR, by fusedreg.to_sparse.",
        style="dim",
    )
