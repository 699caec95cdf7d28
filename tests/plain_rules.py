"""Rules that torch.optim does not have, as plain PyTorch, by their papers: what stands in for a twin in the suites."""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable


def number(value):
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def sign(x):
    return torch.where(x.isnan(), x, x.sign())  # torch.sign makes a zero of a NaN


class Plain(Optimizer):
    """A loop over the parameters."""

    @_use_grad_for_differentiable
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
                state, w, g = self.state[param], param, param.grad
                self.begin(state, param, group)
                tensors = dict(state)
                if param.is_complex():
                    w, g = torch.view_as_real(w), torch.view_as_real(g)
                    tensors = {name: torch.view_as_real(tensor) for name, tensor in state.items()}
                self.move(w, -g if group["maximize"] else g, tensors, group)
        return loss


class Lion(Plain):
    """Chen et al., https://arxiv.org/abs/2302.06675, algorithm 2."""

    def __init__(
        self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0, *, maximize=False, differentiable=False
    ) -> None:
        options = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, differentiable=differentiable)
        super().__init__(params, {**options, "decoupled_weight_decay": True})

    def begin(self, state, param, group) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def move(self, w, g, state, group) -> None:
        lr, (beta1, beta2) = number(group["lr"]), map(number, group["betas"])
        m = state["exp_avg"].clone()
        w.mul_(1 - lr * number(group["weight_decay"])).sub_(lr * sign(beta1 * m + (1 - beta1) * g))
        state["exp_avg"].mul_(beta2).add_((1 - beta2) * g)


class FTRL(Plain):
    """Without penalties its closed form is gradient descent, per coordinate: McMahan, AISTATS 2011."""

    def __init__(
        self,
        params,
        lr=0.1,
        beta=1.0,
        initial_accumulator_value=0.0,
        weight_decay=0,
        *,
        maximize=False,
        differentiable=False,
    ) -> None:
        options = dict(lr=lr, beta=beta, initial_accumulator_value=initial_accumulator_value)
        super().__init__(
            params, {**options, "weight_decay": weight_decay, "maximize": maximize, "differentiable": differentiable}
        )

    def begin(self, state, param, group) -> None:
        if not state:
            state["held_back"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["sum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            value = group["initial_accumulator_value"]
            (torch.view_as_real(state["sum"]) if param.is_complex() else state["sum"]).fill_(value)

    def move(self, w, g, state, group) -> None:
        g = g + number(group["weight_decay"]) * w
        state["sum"].add_(g * g)
        w.sub_(number(group["lr"]) * g / (number(group["beta"]) + state["sum"].clone().sqrt()))


PLAIN = {"ftrl": FTRL, "lion": Lion}
