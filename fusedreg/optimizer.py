"""The plumbing around a step, once for all optimizers: param groups, lazy state, AMP, plans, checkpoints.

A step goes ``step()`` -> hyperparameters checked and turned into doubles -> a plan per backend (kept between steps) ->
norm pass if asked for -> update pass. Everything that can fail comes before anything that changes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends
from .backends import DeviceNorm, Entry, Plan, StepScalars
from .groups import L1_MODES, REGULARIZERS, check_group, check_no_l1_on_complex, check_one_max_grad_norm, on_gpu
from .reference import clip_coefficient

COMMON_SCALARS = ("lr", "weight_decay", "maximize", "decoupled_weight_decay", "l1", "l2", "l1_mode", "clip_value")

REGULARIZER_DOC = """
    On top of the twin's arguments, per group unless said otherwise:

    Args:
        l1 (float): strength of the penalty ``l1 * sum |w|``, >= 0. Default: 0.
        l2 (float): strength of the penalty ``l2 / 2 * sum w^2``, >= 0. Default: 0.
        l1_mode (str): how the penalties act. ``"proximal"`` (default): a proximal step in the optimizer's own metric,
            which ends at the exact minimiser of ``loss + penalty``, with exact zeros. ``"decoupled"``: a proximal step
            of size ``lr``, scale-free as AdamW's decay, with exact zeros, but not the Lasso. ``"subgradient"``: both
            penalties as gradients, as ``loss += l1 * w.abs().sum() + l2 / 2 * w.square().sum()``; no exact zeros.
        clip_value (float, optional): clamps every gradient element to ``[-clip_value, clip_value]``, as
            ``clip_grad_value_``, without writing ``p.grad``.
        max_grad_norm (float, optional): scales all gradients down to this total norm, as ``clip_grad_norm_`` after
            ``clip_grad_value_``, without writing ``p.grad``. One number for the whole optimizer; ``inf`` only measures.
        backend (str): ``"auto"``, or the name of a backend that must be used: ``"cpp"``, ``"cuda"``, ``"triton"``,
            ``"reference"``. One for the whole optimizer.

    Raises:
        ValueError: a strength, mode, clip or backend name that is not allowed; groups that disagree on
            ``max_grad_norm``; ``l1 > 0`` on complex parameters. From ``step()``: a gradient on another device, of
            another dtype or shape than its parameter, a parameter that overlaps itself in memory.
        RuntimeError: a backend asked for by name that cannot run. From ``step()``: a sparse gradient.

    Whatever raises, no parameter, state or step count has changed.
