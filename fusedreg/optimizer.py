"""The base of all optimizers: param groups, ``step()``, checkpoints. What a step is made of is in step/.

A step goes: hyperparameters checked and read as numbers (hyperparameters.py) -> a plan per backend, kept between steps
(step/plan.py) -> norm pass if asked for (step/norm.py) -> update pass (backends/). Everything that can fail comes
before anything that changes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends
from .backends import StepScalars
from .backends.cpp import OTHER, OTHER_NUMBERS, make_watch
from .checkpoints import bring_up_to_date, regroup, restore_states
from .codes import as_saved, decoded
from .hyperparameters import (
    FOLLOWED,
    Hyperparameters,
    Split,
    check_group,
    check_one_max_grad_norm,
    check_params,
    read_old_name,
    spare_small,
    warn_if_nothing_is_left,
)
from .penalties import MAX_GRAD_NORM, OPTIONS, ROUNDING_SEED, STOCHASTIC_ROUNDING, as_python, on_gpu
from .regularizers import read_keywords, write_docs
from .rounding import key_of_step, next_seed
from .rules.spec import RuleSpec
from .step.checks import check_graph_capture, check_rounding_in_graphs
from .step.created import Created
from .step.norm import clip
from .step.plan import Gradients, Plans, make_plans


def _with_hooks(bare: Callable[..., Any]) -> Callable[..., Any]:
    """What torch does to an optimizer's ``step``, where there is something to do for it.

    torch wraps a step that is not marked as hooked in a function that runs hooks and tells the profiler. That costs
    microseconds in every step, for what is seldom there.
    """
    with_hooks = Optimizer.profile_hook_step(bare)

    @functools.wraps(bare)
    def step(self: FusedRegOptimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return with_hooks(self, *args, **kwargs)
        if not args and not kwargs and self._step_again():
            return None
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        ):
            return with_hooks(self, *args, **kwargs)
        return bare(self, *args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]
    return step


class FusedRegOptimizer(Optimizer):
    """Base of the fusedreg optimizers; mixed with a torch.optim twin, which comes second. ``spec`` says its rule."""

    spec: ClassVar[RuleSpec]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling and skipping to us: it sets ``grad_scale`` and ``found_inf`` before a
        step.

        Others read it to refuse a clip of theirs, or not to unscale for it, as Lightning does. They may clip:
        ``p.grad`` is theirs until a step, and a scaler that has unscaled already says so.
        """
        return sys._getframe(1).f_globals.get("__name__") == "torch.amp.grad_scaler"

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """The twins' constructors set it where ``fused`` is true."""

    _backend: str = "auto"
    _norm_group: Any = None
    _scalars_on_device = False

    # What steps keep.
    _plans: Plans | None = None
    _hyperparameters: Hyperparameters | None = None
    _splits: dict[int, Split]
    _loading: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "spec" in vars(cls):
            cls.__doc__ = write_docs(cls.__name__, cls.spec, cls.__doc__)

    # -- param groups

    def _set_regularizers(self, keywords: Any) -> None:
        """Takes the keywords beside the twin's. Called before the twin's ``__init__``, which adds the param groups."""
        # float64 where it is a tensor; in a dict, which wrappers share that copy our attributes when they are made
        self._measured: dict[str, float | Tensor | None] = {}
        self._regularizers, self._backend, self._norm_group = read_keywords(type(self), keywords)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; the group may set its own strengths.

        Raises:
            ValueError: a strength or mode that is not allowed, or another ``max_grad_norm`` than the other groups'.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # raises, in the twin's words
        # The twin builds `defaults` in its own __init__, just before it adds the first group.
        self.defaults.update(self.__dict__.pop("_regularizers", {}))
        read_old_name(param_group)
        for option in OPTIONS:
            param_group[option.name] = as_python(param_group.get(option.name, self.defaults[option.name]))
        check_group(self.spec, {**self.defaults, **param_group})
        check_one_max_grad_norm([*self.param_groups, param_group])
        super().add_param_group(param_group)
        try:
            for group in spare_small(self.param_groups[-1:]):
                check_params(self.spec, group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget()

    def _forget(self) -> None:
        self._plans = self._hyperparameters = None
        self._splits = {}

    # -- checkpoints

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_backend", "_norm_group", "_measured")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Here, not in load_state_dict: its pre-hooks may still change what is loaded.
        own_groups = self.__dict__.get("param_groups", [])
        bring_up_to_date(self.spec, state, own_groups, self.__dict__.get("defaults", {}))
        if self._loading is not None:
            restore_states(self.spec, state, self._loading)
        super().__setstate__(state)
        self._forget()

    def state_dict(self, native: bool = False) -> dict[str, Any]:
        """As the twin's. States that are stored in 8 bits are float32 in it, so that it loads into the twin, and under
        any ``state_dtype``.

        Args:
            native: such states as they are: codes and scales, under keys of their own, in a quarter of the memory. It
                loads into this class alone.

        Raises:
            ValueError: native states of DTensors, whose blocks are each process's own.
        """

        def in_other_words(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            convert = as_saved if native else decoded
            return {**state_dict, "state": {key: convert(own) for key, own in state_dict["state"].items()}}

        # Before whoever else hooks in: what they see is what is saved.
        handle = self.register_state_dict_post_hook(in_other_words, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the twin's, from either class. Groups that lack our keys keep the ones they have here.

        Where the parameters are those of ``fusedreg.param_groups(model)``, they may have been saved in other groups: in
        one, as ``torch.optim.Adam(model.parameters())`` has them, or in any whose parameters have names. The strengths
        and the decay are then this optimizer's own.

        ``state_dtype`` and ``stochastic_rounding`` always are: states of another dtype are converted.

        Raises:
            ValueError: the state dict does not fit this optimizer's groups, or holds strengths that are not allowed.
        """

        # Hooks may change what is loaded; what torch then hands on to __setstate__ is cast to the parameters' dtypes.
        def remember(_: Optimizer, final: dict[str, Any]) -> dict[str, Any] | None:
            regrouped = regroup(final, self.param_groups)
            self._loading = regrouped or final
            return regrouped

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    # -- a step

    @property
    def grad_norm(self) -> Tensor | None:
        """The total gradient norm of the last step, before norm clipping: 0-dim, on the parameters' device.

        float64 where all parameters are, else float32. None before the first step, and where ``max_grad_norm`` is None.
        """
        norm = self._measured.get("grad_norm")
        if norm is None:
            return None
        params = [param for group in self.param_groups for param in group["params"]]
        dtype = torch.float64 if all(param.dtype == torch.float64 for param in params) else torch.float32
        if isinstance(norm, float):
            return torch.tensor(norm, dtype=dtype, device=params[0].device if params else None)
        return norm.to(dtype, copy=True)

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
        elif closure is None or not self._step_again():
            self._step()
        return loss

    def _step_again(self) -> bool:
        """The step of a training loop: since the last one, nothing is new but gradients and what schedulers change.
        False if there is more, and nothing was done."""
        plans = self._plans
        if plans is None or plans.watch is None:
            return False
        # It is asked once: whatever raises, the next step is not this one.
        watch, plans.watch = plans.watch, None
        seen = watch.look(self.__dict__)
        if seen == OTHER:
            return False
        self._plans = None  # as in _step
        if seen == OTHER_NUMBERS:
            hyperparameters = self._hyperparameters
            assert hyperparameters is not None
            groups = spare_small(self.param_groups, self._splits) if self._splits else self.param_groups
            if not hyperparameters.follow(groups):
                return False
            plans.set_groups(groups, hyperparameters)
        for plan in plans.plans:
            if not plan.refresh():
                return False
        step = plans.plain_step
        if step is None:
            step = StepScalars()
            self._prepare(plans, step, None)
        self._plans, plans.watch = plans, watch
        for plan in plans.plans:
            plan.update(step)
        return True

    def _step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            # Any nonzero value skips: it is a sum over devices.
            if not on_gpu(found_inf) and float(found_inf) != 0:
                return
            if on_gpu(found_inf) and not self._scalars_on_device:
                # As torch's fused optimizers have it: the host does not know whether a step is skipped.
                self._scalars_on_device, self._plans = True, None
        step = StepScalars(grad_scale=getattr(self, "grad_scale", None))
        if step.grad_scale is not None and not on_gpu(step.grad_scale):
            step.inv_grad_scale = 1.0 / float(step.grad_scale)  # a zero raises by itself
            if step.inv_grad_scale == math.inf:
                raise ZeroDivisionError("grad_scale is so small that its inverse is infinite")

        # Until they are known to fit this step there are none: whatever raises, the next step makes new ones.
        plans, self._plans = self._plans, None
        if plans is not None:
            plans.watch = None
        # A mode sees torch's operations and none of ours: it would trace, or count, a step that does nothing.
        is_watched = torch._C._len_torch_dispatch_stack() > 0
        if is_watched:
            plans = None
        gradients = Gradients()
        groups = spare_small(self.param_groups, self._splits)
        if any(group.get(STOCHASTIC_ROUNDING.name) for group in groups):
            check_rounding_in_graphs(type(self).__name__)
            for group in groups:
                ROUNDING_SEED.check(group[ROUNDING_SEED.name])
            step.rounding_keys = [key_of_step(group[ROUNDING_SEED.name]) for group in groups]
            rounded = [group for group in self.param_groups if group[STOCHASTIC_ROUNDING.name]]
            step.next_seeds = [(group, next_seed(group[ROUNDING_SEED.name])) for group in rounded]
        if self._hyperparameters is None:
            self._hyperparameters = Hyperparameters(self.spec, self.defaults)
            warn_if_nothing_is_left(self.param_groups, groups)
        hyperparameters = self._hyperparameters
        changed = hyperparameters.refresh(groups)
        if plans is not None and plans.follow(groups, self.state, hyperparameters, changed, gradients):
            is_taken = self._prepare(plans, step, found_inf)
        else:
            if self._splits:  # a parameter may have got other dimensions
                self._splits.clear()
                groups = spare_small(self.param_groups, self._splits)
                hyperparameters.refresh(groups)
            with Created(self.spec, self.state) as created:
                plans = make_plans(
                    type(self).__name__,
                    self.spec,
                    groups,
                    self.state,
                    hyperparameters,
                    created,
                    gradients,
                    backend=backends.for_dispatch_modes(self._backend) if is_watched else self._backend,
                    differentiable=self.defaults["differentiable"],
                    scalars_on_device=self._scalars_on_device,
                    norm_group=self._norm_group,
                )
                is_taken = self._prepare(plans, step, found_inf)
        self._plans = plans
        if is_taken:
            for plan in plans.plans:
                plan.update(step)
            for group, seed in step.next_seeds:  # where no plan has done so in its update
                group[ROUNDING_SEED.name] = seed
            has_scalars = found_inf is not None or step.grad_scale is not None or step.rounding_keys
            if not is_watched and not has_scalars and hyperparameters.is_constant and plans.can_be_watched:
                hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks)
                plans.watch = make_watch(
                    self.__dict__, (*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks), FOLLOWED
                )

    def _prepare(self, plans: Plans, step: StepScalars, found_inf: Tensor | None) -> bool:
        """Everything before the update; False if the step is skipped."""
        if found_inf is not None and on_gpu(found_inf):
            if plans.all_on_device:
                step.found_inf = found_inf
            elif float(found_inf) != 0:
                return False
        if step.grad_scale is not None and on_gpu(step.grad_scale) and not plans.all_on_device:
            step.inv_grad_scale = 1.0 / float(step.grad_scale)
        if plans.some_on_device:
            self._check_graph_capture()
        max_grad_norm = self.param_groups[0][MAX_GRAD_NORM.name] if self.param_groups else None
        self._measured["grad_norm"] = (
            None if max_grad_norm is None else clip(plans, step, max_grad_norm, self._measured.get("grad_norm"))
        )
        return True

    def _check_graph_capture(self) -> None:
        if "capturable" in self.defaults:
            _check_capturable(self)
            return
        counts_on_host = not self._scalars_on_device and not all(group.get("fused") for group in self.param_groups)
        if counts_on_host and any(scalar.is_step for scalar in self.spec.scalar_states):
            check_graph_capture(type(self).__name__)


# Inside torch.compile a step is one call into eager code, as torch's own fused step is.
_step_uncompiled = torch._disable_dynamo(FusedRegOptimizer._step)

# The newer name, where torch has it.
_check_capturable = getattr(
    Optimizer, "_accelerator_graph_capture_health_check", Optimizer._cuda_graph_capture_health_check
)
