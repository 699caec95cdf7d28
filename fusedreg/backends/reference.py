"""The reference backend: walks the parameters one by one, on any device, differentiably where asked."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .base import Entry, Plan, StepScalars

NOT_HYPERPARAMETERS = ("params", "param_names", "momentum_gain")


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a step on parameters of ``dtype`` is computed in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


# Not a closure: one that calls itself is a cycle, and would keep a plan and all its tensors until the collector comes.
def _scalar(value: Any, keep_tensors: bool) -> Any:
    if isinstance(value, Tensor):
        return value.reshape(()) if keep_tensors else value.item()
    return tuple(_scalar(each, keep_tensors) for each in value) if isinstance(value, (tuple, list)) else value


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class ReferencePlan(Plan):
    stays_on_device = False

    def __init__(self, rule: str, entries: list[Entry], differentiable: bool) -> None:
        self.rule = rule
        self.entries = entries
        self.differentiable = differentiable
        self.groups: list[dict[str, Any]] = []
        self.fresh = True

    def set_groups(self, groups: list[dict[str, Any]], scalars: list[tuple[float | Tensor, ...]]) -> bool:
        self.groups = [self._resolve(group) for group in groups]
        return True

    def _keeps_tensors(self, group: dict[str, Any]) -> bool:
        """Whether autograd, or a CUDA graph, must see the hyperparameters and clocks that are tensors."""
        return self.differentiable or group.get("capturable", False)

    def _resolve(self, group: dict[str, Any]) -> dict[str, Any]:
        keep = self._keeps_tensors(group)
        return {key: _scalar(value, keep) for key, value in group.items() if key not in NOT_HYPERPARAMETERS}

    def refresh(self) -> bool:
        # Good for one step: its gradients were checked when it was made, and it has nothing worth keeping.
        fresh, self.fresh = self.fresh, False
        return fresh

    def _gradient(self, entry: Entry) -> Tensor:
        grad = entry.param.grad
        assert grad is not None
        return _real(grad).to(arithmetic_dtype(grad.dtype))

    def _active(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.state is not None]

    def sum_of_squares(self, step: StepScalars) -> Tensor:
        total = torch.zeros((), device="cpu")
        with self._grad_mode():
            for entry in self._active():
                group = self.groups[entry.group]
                g = reference.clip_gradient_value(self._gradient(entry), group, step.inv_grad_scale)
                widest = torch.float32 if g.device.type == "mps" else torch.float64
                total = total.to(g.device) + g.to(widest).square().sum()
        return total

    def update(self, step: StepScalars) -> None:
        with self._grad_mode():
            for entry in self._active():
                self._update(entry, step)

    def _grad_mode(self) -> AbstractContextManager[None]:
        return torch.enable_grad() if self.differentiable else torch.no_grad()

    def _update(self, entry: Entry, step: StepScalars) -> None:
        param, group = entry.param, self.groups[entry.group]
        assert entry.state is not None
        state = {name: value for name, value in entry.state.items() if name != "step" and isinstance(value, Tensor)}

        def operand(tensor: Tensor) -> Tensor:
            tensor = _real(tensor)
            # autograd keeps operands, and the results are written over them below
            return tensor.clone() if self.differentiable else tensor.to(arithmetic_dtype(param.dtype))

        clock: Any = 0.0
        if entry.clock is not None:
            clock = entry.clock.clone() if self._keeps_tensors(group) else entry.clock.item()
        result = reference.update(
            self.rule,
            operand(param),
            self._gradient(entry),
            {name: operand(value) for name, value in state.items()},
            clock,
            group,
            step.inv_grad_scale,
            step.clip_coef,
        )
        # A parameter may be a view of a leaf, which autograd guards even under no_grad.
        target = param if self.differentiable else param.detach()
        _real_view(target).copy_(result.w)
        for name, value in result.state.items():
            _real_view(state[name]).copy_(value)
        if entry.clock is not None:
            entry.clock.copy_(result.clock) if isinstance(result.clock, Tensor) else entry.clock.fill_(result.clock)


def _real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class ReferenceBackend:
    name = "reference"
    device_type: str | None = None

    def unavailable_reason(self) -> str | None:
        return None

    def rejection(self, param: Tensor, states: list[Tensor]) -> str | None:
        return None

    def make_plan(self, rule: str, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        return ReferencePlan(rule, entries, differentiable)
