"""Who takes the step: torch's own optimizers, what a user writes by hand, other libraries, and fusedreg.

The shrink by hand is by ``lr * l1`` and leaves L2 to the weight decay, where it costs nothing. fusedreg does more work:
it divides l1 and l2 by the optimizer's own metric, for which a shrink by hand would have to read the second moment.
"""

from __future__ import annotations

import importlib
import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cases import Problem
from measure import time_in_rounds
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

import fusedreg
from fusedreg.parity import known
from fusedreg.rules.registry import OPTIMIZERS

LR, DECAY, L1, L2 = 1e-3, 0.01, 1e-4, 1e-4

Step = Callable[[], Any]


@dataclass(frozen=True)
class Rule:
    twin: type[torch.optim.Optimizer]
    ours: type[fusedreg.FusedRegOptimizer]
    states: int
    options: dict[str, Any] = field(default_factory=dict)

    def bytes_per_element(self, dtype: torch.dtype, clip: bool) -> int:
        """What a step moves at the least: w and the state are read and written, g is read, for a norm once more."""
        return dtype.itemsize * (2 + 1 + 2 * self.states + clip)

    @property
    def best(self) -> dict[str, bool]:
        """The options of torch's fastest implementation of the rule."""
        is_fused = "fused" in inspect.signature(self.twin).parameters
        return {"fused": True} if is_fused else {"foreach": True}


def registered_rules() -> dict[str, Rule]:
    """Every registered optimizer that has a twin, under it; each combination of states of a rule once."""
    found: dict[str, Rule] = {}
    seen: set[Any] = set()
    for cls in OPTIMIZERS:
        spec = cls.spec
        if spec.twin is None:
            continue
        group = cls([torch.zeros(1)]).param_groups[0]
        for variant, options in spec.variants.items():
            states = spec.needed_states({**group, **options})
            if variant != "plain" and (spec.name, states) in seen:
                continue
            seen.add((spec.name, states))
            name = spec.twin.__name__ + ("" if variant == "plain" else f", {variant}")
            found[name] = Rule(spec.twin, cls, len(states), dict(options))
    return found


RULES = registered_rules()


@dataclass(frozen=True)
class Contender:
    name: str
    step: Step
    clips: bool


# -- the shrink that a user writes by hand


@torch.no_grad()
def shrink_foreach(params: list[Tensor]) -> None:
    signs = torch._foreach_sign(params)
    torch._foreach_abs_(params)
    torch._foreach_sub_(params, LR * L1)
    torch._foreach_clamp_min_(params, 0.0)
    torch._foreach_mul_(params, signs)


@torch.no_grad()
def shrink_copy(params: list[Tensor]) -> None:
    for param in params:
        param.copy_(torch.nn.functional.softshrink(param, LR * L1))


@torch.no_grad()
def shrink_out(params: list[Tensor]) -> None:
    # One pass and no temporary. `out` is not in the documentation of softshrink, but in its signature.
    for param in params:
        torch.ops.aten.softshrink.out(param, LR * L1, out=param)


SHRINKS = {"torch._foreach_*": shrink_foreach, "copy_(softshrink)": shrink_copy, "softshrink(out=)": shrink_out}


def fastest_shrink(params: list[Tensor]) -> str:
    """The name of the shrink that is fastest on these tensors: the contenders by hand get that one."""
    seconds = time_in_rounds({name: partial(shrink, params) for name, shrink in SHRINKS.items()}, 0.3)
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


# -- by hand


def by_hand(problem: Problem, optimizer: torch.optim.Optimizer, shrink: Callable[[list[Tensor]], None]) -> Step:
    def step() -> None:
        clip_grad_norm_(problem.params, problem.max_norm)
        optimizer.step()
        shrink(problem.params)

    return step


def penalty_in_the_loss(problem: Problem, optimizer: torch.optim.Optimizer) -> Step:
    """The penalty's share of the forward and the backward pass belongs to its price."""

    def step() -> None:
        (L1 * sum(param.abs().sum() for param in problem.params)).backward()
        clip_grad_norm_(problem.params, problem.max_norm)
        optimizer.step()

    return step


