"""No time is taken of a wrong result: every setting is checked against the reference in float64 before it is timed."""

from __future__ import annotations

import math

import torch
from cases import Problem, Shape
from peers import OURS, Rule, our_optimizer
from torch import Tensor

STEPS = 3
# Relative to the largest element: beside a threshold, a correct result may be as close to zero as it likes.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Of lengths that no vector width and no chunk divides, and one that is longer than a chunk.
SHAPES: list[Shape] = [(125, 501), (64, 64), (50,), (33, 7), ()]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Infinite where either has a NaN."""
    error = float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def after_steps(rule: Rule, dtype: torch.dtype, backend: str, device: str, options: dict) -> dict[str, Tensor]:
    """Weights and states after some steps, each kind in one vector. Gradients are rounded to ``dtype`` before."""
    problem = Problem.random(SHAPES)
    work = torch.float64 if backend == "reference" else dtype
    generator = torch.Generator().manual_seed(1)
    signs = [param.detach().sign() for param in problem.params]
    params = [param.detach().to(dtype).to(device, work).requires_grad_() for param in problem.params]
    # L1 so strong that it makes zeros within these few steps, or the check would not see an error in it.
    options = {**options, "l1": 0.05} if "l1" in options else options
    optimizer = our_optimizer(rule, params, problem.max_norm, backend, **options)
    for _ in range(STEPS):
        for param, sign in zip(params, signs, strict=True):
            # Away from zero, and with its weight's sign, so that no decay cancels it: a step that is divided by the
            # size of what is left would be a matter of rounding, in the reference too.
            gradient = 1e-3 * sign * (1 + torch.empty(param.shape).normal_(generator=generator).abs())
            param.grad = gradient.to(dtype).to(device, work)
        optimizer.step()
    kinds = {"weights": list(params)}
    for param in params:
        for name, value in optimizer.state[param].items():
            kinds.setdefault(name, []).append(value)
    return {kind: torch.cat([each.detach().cpu().reshape(-1).double() for each in its]) for kind, its in kinds.items()}


def failures(rule_name: str, rule: Rule, dtype: torch.dtype, backend: str, device: str) -> list[str]:
    """What is wrong with a backend under any of the settings that are timed."""
    found = []
    for name, options in OURS.items():
        ours = after_steps(rule, dtype, backend, device, options)
        theirs = after_steps(rule, dtype, "reference", "cpu", options)
        error = max(relative_error(ours[kind], truth) for kind, truth in theirs.items())
        where = f"{backend}, {rule_name}, {dtype}, {name}"
        if not error <= TOLERANCE[dtype]:
            found.append(f"{where}: {error:.1e} away from the reference (allowed: {TOLERANCE[dtype]:.0e})")
        elif "l1" in options and not bool((ours["weights"] == 0).any()):
            found.append(f"{where}: L1 made no zero, so this check would not see an error in it")
    return found
