"""Who carries out a step. A backend is one module with a ``Backend``; this is the list of them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..rules.spec import RuleSpec
from .base import Backend, DeviceNorm, Entry, Plan, StepScalars
from .cpp import CppBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "DeviceNorm",
    "Entry",
    "Plan",
    "StepScalars",
    "TritonBackend",
    "check_name",
    "choose",
    "for_dispatch_modes",
    "log_once",
]

logger = logging.getLogger("fusedreg")

# The one list of backends, the fastest first: "auto" takes the first that accepts a parameter.
_ALL: tuple[Backend, ...] = (CppBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}

_said: set[str] = set()


def check_name(name: str) -> None:
    """Raises ValueError for an unknown backend, RuntimeError for one that cannot run here, with the reason."""
    names = ("auto", *BACKENDS)
    if name not in names:
        raise ValueError(f"Invalid backend value: {name!r} (allowed: {', '.join(map(repr, names))})")
    if name != "auto":
        reason = BACKENDS[name].unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")


def choose(
    name: str,
    spec: RuleSpec,
    param: Tensor,
    states: list[Tensor],
    differentiable: bool,
    with_units: bool = False,
    with_rounding: bool = False,
    state_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
) -> Backend:
    """The backend for one parameter under a rule.

    Args:
        with_units: whether its group has penalties on units.
        with_rounding: whether something of it is rounded stochastically.
        state_dtype: as in ``Backend.rejection``.
        grad_dtype: likewise.

    Raises:
        RuntimeError: ``name`` is a backend's own name and that one cannot take this parameter.
    """

    def reason_against(backend: Backend) -> str | None:
        if with_units and not backend.takes_units:
            return "it has no pass over units yet, which group_l1 and max_unit_norm need"
        if with_rounding and not backend.rounds_stochastically:
            return "it rounds to the nearest, and stochastic_rounding is on"
        return backend.unavailable_reason() or backend.rejection(spec, param, states, state_dtype, grad_dtype)

    if differentiable:
        return BACKENDS["reference"]
    if name != "auto":
        reason = reason_against(BACKENDS[name])
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        return BACKENDS[name]
    reasons = []
    for backend in BACKENDS.values():
        if backend.device_type not in (None, param.device.type):
            continue
        reason = reason_against(backend)
        if reason is None:
            break
        reasons.append(f"backend {backend.name!r} is not used: {reason}")
    for reason in reasons:
        log_once(f"{reason}. Using backend {backend.name!r}.")
    return backend


def for_dispatch_modes(name: str) -> str:
    """The backend for a step under a ``TorchDispatchMode``, in place of the one called ``name``.

    Raises:
        RuntimeError: a backend asked for by name, whose operations a mode would not see.
    """
    if name not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {name!r} cannot run: a TorchDispatchMode (make_fx, FakeTensorMode, a counter) is active, and "
            "does not see what it does (allowed: backend='auto', which takes 'reference' there)"
        )
    return "reference"


def log_once(message: str) -> None:
    """Logs a warning the first time that this process comes to it."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)
