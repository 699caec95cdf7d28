"""A rule that fusedreg does not have, declared as any other and put into the registry: a plugin for pytest.

    python -m pytest -p toy_rule -k Toy

Gradient descent with a learning rate that falls as a power of t: a step count, no tensor state, no metric, an option
that it checks itself, and a twin written by hand. Nothing of it is in the kernels, so that the reference takes its
steps.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from fusedreg.optimizer import FusedRegOptimizer
from fusedreg.penalties import Option
from fusedreg.rules.registry import OPTIMIZERS
from fusedreg.rules.spec import Hyperparameter, RuleSpec, ScalarState, Step


class Toy(Optimizer):
    def __init__(self, params, lr=1e-2, weight_decay=0, power=0.5, *, maximize=False, differentiable=False) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        options = dict(lr=lr, weight_decay=weight_decay, power=power, maximize=maximize, differentiable=differentiable)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
                    g = (-param.grad if group["maximize"] else param.grad) + group["weight_decay"] * param
                    param.sub_(group["lr"] * g / state["step"].item() ** group["power"])
        return loss


def toy(w, g, state, scalars, group) -> Step:
    t = scalars.after["step"]
    lr = group["lr"] / t ** group["power"]
    return Step(w - lr * g, {}, tau=lr)


POWER = Option(
    "power",
    0.5,
    "float",
    "the learning rate falls as ``1 / t ** power``. Default: 0.5.",
    "a number in [0, 1]",
    lambda value: 0 <= value <= 1,
)


class FusedRegToy(FusedRegOptimizer, Toy):
    """The rule of tests/toy."""

    spec = RuleSpec(
        "toy",
        toy,
        states=(),
        scalar_states=(ScalarState("step"),),
        hyperparameters=(Hyperparameter("power", option=POWER),),
        twin=Toy,
        variants={"plain": {}, "maximize": {"maximize": True}},
    )

    def __init__(
        self, params, lr=1e-2, weight_decay=0, power=0.5, *, maximize=False, differentiable=False, **regularizers
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(params, lr, weight_decay, power, maximize=maximize, differentiable=differentiable)


OPTIMIZERS.append(FusedRegToy)
