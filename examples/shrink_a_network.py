"""From training to a small file: a residual net on digits that loses three quarters of its channels.

``SparsitySchedule`` makes whole rows of the weights zero while the net trains, ``fusedreg.compact`` cuts them out with
the optimizer's state, the small net is trained on, and is saved, loaded and compared. The first convolution and what is
added to it share their channels, so that a channel goes when both have none; the last layer's rows are the classes.

Run it with ``python examples/shrink_a_network.py``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _common import CONSOLE, Split, correct, endless_batches, load_split, parse_arguments, percent, print_table, track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedreg

LR = 3e-3
SHARE = 0.75
BATCH_SIZE = 64


class ResidualNet(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.inner = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False),
        )
        self.head = nn.Sequential(
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * channels, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(torch.relu(x + self.inner(x)))


def as_images(data: Split) -> Split:
    return data._replace(train_x=data.train_x.view(-1, 1, 8, 8), test_x=data.test_x.view(-1, 1, 8, 8))


def run(steps: int, seed: int, file: Path) -> tuple[nn.Module, dict[str, float]]:
    """The small net, trained and saved, and its test accuracy on the way."""
    torch.manual_seed(seed)
    data, model = as_images(load_split()), ResidualNet()
    groups = fusedreg.param_groups(model, sparsity=SHARE, sparsity_unit="rows", exempt=["head.4.*"])
    optimizer = fusedreg.FusedRegAdam(groups, lr=LR)
    lr, schedule = CosineAnnealingLR(optimizer, T_max=steps), fusedreg.SparsitySchedule(optimizer, steps, every=10)
    batches = endless_batches(len(data.train_x), BATCH_SIZE, seed)
    accuracy = {}
    for step in track(range(1, steps + 1), "train, cut, train on"):
        batch = next(batches)
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        lr.step()
        schedule.step()
        if step == int(0.8 * steps):  # the schedule has ended; the rest of the training is the small net's
            accuracy["before the cut"] = correct(model.eval(), data.test_x, data.test_y)
            model = fusedreg.compact(model, data.test_x[:8], optimizer=optimizer)
            accuracy["after it"] = correct(model.eval(), data.test_x, data.test_y)
    small = fusedreg.compact(model.eval(), data.test_x[:8])  # what only its file needs no more
    accuracy["at the end"] = correct(small, data.test_x, data.test_y)
    torch.save(small, file)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(data.test_x), small(data.test_x))
    return small, accuracy


def main() -> None:
    arguments = parse_arguments(__doc__, steps=(500, "of training"))
    file = arguments.output / "small-digits.pt"
    small, accuracy = run(arguments.steps, arguments.seed, file)
    before = sum(param.numel() for param in ResidualNet().parameters())
    after = sum(param.numel() for param in small.parameters())
    rows = [(f"test accuracy {when}", percent(share)) for when, share in accuracy.items()]
    rows += [("parameters at first", f"{before:,}"), ("in the end", f"{after:,}")]
    rows.append((str(file), f"{file.stat().st_size / 1e3:,.0f} kB"))
    print_table(f"Digits, a residual net without {percent(SHARE, 0)} of its rows", ["", ""], rows)
    CONSOLE.print(str(small.report), style="dim")


if __name__ == "__main__":
    main()
