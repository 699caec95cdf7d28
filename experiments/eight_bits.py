"""What is lost where Adam keeps its states in 8 bits: a small network on the digits, a small transformer on text.

    python -m experiments.eight_bits [--seeds 3]

Its figures are in docs/amp.md. The text is scikit-learn's descriptions of its data sets, by characters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusedreg import FusedRegAdamW

STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stochastic": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    "int8, to the nearest": {"state_dtype": "int8"},
    "int8, stochastic": {"state_dtype": "int8", "stochastic_rounding": True},
}


def digits(seed: int, **options: Any) -> float:
    """Of 600 digits, the percentage that a network is right about which was trained on the other 1197."""
    numbers, labels = datasets.load_digits(return_X_y=True)
    X, y = torch.from_numpy(numbers / 16).float(), torch.from_numpy(labels)
    torch.manual_seed(seed)
    order = torch.randperm(len(y))
    train, test = order[600:], order[:600]
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = FusedRegAdamW(model.parameters(), lr=1e-3, **options)
    for _ in range(30):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
    return float((model(X[test]).argmax(1) == y[test]).float().mean()) * 100


class Transformer(nn.Module):
    def __init__(self, characters: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.places.weight
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


def text(seed: int, steps: int = 600, length: int = 64, **options: Any) -> float:
    """The loss of a transformer, in nats a character, on text that it has not seen."""
    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    words = "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    alphabet = sorted(set(words))
    numbers = torch.tensor([alphabet.index(each) for each in words])
    windows = numbers.unfold(0, length + 1, 1)
    order = torch.randperm(len(numbers) // 256, generator=torch.Generator().manual_seed(0)) * 256
    held_back = torch.zeros(len(numbers), dtype=torch.bool)
    for begin in order[: len(order) // 8]:
        held_back[begin : begin + 256] = True
    is_test = held_back.unfold(0, length + 1, 1)
    train, test = windows[~is_test.any(1)], windows[is_test.all(1)][::8]
    torch.manual_seed(seed)
    model = Transformer(len(alphabet), length)
    optimizer = FusedRegAdamW(model.parameters(), lr=2e-3, weight_decay=0.1, max_grad_norm=1.0, **options)

    def loss(batch: Tensor) -> Tensor:
        return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    for _ in range(steps):
        optimizer.zero_grad()
        loss(train[torch.randint(len(train), (16,))]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    problems: tuple[Callable[..., float], ...] = (digits, text)
    for problem in problems:
        for stored, options in STORED.items():
            found = [problem(seed, **options) for seed in seeds]
            each = ", ".join(f"{value:.3f}" for value in found)
            print(f"{problem.__name__}: {stored}: {np.mean(found):.3f} ({each})", flush=True)


if __name__ == "__main__":
    main()
