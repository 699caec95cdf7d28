"""Compares one step of a backend with the reference in float64, in units of the dtype's own rounding error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from .adam import FusedRegAdam
from .adamw import FusedRegAdamW
from .groups import L1_MODES
from .optimizer import FusedRegOptimizer
from .sgd import FusedRegSGD

OPTIMIZERS: tuple[type[FusedRegOptimizer], ...] = (FusedRegAdam, FusedRegAdamW, FusedRegSGD)

# The largest allowed error of one step, in units of finfo(dtype).eps times the tensor's largest element before or after
# the step: roundings are relative to the operands. Some 20 roundings in the arithmetic dtype stay well under 16 units. bf16 and fp16 compute in float32: the one rounding
# when a result is stored costs half an eps, and a result near a tie may go to the other side.
TOLERANCE_IN_EPS: dict[torch.dtype, float] = {
    torch.float64: 16.0,
    torch.float32: 16.0,
    torch.bfloat16: 0.51,
    torch.float16: 0.51,
}

# Everything on at once, and no zeros anywhere: a term that is missing or in the wrong place cannot hide.
REGULARIZED: dict[str, Any] = dict(lr=0.02, weight_decay=0.1, l1=0.05, l2=0.07, clip_value=1.2, max_grad_norm=4.0)

FLAGS: dict[type[FusedRegOptimizer], dict[str, dict[str, Any]]] = {
    FusedRegAdam: {"plain": {}, "amsgrad": {"amsgrad": True}, "maximize": {"maximize": True}},
    FusedRegAdamW: {"plain": {}, "amsgrad": {"amsgrad": True}, "maximize": {"maximize": True}},
    FusedRegSGD: {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.8, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "maximize": {"momentum": 0.9, "maximize": True},
    },
}

SHAPES = ((37, 53), (129,), (3, 5, 7), (), (1,), (0, 4))


@dataclass(frozen=True)
class Case:
    optimizer: type[FusedRegOptimizer]
    flags: str
    l1_mode: str
    dtype: torch.dtype
    backend: str
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.optimizer.__name__}-{self.flags}-{self.l1_mode}-{dtype}-{self.backend}-{self.device}"

    @property
    def options(self) -> dict[str, Any]:
        return {**REGULARIZED, **FLAGS[self.optimizer][self.flags], "l1_mode": self.l1_mode}


def cases(backend: str, device: str = "cpu") -> Iterator[Case]:
    for optimizer in OPTIMIZERS:
        for flags, mode, dtype in itertools.product(FLAGS[optimizer], L1_MODES, TOLERANCE_IN_EPS):
            yield Case(optimizer, flags, mode, dtype, backend, device)


def error_in_eps(case: Case, shapes: tuple[tuple[int, ...], ...] = SHAPES, steps_before: int = 3, seed: int = 0) -> float:
    """The largest error of a step, over weights and state, after some steps that have filled the state."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.device, case.dtype)

    params = [random(shape).requires_grad_() for shape in shapes]
    warm_up = case.optimizer(params, backend="reference", **case.options)  # type: ignore[call-arg]
    for _ in range(steps_before):
        for param in params:
            param.grad = random(tuple(param.shape))
        warm_up.step()

    grads = [random(shape) for shape in shapes]
    names = case.optimizer.state_names
    before = [t for p in params for t in (p.detach(), *(warm_up.state[p].get(name) for name in names))]
    results = []
    for dtype, backend in ((case.dtype, case.backend), (torch.float64, "reference")):
        own = [param.detach().to(dtype, copy=True).requires_grad_() for param in params]
        optimizer = case.optimizer(own, backend=backend, **case.options)  # type: ignore[call-arg]
        optimizer.load_state_dict(copy.deepcopy(warm_up.state_dict()))  # it keeps tensors that fit as they are
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
        results.append([t for p in own for t in (p.detach(), *(optimizer.state[p].get(name) for name in names))])

    worst = 0.0
    for old, ours, truth in zip(before, *results, strict=True):
        if truth is not None and truth.numel() > 0:
            if not torch.isfinite(ours).all():
                return float("inf")
            largest = max(truth.abs().max().item(), old.abs().max().item(), torch.finfo(case.dtype).tiny)
            unit = torch.finfo(case.dtype).eps * largest
            worst = max(worst, (ours.double() - truth).abs().max().item() / unit)
    return worst


def usable_backends() -> list[tuple[str, str]]:
    """The (backend, device) pairs that can run on this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    usable = []
    for (name, backend), device in itertools.product(backends.BACKENDS.items(), devices):
        probe = torch.zeros(1, device=device)
        if backend.unavailable_reason() is None and backend.rejection(probe, []) is None:
            usable.append((name, device))
    return usable