"""


def _with_hooks(bare: Callable[..., Any]) -> Callable[..., Any]:
    """What torch does to an optimizer's ``step``, where there is something to do for it.

    torch wraps a step that is not marked as hooked in a function that runs hooks and tells the profiler. That costs
    microseconds in every step, for what is seldom there.
    """
    with_hooks = Optimizer.profile_hook_step(bare)

    @functools.wraps(bare)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
            or torch.compiler.is_compiling()
        ):
            return with_hooks(self, *args, **kwargs)
        return bare(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]
    return step


class FusedRegOptimizer(Optimizer):
    """Base of the fusedreg optimizers; always mixed with a torch.optim twin, which comes second.

    A subclass names its ``rule`` (registered in csrc/rules/registry.h and reference.py), the state tensors that the
    rule keeps, the rule's scalars, and how to read them out of a group.
    """

    rule: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    scalars: ClassVar[tuple[str, ...]]
    group_keys: ClassVar[tuple[str, ...]]
    """The keys of a group that the rule's scalars are read from."""

    # Tells GradScaler to leave unscaling and skipping to us: it sets `grad_scale` and `found_inf` before a step.
    _step_supports_amp_scaling = True

    _backend: str = "auto"
    _grad_norm: float | Tensor | None = None  # float64 where it is a tensor
    _clocks_on_device = False

    # What steps keep: the plans, what they rest on, and the hyperparameters as they were last read.
    _plans: list[Plan] | None = None
    _planned_state: Any = None
    _before_created: Any = None
    _planned_params: list[list[Tensor]]
    _raw: list[tuple[Any, ...]]
    _raw_is_constant = False
    _scalars: list[tuple[float | Tensor, ...]]
    _has_tensor_scalars = False
    _with_l1: list[bool]

    # -- what a rule says of itself

    @classmethod
    def states_of(cls, group: dict[str, Any]) -> tuple[str, ...]:
        """The names, in order, of the state tensors that the rule needs under this group's options."""
        raise NotImplementedError

    @classmethod
    def rule_scalars(cls, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        """The values of ``scalars``, in that order: ``scalar`` of each that may be a tensor on a GPU, else floats."""
        raise NotImplementedError

    def make_clock(self, group: dict[str, Any], position: int) -> Tensor | None:
        """The rule's clock for ``group["params"][position]``, created where it is missing."""
        raise NotImplementedError

    def align_clocks(self) -> None:
        """Brings clocks that stand in the groups to the places that their parameters have now."""

    # -- param groups

    def _set_regularizers(self, backend: str, **regularizers: Any) -> None:
        """Called before the twin's ``__init__``, which adds the param groups."""
        backends.check_name(backend)
        check_group(regularizers)
        self._backend = backend
        self._regularizers = regularizers

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; the group may set its own strengths.

        Raises:
            ValueError: a strength or mode that is not allowed, or another ``max_grad_norm`` than the other groups'.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # raises, in the twin's words
        # The twin builds `defaults` in its own __init__, just before it adds the first group.
        for key, value in self.__dict__.pop("_regularizers", {}).items():
            self.defaults[key] = value
        for key in REGULARIZERS:
            param_group.setdefault(key, self.defaults[key])
        check_group(param_group)
        check_one_max_grad_norm([*self.param_groups, param_group])
        super().add_param_group(param_group)
        try:
            check_no_l1_on_complex(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._plans = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Here, not in load_state_dict: its pre-hooks may still change what is loaded.
        for group in state.get("param_groups", []):
            check_group({**REGULARIZERS, **group})
        own_groups = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):
            # Groups out of a plain torch checkpoint keep the strengths that this optimizer was made with.
            own = own_groups[i] if i < len(own_groups) else self.defaults
            for key, default in REGULARIZERS.items():
                group.setdefault(key, own.get(key, default))
        self._plans = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the twin's, from either class. Groups that lack our keys keep the ones they have here.

        Raises:
            ValueError: the state dict does not fit this optimizer's groups, or holds strengths that are not allowed.
        """
        super().load_state_dict(state_dict)

    # -- a step

    @property
    def grad_norm(self) -> Tensor | None:
        """The total gradient norm of the last step, before norm clipping: 0-dim, on the parameters' device.

        float64 where all parameters are, else float32. None before the first step, and where ``max_grad_norm`` is None.
        """
        if self._grad_norm is None:
            return None
        params = [param for group in self.param_groups for param in group["params"]]
        dtype = torch.float64 if all(param.dtype == torch.float64 for param in params) else torch.float32
        if isinstance(self._grad_norm, float):
            return torch.tensor(self._grad_norm, dtype=dtype, device=params[0].device if params else None)
        return self._grad_norm.to(dtype, copy=True)

    @_with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _step_uncompiled(self)
        else:
            self._step()
        return loss

    def _step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        stays_on_device = on_gpu(found_inf)
        # Any nonzero value skips: it is a sum over devices.
        if found_inf is not None and not stays_on_device and float(found_inf) != 0:
            return
        if stays_on_device and not self._clocks_on_device:
            # As torch's fused optimizers have it: the host does not know whether a step is skipped.
            self._clocks_on_device, self._plans = True, None
        step = StepScalars(grad_scale=getattr(self, "grad_scale", None))
        if not on_gpu(step.grad_scale) and step.inv_grad_scale == math.inf:
            raise ZeroDivisionError("grad_scale is so small that its inverse is infinite")  # a zero raises by itself
        try:
            plans = self._current_plans()
            if stays_on_device:
                if all(plan.stays_on_device for plan in plans):
                    step.found_inf = found_inf
                elif float(cast(Tensor, found_inf)) != 0:
                    return
            if "capturable" in self.defaults and any(plan.stays_on_device for plan in plans):
                _check_graph_capture(self)
            max_grad_norm = self.param_groups[0]["max_grad_norm"] if self.param_groups else None
            if max_grad_norm is not None:
                self._clip(plans, step, max_grad_norm)
            else:
                self._grad_norm = None
        except BaseException:
            self._plans = None  # which may not have been told of hyperparameters that were read
            self._take_back_created()
            raise
        self._before_created = None
        for plan in plans:
            plan.update(step)

    def _clip(self, plans: list[Plan], step: StepScalars, max_grad_norm: float | Tensor) -> None:
        """Takes the norm over all plans, and puts what they need to clip with it into ``step``."""
        sums = [plan.sum_of_squares(step) for plan in plans]
        if all(isinstance(value, float) for value in sums):
            norm = math.sqrt(sum(cast(list[float], sums)))
            self._grad_norm = norm
            bound = float(max_grad_norm)
            # Infinity measures, also what is not finite. Otherwise NaN stays.
            step.clip_coef = 1.0 if bound == math.inf or bound / (norm + 1e-6) > 1.0 else bound / (norm + 1e-6)
            return
        device = next(value.device for value in sums if isinstance(value, Tensor))
        parts = [
            value.to(device, torch.float64).reshape(-1)
            if isinstance(value, Tensor)
            else torch.tensor([value], dtype=torch.float64, device=device)
            for value in sums
        ]
        squares = parts[0] if len(parts) == 1 else torch.cat(parts)
        limit = max_grad_norm if on_gpu(max_grad_norm) else float(max_grad_norm)
        if any(plan.stays_on_device for plan in plans):
            # One buffer for all steps, so that a CUDA graph writes where `grad_norm` reads.
            if not isinstance(self._grad_norm, Tensor) or self._grad_norm.device != device:
                self._grad_norm = torch.zeros((), dtype=torch.float64, device=device)
            step.norm = DeviceNorm(squares, limit, self._grad_norm)
        if not all(plan.stays_on_device for plan in plans):
            total = squares.sum().sqrt()
            self._grad_norm = total.detach()
            measures = not isinstance(limit, Tensor) and limit == math.inf
            step.clip_coef = 1.0 if measures else clip_coefficient(total, limit)

    # -- plans

    def _current_plans(self) -> list[Plan]:
        """Plans with this step's hyperparameters and gradients. Changes nothing if it raises."""
        changed = self._read_groups()
        plans = self._plans
        if (
            plans is not None
            and self._planned_state is self.state
            and len(self._planned_params) == len(self.param_groups)
            and all(map(_same_objects, self._planned_params, map(_PARAMS, self.param_groups)))
            and (not changed or all([plan.set_groups(self.param_groups, self._scalars) for plan in plans]))
            and all([plan.refresh() for plan in plans])
        ):
            return plans
        self._plans = None
        plans = self._make_plans()
        for plan in plans:
            if not (plan.set_groups(self.param_groups, self._scalars) and plan.refresh()):
                raise RuntimeError("fusedreg made a plan that does not fit its own optimizer; please report this")
        self._planned_state = self.state
        self._planned_params = [list(group["params"]) for group in self.param_groups]
        self._plans = plans
        return plans

    def _read_groups(self) -> bool:
        """Checks the hyperparameters and reads them into ``self._scalars``; False if they are as they were."""
        raw = list(map(self._reader(), self.param_groups))
        # The very objects of the last step, none of which can be written in place: the most common case by far.
        if (
            self._plans is not None
            and self._raw_is_constant
            and len(raw) == len(self._raw)
            and all(map(_same_objects, raw, self._raw))
        ):
            return False
        has_tensors = any(isinstance(value, Tensor) for value in _flatten(raw))  # equal to a number that it rounds to
        if self._plans is not None and not has_tensors and not self._has_tensor_scalars and raw == self._raw:
            return False
        for group in self.param_groups:
            check_group(group)
        check_one_max_grad_norm(self.param_groups)
        self._scalars = [self._read_scalars(group) for group in self.param_groups]
        self._has_tensor_scalars = has_tensors
        # lists copied: they can be written in place
        self._raw = [tuple(list(value) if isinstance(value, list) else value for value in group) for group in raw]
        with_l1 = [on_gpu(group["l1"]) or group["l1"] != 0 for group in self.param_groups]
        if self._plans is not None and with_l1 != self._with_l1:
            self._plans = None  # whether the parameters allow it is checked where plans are made
        self._with_l1 = with_l1
        self._raw_is_constant = all(map(_is_constant, raw))
        return True

    @classmethod
    @functools.cache
    def _reader(cls) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
        return operator.itemgetter(*cls.group_keys, *REGULARIZERS)

    @classmethod
    def _read_scalars(cls, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        """The group's values of COMMON_SCALARS, then of the rule's scalars."""
        clip_value = group["clip_value"]
        return (
            scalar(group["lr"]),
            scalar(group["weight_decay"]),
            float(group["maximize"]),
            float(group.get("decoupled_weight_decay", False)),
            scalar(group["l1"]),
            scalar(group["l2"]),
            float(L1_MODES.index(group["l1_mode"])),
            math.inf if clip_value is None else scalar(clip_value),
            *cls.rule_scalars(group),
        )

    def _make_plans(self) -> list[Plan]:
        for group in self.param_groups:
            check_no_l1_on_complex(group)
        differentiable = self.defaults["differentiable"]
        chosen: dict[Tensor, str] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    check_gradient(param, type(self).__name__)
                    own = self.state.get(param, {})
                    states = [own[name] for name in self.states_of(group) if own.get(name) is not None]
                    step = own.get("step")
                    check_states(param, states, step if isinstance(step, Tensor) else None)
                    chosen[param] = backends.choose(self._backend, param, states, differentiable).name
        self._send_shared_memory_to_reference(chosen)
        # Below, only memory can run out, or a signal come: then what was created is taken back.
        gains = [group.get("momentum_gain") for group in self.param_groups]
        self._before_created = (
            {param: dict(self.state[param]) if param in self.state else None for param in chosen},
            [None if gain is None else gain.clone() for gain in gains],
        )
        watched: list[Entry] = []
        self.align_clocks()
        entries: dict[tuple[str, torch.device], list[Entry]] = {}
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param in chosen:
                    clock = self.make_clock(group, position)
                    names = self.states_of(group)
                    # as in torch, what needs no state gets no entry
                    state = self.state[param] if names or param in self.state else {}
                    for name in names:
                        if state.get(name) is None:
                            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    entries.setdefault((chosen[param], param.device), []).append(Entry(param, index, state, clock))
                else:
                    watched.append(Entry(param, index, None, None))
        for entry in watched:
            # By a fast backend, which looks fastest whether a gradient has come; one of the same device, if there is.
            same_device = [key for key in entries if key[1] == entry.param.device]
            key = next(iter(same_device), ("reference", entry.param.device))
            entries.setdefault(key, []).append(entry)
        return [
            backends.BACKENDS[name].make_plan(self.rule, some, differentiable, self.state)
            for (name, _), some in entries.items()
        ]

    def _take_back_created(self) -> None:
        """After a step that was not taken: state that was made for it would read as if it had been."""
        if self._before_created is None:
            return
        self._plans = None
        states, gains = self._before_created
        for param, state in states.items():
            if state is None:
                self.state.pop(param, None)
            else:
                self.state[param].clear()
                self.state[param].update(state)
        for group, gain in zip(self.param_groups, gains, strict=True):
            if gain is not None:
                group["momentum_gain"] = gain
            else:
                group.pop("momentum_gain", None)
        self._forget_clocks()
        self._before_created = None

    def _forget_clocks(self) -> None:
        """Clocks that stand in the groups were put there anew."""

    def _send_shared_memory_to_reference(self, chosen: dict[Tensor, str]) -> None:
        """Parameters that share memory are updated one after the other, as torch does, not side by side."""
        spans = []
        for group in self.param_groups:
            for param in group["params"]:
                if param in chosen and chosen[param] != "reference" and param.numel() > 0:
                    begin = param.data_ptr()
                    spans.append((begin, begin + memory_extent(param) * param.element_size(), param))
        spans.sort(key=operator.itemgetter(0, 1))
        farthest_end, its_param = 0, None
        for begin, end, param in spans:
            if begin < farthest_end and its_param is not None:
                if self._backend != "auto":
                    raise RuntimeError(
                        f"backend {self._backend!r} cannot run: two parameters share memory, of shapes "
                        f"{tuple(its_param.shape)} and {tuple(param.shape)}"
                    )
                backends.log_once("parameters that share memory are stepped one by one, by backend 'reference'")
                chosen[its_param] = chosen[param] = "reference"
            if end > farthest_end:
                farthest_end, its_param = end, param


# Inside torch.compile a step is one call into eager code, as torch's own fused step is.
_step_uncompiled = torch._disable_dynamo(FusedRegOptimizer._step)

# The newer name, where torch has it.
_check_graph_capture = getattr(
    Optimizer, "_accelerator_graph_capture_health_check", Optimizer._cuda_graph_capture_health_check
)

_PARAMS = operator.itemgetter("params")


def scalar(value: Any) -> float | Tensor:
    """A hyperparameter as plans take it: a float, or the tensor itself where reading it would wait for a GPU."""
    if not isinstance(value, Tensor):
        return float(value)
    return value if on_gpu(value) else float(value.detach())  # one that requires a gradient would warn


def _same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (float, int, str))


def _flatten(values: Any) -> Any:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flatten(value)
        else:
            yield value


def memory_extent(tensor: Tensor) -> int:
    """How many elements lie between a tensor's first and last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of a tensor's elements share memory, as those of an expanded tensor do."""
    if tensor.numel() == 0:
        return False
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    extent = 1
    for stride, size in dims:
        if stride < extent:
            break
        extent += (size - 1) * stride
    else:
        return False
    if any(stride == 0 for stride, _ in dims):
        return True
    # Strides that interleave need not overlap: count.
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = (offsets[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return offsets.unique().numel() != offsets.numel()


def check_states(param: Tensor, states: list[Tensor], step: Tensor | None) -> None:
    """Raises if ``param`` cannot be stepped with the state that it has, before anything has changed."""
    for state in states:
        if state.shape != param.shape:
            raise ValueError(
                f"Invalid state: its shape is {tuple(state.shape)}, its parameter's {tuple(param.shape)} "
                "(allowed: the same)"
            )
    written = [param, *states] if step is None else [param, *states, step]
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in written):
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed")


def check_gradient(param: Tensor, optimizer: str) -> None:
    """Raises if a step cannot be taken on ``param`` with ``param.grad``, before anything has changed."""
    grad = param.grad
    assert grad is not None
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(f"Invalid parameter: its dtype is {param.dtype} (allowed: floating point and complex)")
    if grad.layout != torch.strided:
        raise RuntimeError(f"{optimizer} does not support sparse gradients, and one has layout {grad.layout}")
    for what in ("device", "dtype", "shape"):
        ours, theirs = getattr(param, what), getattr(grad, what)
        if ours != theirs:
            raise ValueError(f"Invalid gradient: its {what} is {theirs}, its parameter's {ours} (allowed: the same)")
    if overlaps_itself(param):
        raise ValueError(
            f"Invalid parameter: elements of it share memory, shape {tuple(param.shape)}, strides {param.stride()} "
            "(allowed: one place in memory for each element; use .contiguous())"
        )
