"""One step, straight from the formulas, in plain PyTorch: the oracle that the fast backends are tested against.

It walks the parameters one by one, on any device, differentiably where asked. The stages and their symbols are those of
docs/formulas.md; a rule's stage 5 stands in rules/NAME.py, a penalty's prox in penalties/NAME.py. Nothing here is
shared with the compiled code. Stages take tensors in the arithmetic dtype (float32, float64 for float64 parameters) and
return new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..codes import decode, encode
from ..hyperparameters import Numbers
from ..memory import is_dtensor, local, widest
from ..penalties import PENALTIES, Prox, as_python, has_units
from ..penalties.l1 import L1
from ..penalties.mcp import MCP_GAMMA
from ..penalties.spec import Group, Scalar, like, on_host
from ..penalties.units import UnitProx, as_units, from_units, unit_prox
from ..rounding import FIRST_STATE, WEIGHTS, WEIGHTS_OF_UNITS, Place, bits_of_stream, round_stochastically
from ..rules.spec import RuleSpec, Scalars, Step, number
from .base import Entry, Plan, StepScalars

AsStored = Callable[[str, Tensor], Tensor]

# -- the stages


def clip_gradient_value(g: Tensor, group: Group, inv_grad_scale: Scalar) -> Tensor:
    """Stages 1 and 2: AMP's unscaling, ``maximize``, value clip. The norm is taken over the result."""
    g = g * inv_grad_scale
    if group["maximize"]:
        g = -g
    if group["clip_value"] is not None:
        bound = float(number(group["clip_value"]))
        if bound <= torch.finfo(g.dtype).max:  # clamp refuses a larger one
            g = g.clamp(-bound, bound)
    return g


def clip_coefficient(norm: Tensor, max_grad_norm: Scalar) -> Tensor:
    """Stage 3's factor, as ``torch.nn.utils.clip_grad_norm_`` defines it."""
    return torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)


def add_penalty_gradients(g: Tensor, w: Tensor, group: Group) -> Tensor:
    """Stage 4, coupled: weight decay as a gradient, and the penalties where penalty_mode is "subgradient"."""
    if group.get("weight_decay", 0) != 0 and not group.get("decoupled_weight_decay", False):
        g = g + group["weight_decay"] * w
    if group["penalty_mode"] == "subgradient":
        for penalty in PENALTIES:
            if penalty.gradient is not None and penalty.is_on(group):
                g = g + penalty.gradient(w, group)
    return g


def step_size(w_old: Tensor, step: Step, group: Group) -> Scalar | Tensor:
    """The prox's kappa."""
    if group["penalty_mode"] == "decoupled":
        return group["lr"]
    if step.metric is None:
        return step.tau
    ratio = torch.ones_like(step.metric) if step.safeguard is None else step.metric / step.safeguard
    slope = group["l1"] + group["l2"] * w_old.abs()
    if fades := MCP_GAMMA.is_on(group) and L1.is_on(group):
        slope = (group["l1"] - w_old.abs() / group["mcp_gamma"]).clamp(min=0) + group["l2"] * w_old.abs()
    d = torch.maximum(step.metric, slope / 2 * ratio)  # the product before the quotient would leave the range
    if fades:
        d = torch.maximum(d, like(d, 2 * step.tau / group["mcp_gamma"]))
    return step.tau / d


def prox(z: Tensor, w_old: Tensor, step: Step, group: Group) -> Tensor:
    """Stage 6: the proxes of all penalties, one after the other, in the metric of the step."""
    if not isinstance(group["lr"], Tensor) and group["lr"] == 0:
        return z  # no weight moves
    x, problem = z, Prox(z, step_size(w_old, step, group), w_old, group)
    for penalty in PENALTIES:
        if penalty.is_on(group) and (penalty.is_constraint or group["penalty_mode"] != "subgradient"):
            x = penalty.prox(x, problem)
    return x


