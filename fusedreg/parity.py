"""Compares one step of a backend with the reference in float64, in units of the dtype's own rounding error."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from .optimizer import FusedRegOptimizer
from .penalties import OPTIONS, PENALTIES
from .rules.registry import OPTIMIZERS

# The largest allowed error of one step, in units of finfo(dtype).eps times the largest element of its kind (weights,
# exp_avg, ...) before or after the step: roundings are relative to the operands, which may cancel in a single element.
# Some 20 roundings in the arithmetic dtype stay well under 8 units. bf16 and fp16 compute in float32: the one rounding
# when a result is stored costs half an eps, and a result near a tie may go to the other side.
TOLERANCE_IN_EPS: dict[torch.dtype, float] = {
    torch.float64: 8.0,
    torch.float32: 8.0,
    torch.bfloat16: 0.51,
    torch.float16: 0.51,
}

# Everything on at once, and no zeros anywhere: a term that is missing or in the wrong place cannot hide.
REGULARIZED: dict[str, Any] = dict(lr=0.02, weight_decay=0.1, l1=0.05, l2=0.07, clip_value=1.2, max_grad_norm=4.0)
# And what has kernels of its own. Each acts on a share of the weights, and leaves most to the others.
STAGES: dict[str, Any] = dict(mcp_gamma=9.0, lower=-1.6, upper=1.3, l0=1e-3, freeze_zeros=True)

SHAPES = ((37, 53), (129,), (3, 5, 7), (), (1,), (0, 4))


@dataclass(frozen=True)
class Case:
    optimizer: type[FusedRegOptimizer]
    variant: str
    penalty_mode: str
    dtype: torch.dtype
    backend: str
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.optimizer.__name__}-{self.variant}-{self.penalty_mode}-{dtype}-{self.backend}-{self.device}"

    @property
    def options(self) -> dict[str, Any]:
        return {**regularized(self.optimizer, self.variant), "penalty_mode": self.penalty_mode}

    @property
    def stages(self) -> dict[str, Any]:
        return stages_in(self.penalty_mode)


def known(cls: type[FusedRegOptimizer], **options: Any) -> dict[str, Any]:
    """Those of the options that a rule knows: Rprop has no ``weight_decay``."""
    names = {*inspect.signature(cls).parameters, *(option.name for option in OPTIONS)}
    return {name: value for name, value in options.items() if name in names}


def regularized(cls: type[FusedRegOptimizer], variant: str | None = None) -> dict[str, Any]:
    """Those of ``REGULARIZED`` that a rule knows, and the options of one of its variants."""
    return {**known(cls, **REGULARIZED), **({} if variant is None else cls.spec.variants[variant])}


def stages_in(penalty_mode: str) -> dict[str, Any]:
    """Those of ``STAGES`` that the mode allows."""
    may = {each.name for each in PENALTIES if penalty_mode != "subgradient" or each.is_constraint or each.gradient}
    return {name: value for name, value in STAGES.items() if name in may}


def cases(backend: str, device: str = "cpu") -> Iterator[Case]:
    for optimizer in OPTIMIZERS:
        spec = optimizer.spec
        for variant, mode, dtype in itertools.product(spec.variants, spec.modes, TOLERANCE_IN_EPS):
            yield Case(optimizer, variant, mode, dtype, backend, device)


def error_in_eps(
    case: Case, shapes: tuple[tuple[int, ...], ...] = SHAPES, steps_before: int = 6, seed: int = 0
) -> float:
    """The largest error of a step, over weights and state, after some steps that have filled the state: with
    ``REGULARIZED`` on, and with ``STAGES`` on beside it.

    The first five of RAdam's have no metric.
    """
    return max(
        _error_in_eps(case, options, shapes, steps_before, seed)
        for options in (case.options, {**case.options, **case.stages})
    )


def _error_in_eps(
    case: Case, options: dict[str, Any], shapes: tuple[tuple[int, ...], ...], steps_before: int, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.device, case.dtype)

    params = [random(shape).requires_grad_() for shape in shapes]
    # Any state will do; on a CPU the reference would take most of the time.
    its_backend = "auto" if case.device == "cpu" else "reference"
    warm_up = case.optimizer(params, backend=its_backend, **options)  # type: ignore[call-arg]
    for _ in range(steps_before):
        for param in params:
            param.grad = random(tuple(param.shape))
        warm_up.step()

    grads = [random(shape) for shape in shapes]
    before = _tensors(warm_up, params)
    results = []
    for dtype, backend in ((case.dtype, case.backend), (torch.float64, "reference")):
        own = [param.detach().to(dtype, copy=True).requires_grad_() for param in params]
        optimizer = case.optimizer(own, backend=backend, **options)  # type: ignore[call-arg]
        optimizer.load_state_dict(copy.deepcopy(warm_up.state_dict()))  # it keeps tensors that fit as they are
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
        results.append(_tensors(optimizer, own))

    worst = 0.0
    for kind, truth in results[1].items():
        ours = results[0][kind]
        if not torch.isfinite(ours).all():
            return float("inf")
        finfo = torch.finfo(case.dtype)
        # Below its smallest normal number a dtype rounds to multiples of its smallest one: float16, of 6e-8.
        largest = max(truth.abs().max().item(), before[kind].abs().max().item(), finfo.smallest_normal)
        unit = finfo.eps * largest
        worst = max(worst, (ours - truth).abs().max().item() / unit)
    return worst


def _tensors(optimizer: FusedRegOptimizer, params: list[Tensor]) -> dict[str, Tensor]:
    """All weights in one float64 vector, and all state tensors of a name in one."""
    kinds = {"weights": [param.detach() for param in params]}
    for name in optimizer.spec.needed_states(optimizer.param_groups[0]):
        kinds[name] = [optimizer.state[param][name] for param in params]
    return {kind: torch.cat([tensor.flatten().double() for tensor in tensors]) for kind, tensors in kinds.items()}


def usable_backends() -> list[tuple[str, str]]:
    """The (backend, device) pairs that can run on this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    usable = []
    for (name, backend), device in itertools.product(backends.BACKENDS.items(), devices):
        probe = torch.zeros(1, device=device)
        if backend.unavailable_reason() is None and backend.rejection(OPTIMIZERS[0].spec, probe, []) is None:
            usable.append((name, device))
    return usable
