"""Small builders for the suites. What they make is on torch's default device, with the same values on each."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from plain_rules import PLAIN
from torch import Tensor

from fusedreg import (
    FusedRegAdagrad,
    FusedRegAdam,
    FusedRegAdamW,
    FusedRegASGD,
    FusedRegFTRL,
    FusedRegRMSprop,
    FusedRegSGD,
)
from fusedreg.parity import REGULARIZED, known, regularized
from fusedreg.rules.registry import OPTIMIZERS

# What torch.optim does not have is compared with its paper's loop.
TWINS = {cls: cls.spec.twin or PLAIN[cls.spec.name] for cls in OPTIMIZERS}
SHAPES = ((7, 13), (33,), (), (2, 3, 5), (0, 4))
# Every rule with every variant that its spec names.
OPTIMIZER_VARIANTS = [(cls, name) for cls in OPTIMIZERS for name in cls.spec.variants]
IDS = [f"{cls.__name__}-{name}" for cls, name in OPTIMIZER_VARIANTS]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """For what is tiny, or where torch's own operations are parallel: its threads spin, and crawl on a busy machine."""
    return threads(1)


def variant_of(cls: type, name: str) -> dict[str, Any]:
    return dict(cls.spec.variants[name])


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def make_params(shapes=SHAPES, dtype=torch.float32, seed: int = 1) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(random(shape, generator).to(torch.get_default_device(), dtype)) for shape in shapes]


def set_grads(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = random(param.shape, generator).to(param.device, param.dtype)


def values_of_the_whole_range(dtype: torch.dtype, numel: int) -> list[Tensor]:
    """Gradients whose squares float32 has room for, and has not: of one scale, of all at once, with zeros, all zeros,
    with an infinity, with a NaN."""
    finfo = torch.finfo(dtype)
    start = torch.randn(numel, dtype=torch.float64)
    largest = finfo.max / 8
    wide = 10 ** torch.linspace(math.log10(finfo.tiny), math.log10(largest), numel, dtype=torch.float64)
    scales = [finfo.smallest_normal, 1e-30, 1e-18, 1e-4, 1.0, 1e10, 1e19, 1e30, largest]
    tried = [start * scale for scale in scales if finfo.smallest_normal <= scale <= largest]
    tried += [wide, wide.flip(0), start.where(start > 2, -0.0), start.where(start > 3, 0.0) * scales[0], 0 * start]
    tried += [start.where(start < 3, math.inf), start.where(start < 3, math.nan)]
    return [values.to(dtype) for values in tried]


def assert_a_norm_has_the_whole_range(backend: str, dtype: torch.dtype, numel: int, offset: int) -> None:
    """Squares of gradients in float32 overflow, or are nothing; and some are large, others small, or all zeros. Each
    result is as good as one in float64, rounded to float32."""
    for values in values_of_the_whole_range(dtype, numel + offset):
        param = torch.nn.Parameter(torch.zeros_like(values)[offset:])
        optimizer = FusedRegSGD([param], lr=1e-3, backend=backend, max_grad_norm=math.inf)
        param.grad = values[offset:]
        optimizer.step()
        truth = param.grad.double().norm().float()
        torch.testing.assert_close(optimizer.grad_norm, truth, rtol=2.5e-7, atol=0, equal_nan=True)


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int, first_seed: int = 100) -> None:
    for i in range(steps):
        set_grads(params, first_seed + i)
        optimizer.step()


def through_a_file(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of every parameter, every state tensor and the groups' own tensors."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            found.append(param.detach().clone())
            found += [v.clone() for v in optimizer.state.get(param, {}).values() if isinstance(v, Tensor)]
        found += [value.clone() for value in group.values() if isinstance(value, Tensor)]
    return found


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.contiguous().view(-1).view(torch.uint8).equal(y.contiguous().view(-1).view(torch.uint8))


__all__ = [
    "IDS",
    "OPTIMIZERS",
    "OPTIMIZER_VARIANTS",
    "REGULARIZED",
    "SHAPES",
    "TWINS",
    "FusedRegASGD",
    "FusedRegAdagrad",
    "FusedRegAdam",
    "FusedRegAdamW",
    "FusedRegFTRL",
    "FusedRegRMSprop",
    "FusedRegSGD",
    "known",
    "regularized",
]
