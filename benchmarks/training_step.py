"""What share of a whole training step the optimizer takes, before and after: forward, backward, step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import no_garbage_collection
from peers import DECAY, L1, L2, LR, shrink_out
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from fusedreg import FusedRegAdamW

MAX_NORM = 1.0


class Transformer(nn.Module):
    """A small decoder: 4 blocks of width 256 over a vocabulary of 8000, 7.4M parameters."""

    def __init__(self, vocabulary: int = 8000, width: int = 256, blocks: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.mask = nn.Transformer.generate_square_subsequent_mask(context)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(tokens) + self.places, mask=self.mask, is_causal=True)
        return self.head(hidden).flatten(0, 1)


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, torch.randn(64, 64), torch.randint(10, (64,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(8000, (4, 65))
    return Transformer(), tokens[:, :-1], tokens[:, 1:].flatten()


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "MLP 64-256-10, batch 64": mlp,
    "transformer, 7.3M, 256 tokens": transformer,
}


def torch_adamw(params: list[Tensor], **options: Any) -> Callable[[], None]:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, **options).step


def ours(params: list[Tensor], max_norm: float | None) -> Callable[[], None]:
    options = {"max_grad_norm": max_norm, "backend": "cpp"}
    return FusedRegAdamW(params, lr=LR, weight_decay=DECAY, l1=L1, l2=L2, **options).step


def clipped(params: list[Tensor], step: Callable[[], None], shrink: bool) -> Callable[[], None]:
    def clip_and_step() -> None:
        clip_grad_norm_(params, MAX_NORM)
        step()
        if shrink:
            shrink_out(params)

    return clip_and_step


# Name -> the step, and whether the penalty is in the loss.
CONTENDERS: dict[str, tuple[Callable[[list[Tensor]], Callable[[], None]], bool]] = {
    "torch AdamW, L1 in the loss, clip": (lambda params: clipped(params, torch_adamw(params), False), True),
    "torch AdamW(fused), L1 in the loss, clip": (
        lambda params: clipped(params, torch_adamw(params, fused=True), False),
        True,
    ),
    "torch AdamW(fused), clip, shrink": (lambda params: clipped(params, torch_adamw(params, fused=True), True), False),
    "fusedreg: decay, l1, l2, clip": (lambda params: ours(params, MAX_NORM), False),
    "torch AdamW(fused), nothing else": (lambda params: torch_adamw(params, fused=True), False),
}


def train(model: nn.Module, x: Tensor, y: Tensor, step: Callable[[], None], penalty: bool) -> tuple[float, float]:
    """Seconds of forward and backward, and of the step."""
    begin = time.perf_counter()
    for param in model.parameters():
        param.grad = None
    loss = cross_entropy(model(x), y)
    if penalty:
        loss = loss + L1 * sum(param.abs().sum() for param in model.parameters())
    loss.backward()
    between = time.perf_counter()
    step()
    return between - begin, time.perf_counter() - between


def measure(name: str, budget: float) -> dict[str, tuple[float, float]]:
    """Contender -> median milliseconds of forward and backward, and of the step."""
    runs: dict[str, Callable[[], tuple[float, float]]] = {}
    for contender, (make_step, penalty) in CONTENDERS.items():
        torch.manual_seed(0)
        model, x, y = MODELS[name]()
        step = make_step(list(model.parameters()))
        runs[contender] = lambda model=model, x=x, y=y, step=step, penalty=penalty: train(model, x, y, step, penalty)
    taken: dict[str, list[tuple[float, float]]] = {contender: [] for contender in runs}
    with no_garbage_collection():
        for run in runs.values():
            run()
        begin = time.perf_counter()
        while time.perf_counter() - begin < budget or len(taken[contender]) < 5:
            for contender, run in runs.items():
                taken[contender].append(run())
    return {
        contender: (statistics.median(a for a, _ in times) * 1e3, statistics.median(b for _, b in times) * 1e3)
        for contender, times in taken.items()
    }