def prox_of_units(spec: RuleSpec, y: Tensor, step: Step, scalars: Scalars, group: Group) -> Tensor:
    """Stage 7: the prox of the penalties on units, in the metric that the step has left."""
    mode = group["penalty_mode"]
    tau = group["lr"] if mode == "decoupled" else step.tau
    ridge, furthest = torch.ones_like(y), torch.full_like(y, torch.inf)
    if mode == "proximal" and spec.metric is not None:
        ridge = spec.metric(step.state, scalars.after, group)
        ratio = torch.ones_like(y) if step.safeguard is None else ridge / step.safeguard
        furthest = torch.where(ratio > 0, like(y, 2 * tau) / ratio, torch.inf)  # below zero there is no floor
    if mode != "subgradient":
        ridge = ridge + tau * group["l2"]
    unit = group["unit"]
    x = unit_prox(as_units(y, unit), UnitProx(tau, as_units(ridge, unit), as_units(furthest, unit)), group)
    return from_units(x, y, unit)


def update(
    spec: RuleSpec,
    w: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    scalars: Scalars,
    group: Group,
    inv_grad_scale: Scalar,
    clip_coef: Scalar,
    as_stored: AsStored = lambda name, tensor: tensor,
) -> Step:
    """Stages 1 to 7 for one parameter. Stage 7 is a pass of its own, over what the others have stored.

    Args:
        as_stored: ``as_stored(name, tensor)``, what a tensor is after it was stored, in the arithmetic dtype: a
            state by its name, the weights as ``"w"``.
    """
    g = clip_gradient_value(g, group, inv_grad_scale) * clip_coef
    g = add_penalty_gradients(g, w, group)
    decay = group["lr"] * group["weight_decay"] if group.get("decoupled_weight_decay", False) else 0.0
    step = spec.step(w * (1 - decay), g, state, scalars, group)
    x = prox(step.w, w, step, group)
    step = step._replace(w=x, state={**step.state, **step.finish(x, step.w)})
    if not has_units(group) or group["lr"] == 0:
        return step
    stored = {name: as_stored(name, tensor) for name, tensor in step.state.items()}
    y = as_stored("w", step.w)
    return step._replace(w=prox_of_units(spec, y, step._replace(state=stored), scalars, group))


# -- the backend


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a step on parameters of ``dtype`` is computed in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


