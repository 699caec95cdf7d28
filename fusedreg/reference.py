"""One step, straight from the formulas, in plain PyTorch: the oracle that the fast backends are tested against.

The stages and their symbols are those of docs/formulas.md. Nothing here is shared with the compiled code. Tensors come
in the arithmetic dtype (float32, float64 for float64 parameters); every function returns new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
Scalar = Any  # a float, or a 0-dim tensor where autograd or a CUDA graph must see it


class Step(NamedTuple):
    """What a rule returns: the moved weight, its new state, its new clock, and the prox's step size ``tau * d``."""

    w: Tensor
    state: dict[str, Tensor]
    clock: Scalar
    metric: Tensor | None  # d, element by element, for an adaptive rule
    tau: Scalar  # lr for an adaptive rule (to be divided by d), lr * s_t for SGD


def soft_threshold(z: Tensor, t: Scalar) -> Tensor:
    """``sign(z) * max(|z| - t, 0)``; its zeros are +0.0 and a NaN stays NaN."""
    return torch.where(z.abs() <= t, torch.zeros_like(z), z - t * z.sign())


def clip_gradient_value(g: Tensor, group: Group, inv_grad_scale: Scalar) -> Tensor:
    """Stages 1 and 2: AMP's unscaling, ``maximize``, value clip. The norm is taken over the result."""
    g = g * inv_grad_scale
    if group["maximize"]:
        g = -g
    if group["clip_value"] is not None:
        bound = float(group["clip_value"])
        if bound <= torch.finfo(g.dtype).max:  # clamp refuses a larger one
            g = g.clamp(-bound, bound)
    return g


def clip_coefficient(norm: Tensor, max_grad_norm: Scalar) -> Tensor:
    """Stage 3's factor, as ``torch.nn.utils.clip_grad_norm_`` defines it."""
    return torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)


def add_penalty_gradients(g: Tensor, w: Tensor, group: Group) -> Tensor:
    """Stage 4, coupled: weight decay of Adam and SGD, and both penalties where l1_mode is "subgradient"."""
    if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False):
        g = g + group["weight_decay"] * w
    if group["l1_mode"] == "subgradient":
        if group["l1"] != 0:
            g = g + group["l1"] * w.sign()
        if group["l2"] != 0:
            g = g + group["l2"] * w
    return g


def adam(w: Tensor, g: Tensor, state: Mapping[str, Tensor], clock: Scalar, group: Group) -> Step:
    """Stage 5 of Adam and AdamW. ``clock`` is the number of steps so far."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    t = clock + 1
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * g
    exp_avg_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    new_state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    second_moment = exp_avg_sq
    if group["amsgrad"]:
        second_moment = new_state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq)
    m_hat = exp_avg / (1 - beta1**t)
    d = second_moment.sqrt() / (1 - beta2**t) ** 0.5 + group["eps"]
    return Step(w - lr * m_hat / d, new_state, t, metric=d, tau=lr)


def sgd(w: Tensor, g: Tensor, state: Mapping[str, Tensor], clock: Scalar, group: Group) -> Step:
    """Stage 5 of SGD. ``clock`` is s_(t-1): 0 before the first step, NaN where it was not counted."""
    lr, momentum, dampening = group["lr"], group["momentum"], group["dampening"]
    if momentum == 0:
        return Step(w - lr * g, {}, clock, metric=None, tau=lr)
    if clock == 0:
        buffer, s = g, 1.0
    else:
        buffer = momentum * state["momentum_buffer"] + (1 - dampening) * g
        s = momentum * clock + (1 - dampening)
        if clock != clock:
            s = (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0
        s = s or 5e-324  # 0 means that no step was taken yet
    # With dampening above 1 the gain can be negative; a prox has no negative step size.
    if group["nesterov"]:
        tau = lr * max(1 + momentum * s, 0.0)
        return Step(w - lr * (g + momentum * buffer), {"momentum_buffer": buffer}, s, None, tau)
    return Step(w - lr * buffer, {"momentum_buffer": buffer}, s, None, lr * max(s, 0.0))


def prox(z: Tensor, w_old: Tensor, step: Step, group: Group) -> Tensor:
    """Stage 6: ``soft(z, tau * l1) / (1 + tau * l2)`` in the metric of the step."""
    l1, l2 = group["l1"], group["l2"]
    moves_nothing = not isinstance(group["lr"], Tensor) and group["lr"] == 0
    if moves_nothing or (l1 == 0 and l2 == 0) or group["l1_mode"] == "subgradient":
        return z
    if group["l1_mode"] == "decoupled":
        tau = group["lr"]
    elif step.metric is None:
        tau = step.tau
    else:
        tau = step.tau / torch.maximum(step.metric, (l1 + l2 * w_old.abs()) / 2)
    return soft_threshold(z, tau * l1) / (1 + tau * l2)


RULES: dict[str, Callable[[Tensor, Tensor, Mapping[str, Tensor], Scalar, Group], Step]] = {
    "adam": adam,
    "sgd": sgd,
}


def update(
    rule: str,
    w: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    clock: Scalar,
    group: Group,
    inv_grad_scale: Scalar,
    clip_coef: Scalar,
) -> Step:
    """Stages 1 to 6 for one parameter."""
    g = clip_gradient_value(g, group, inv_grad_scale) * clip_coef
    g = add_penalty_gradients(g, w, group)
    if group.get("decoupled_weight_decay", False):
        step = RULES[rule](w * (1 - group["lr"] * group["weight_decay"]), g, state, clock, group)
    else:
        step = RULES[rule](w, g, state, clock, group)
    return step._replace(w=prox(step.w, w, step, group))
