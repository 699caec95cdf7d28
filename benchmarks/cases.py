"""What is stepped: lists of shapes, and weights and gradients made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Shape = tuple[int, ...]

WEIGHT_SCALE = 0.02
GRADIENT_SCALE = 1e-3
# The clip is set to this share of the gradients' norm, so that it really scales them down.
MAX_NORM_SHARE = 0.5


def gpt2_shapes(width: int = 768, blocks: int = 12, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """GPT-2 of 125M parameters, the head tied to the embedding."""
    norm = [(width,)] * 2
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + mlp) * blocks, *norm]


def resnet50_shapes() -> list[Shape]:
    """ResNet-50: 161 tensors, most of them of a batch norm."""

    def conv(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = conv(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(inputs, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def mlp_shapes(*widths: int) -> list[Shape]:
    return [shape for a, b in pairwise(widths) for shape in ((b, a), (b,))]


def embedding_shapes() -> list[Shape]:
    """A recommender: two wide tables, and a small net on top."""
    return [(500_000, 64), (50_000, 64), *mlp_shapes(128, 256, 64, 1)]


CASES: dict[str, list[Shape]] = {
    "50M in 10 tensors": [(1000, 5000)] * 10,
    "GPT-2, 125M": gpt2_shapes(),
    "ResNet-50": resnet50_shapes(),
    "wide embedding, 35M": embedding_shapes(),
    "8M in 40 tensors": [(400, 500)] * 40,
    "1000 of 64x64": [(64, 64)] * 1000,
    "MLP 64-256-10": mlp_shapes(64, 256, 10),
    "20 tiny": [(50, 10), (50,)] * 10,
}


def numel_of(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


@dataclass(frozen=True)
class Problem:
    """Parameters with gradients. All contenders share them, so that 100M of them fit; each keeps its own state.

    A step by hand writes into the gradients: it clips them once, after which the clip changes little and costs the
    same.
    """

    params: list[Tensor]
    max_norm: float

    @classmethod
    def random(cls, shapes: list[Shape], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Shape, scale: float) -> Tensor:
            return torch.empty(shape, device=device).normal_(std=scale, generator=generator).to(dtype)

        params = []
        for shape in shapes:
            param = normal(shape, WEIGHT_SCALE).requires_grad_()
            param.grad = normal(shape, GRADIENT_SCALE)
            params.append(param)
        norm = float(torch.nn.utils.get_total_norm([param.grad for param in params]))
        return cls(params, MAX_NORM_SHARE * norm)

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)