def grad_scale_trick(problem: Problem, optimizer: Any, shrink: Callable[[list[Tensor]], None]) -> Step:
    """torch's fused step divides by ``grad_scale`` in passing: a clip without a pass that writes the gradients."""
    optimizer.found_inf = torch.zeros((), device=problem.params[0].device)

    def step() -> None:
        norm = get_total_norm([param.grad for param in problem.params if param.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / problem.max_norm).clamp_(min=1.0).float()
        optimizer.step()
        shrink(problem.params)

    return step


def compiled_by_hand(problem: Problem, optimizer: torch.optim.Optimizer) -> Step:
    return torch.compile(by_hand(problem, optimizer, shrink_copy), fullgraph=False)


# -- other libraries: name -> how to make one, and whether it runs on a CPU or a GPU


def _import(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


OTHERS: dict[str, tuple[str, Callable[[list[Tensor]], Any]]] = {
    "DeepSpeed CPUAdam": (
        "cpu",
        lambda params: _import("deepspeed.ops.adam", "DeepSpeedCPUAdam")(params, lr=LR, weight_decay=DECAY),
    ),
    "torchao AdamW8bit": (
        "cpu",
        lambda params: _import("torchao.optim", "AdamW8bit")(params, lr=LR, weight_decay=DECAY),
    ),
    "Apex FusedAdam": (
        "cuda",
        lambda params: _import("apex.optimizers", "FusedAdam")(params, lr=LR, weight_decay=DECAY),
    ),
    "Transformer Engine FusedAdam": (
        "cuda",
        lambda params: _import("transformer_engine.pytorch.optimizers", "FusedAdam")(params, lr=LR, weight_decay=DECAY),
    ),
}


def others(device: str) -> tuple[list[str], dict[str, str]]:
    """The names of those that work on this device, and why the others do not: each takes a step to show it."""
    working, missing = [], {}
    for name, (runs_on, make) in OTHERS.items():
        if runs_on != device:
            continue
        try:
            param = torch.ones(64, 64, device=device, requires_grad=True)
            param.grad = torch.ones_like(param)
            make([param]).step()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            working.append(name)
    return working, missing


# -- all of them

PLAIN = "torch, fused"
OURS = {
    "nothing on": {"weight_decay": 0.0},
    "decay, l1, l2": {"weight_decay": DECAY, "l1": L1, "l2": L2},
    "decay, l1, l2, clip": {"weight_decay": DECAY, "l1": L1, "l2": L2, "clip": True},
}


def twin(rule: Rule, params: list[Tensor], weight_decay: float = DECAY, **options: Any) -> torch.optim.Optimizer:
    knows_decay = "weight_decay" in inspect.signature(rule.twin).parameters
    decay = {"weight_decay": weight_decay} if knows_decay else {}
    return rule.twin(params, lr=LR, **decay, **rule.options, **options)


def our_optimizer(
    rule: Rule, params: list[Tensor], max_norm: float, backend: str, *, clip: bool = False, **options: Any
) -> fusedreg.FusedRegOptimizer:
    # By name, not "auto": it must raise rather than time the reference.
    options = known(rule.ours, max_grad_norm=max_norm if clip else None, **rule.options, **options)
    return rule.ours(params, lr=LR, backend=backend, **options)


def our_contenders(rule: Rule, problem: Problem, backend: str) -> list[Contender]:
    return [
        Contender(
            f"fusedreg {backend}: {name}",
            our_optimizer(rule, problem.params, problem.max_norm, backend, **options).step,
            "clip" in options,
        )
        for name, options in OURS.items()
    ]


def the_best_two(rule: Rule, problem: Problem) -> list[Contender]:
    """What counts: the plain step, and the best that a user could write."""
    params = problem.params
    shrink = SHRINKS[fastest_shrink(params)]
    return [
        Contender(PLAIN, twin(rule, params, **rule.best).step, clips=False),
        Contender(
            "by hand: clip, fused, shrink", by_hand(problem, twin(rule, params, DECAY + L2, **rule.best), shrink), True
        ),
    ]


def all_peers(rule: Rule, problem: Problem, other_libraries: list[str], compile: bool) -> list[Contender]:
    params = problem.params
    shrink = SHRINKS[fastest_shrink(params)]

    def fused() -> torch.optim.Optimizer:
        return twin(rule, params, DECAY + L2, **rule.best)

    found = [
        *the_best_two(rule, problem),
        Contender("torch, for-loop", twin(rule, params, foreach=False).step, False),
        Contender("torch, foreach", twin(rule, params, foreach=True).step, False),
        Contender("L1 in the loss, clip, fused", penalty_in_the_loss(problem, fused()), True),
        Contender("by hand: grad_scale trick, shrink", grad_scale_trick(problem, fused(), shrink), True),
    ]
    if compile:
        found.append(
            Contender(
                "torch.compile of clip, foreach, shrink",
                compiled_by_hand(problem, twin(rule, params, foreach=True)),
                True,
            )
        )
    for name in other_libraries:
        found.append(Contender(name, OTHERS[name][1](params).step, False))
    return found