# Not a closure: one that calls itself is a cycle, and would keep a plan and all its tensors until the collector comes.
def _keep_tensors(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_keep_tensors, value))
    return value.reshape(()) if isinstance(value, Tensor) else as_python(value)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class ReferencePlan(Plan):
    stays_on_device = False

    def __init__(self, spec: RuleSpec, entries: list[Entry], differentiable: bool) -> None:
        self.spec = spec
        self.entries = entries
        self.differentiable = differentiable
        self.groups: list[dict[str, Any]] = []
        self.gradients: list[Tensor | None] = []
        self.fresh = True

    def set_groups(self, groups: list[dict[str, Any]], numbers: Numbers) -> None:
        self.groups = [self._resolve(group) for group in groups]

    def _keeps_tensors(self, group: dict[str, Any]) -> bool:
        """Whether autograd, or a CUDA graph, must see the hyperparameters and scalar states that are tensors."""
        return self.differentiable or group.get("capturable", False)

    def _resolve(self, group: dict[str, Any]) -> dict[str, Any]:
        read = _keep_tensors if self._keeps_tensors(group) else on_host
        return {
            key: read(value) for key, value in group.items() if key not in ("params", "param_names", "param_places")
        }

    def refresh(self, gradients: list[Tensor | None] | None = None) -> bool:
        self.gradients = [entry.param.grad for entry in self.entries] if gradients is None else gradients
        # Good for one step: its gradients were checked when it was made, and it has nothing worth keeping.
        fresh, self.fresh = self.fresh, False
        return fresh

    def _active(self) -> Iterator[tuple[Entry, Tensor]]:
        """The entries that have a gradient, with it, in the arithmetic dtype."""
        for entry, grad in zip(self.entries, self.gradients, strict=True):
            if entry.state is not None and grad is not None:
                yield entry, _real(grad).to(arithmetic_dtype(local(entry.param).dtype))

    def sum_of_squares(self, step: StepScalars) -> Tensor:
        total = torch.zeros((), device="cpu")
        with self._grad_mode():
            for entry, grad in self._active():
                g = clip_gradient_value(grad, self.groups[entry.group], step.inv_grad_scale)
                total = total.to(g.device) + g.to(widest(g.device)).square().sum()
        return total

    def update(self, step: StepScalars) -> None:
        with self._grad_mode():
            for entry, grad in self._active():
                self._update(entry, grad, step)
        self.gradients = []

    def _grad_mode(self) -> AbstractContextManager[None]:
        return torch.enable_grad() if self.differentiable else torch.no_grad()

    def _update(self, entry: Entry, grad: Tensor, step: StepScalars) -> None:
        param, group = local(entry.param), self.groups[entry.group]

        def operand(tensor: Tensor) -> Tensor:
            tensor = _real(tensor)
            # autograd keeps operands, and the results are written over them below
            return tensor.to(arithmetic_dtype(param.dtype), copy=self.differentiable)

        def scalar(tensor: Tensor) -> Scalar:
            return tensor.clone() if self._keeps_tensors(group) else tensor.item()

        states = {name: local(state) for name, state in _named(self.spec.states, entry.states).items()}
        scales = _named(self.spec.states, entry.scales or (None,) * len(entry.states))
        scalars = _named(self.spec.scalar_states, entry.scalar_states)
        streams = {"w": WEIGHTS, **{each.name: FIRST_STATE + i for i, each in enumerate(self.spec.states)}}

        def random(stream: int) -> Tensor | None:
            if entry.rounding is None:
                return None
            return bits_of_stream(entry.param, Place(*entry.rounding), step.rounding_keys[entry.group], stream)

        def rounded(tensor: Tensor, dtype: torch.dtype, stream: int) -> Tensor:
            bits = random(stream) if dtype == torch.bfloat16 else None
            return tensor.to(dtype) if bits is None else round_stochastically(tensor, bits)

        def as_stored(name: str, tensor: Tensor) -> Tensor:
            if name in scales:
                encoded = torch.empty_like(states[name]), torch.empty_like(scales[name])
                encode(*encoded, tensor, random(streams[name]))
                return decode(*encoded).to(tensor.dtype)
            dtype = param.dtype.to_real() if name == "w" else states[name].dtype.to_real()
            return rounded(tensor, dtype, streams[name]).to(tensor.dtype)

        before = {name: scalar(tensor) for name, tensor in scalars.items()}
        after = self.spec.next_scalars(before, group, {name: tensor.dtype for name, tensor in scalars.items()})
        result = update(
            self.spec,
            operand(param),
            grad,
            {
                name: operand(decode(tensor, scales[name]) if name in scales else tensor)
                for name, tensor in states.items()
            },
            Scalars(before, after),
            group,
            step.inv_grad_scale,
            step.clip_coef,
            as_stored,
        )
        has_stage_7 = has_units(group) and group["lr"] != 0  # which stores the weights once more
        stream = WEIGHTS_OF_UNITS if has_stage_7 else WEIGHTS
        # A parameter may be a view of a leaf, which autograd guards even under no_grad.
        target = param if self.differentiable else param.detach()
        _real_view(target).copy_(rounded(result.w, param.dtype.to_real(), stream))
        for name, tensor in result.state.items():
            if name in scales:
                encode(states[name], scales[name], tensor, random(streams[name]))
            else:
                _real_view(states[name]).copy_(rounded(tensor, states[name].dtype.to_real(), streams[name]))
        if is_dtensor(entry.param):  # it counts in-place changes for itself, too
            torch.autograd.graph.increment_version([entry.param, *_named(self.spec.states, entry.states).values()])
        for name, value in after.items():
            scalars[name].copy_(value) if isinstance(value, Tensor) else scalars[name].fill_(value)


def _named(declared: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The tensors that there are, by the names that the spec gives them."""
    return {each.name: tensor for each, tensor in zip(declared, tensors, strict=True) if tensor is not None}


class ReferenceBackend:
    name = "reference"
    device_type: str | None = None
    takes_units = True
    rounds_stochastically = True

    def unavailable_reason(self) -> str | None:
        return None

    def rejection(
        self,
        spec: RuleSpec,
        param: Tensor,
        states: list[Tensor],
        state_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> str | None:
        return None

    def make_plan(self, spec: RuleSpec, entries: list[Entry], differentiable: bool, state: dict[Any, Any]) -> Plan:
        return ReferencePlan(spec, entries, differentiable)
