"""The minimax concave penalty: an L1 penalty that fades with the weight, so that large ones are not shrunk.

Zhang, "Nearly unbiased variable selection under minimax concave penalty", https://arxiv.org/abs/1002.4734. Its prox,
the firm threshold, is that of Gao and Bruce, "WaveShrink with firm shrinkage", Statistica Sinica 7, 1997.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .box import LOWER, UPPER
from .l1 import L1, soft_threshold
from .l2 import L2
from .spec import Group, Option, Penalty, Prox, like


def minimax_concave(w: Tensor, group: Group) -> Tensor:
    l1, gamma = group["l1"], group["mcp_gamma"]
    size, height = w.abs(), like(w, gamma * l1 * l1 / 2)
    return torch.where(size / gamma > l1, height, l1 * size - size * (size / (2 * gamma)))


def gain(x: Tensor, problem: Prox) -> Tensor:
    """By how much the objective of stage 6, but for the L0 penalty, is lower at ``x`` than at 0."""
    z, kappa, _, group = problem
    return x * (2 * z - x) / (2 * kappa) - minimax_concave(x, group) - L2.value(x, group)


def _prox(x: Tensor, problem: Prox) -> Tensor:
    z, kappa, _, group = problem
    l1, gamma = group["l1"], group["mcp_gamma"]
    # The L2 penalty is one with the quadratic, of which it changes the place and the step size.
    shrink = 1 + kappa * group["l2"]
    y, step = z / shrink, kappa / shrink
    is_convex = torch.as_tensor(step < gamma)
    is_firm = is_convex & (y.abs() / gamma <= l1)
    x = torch.where(is_firm, soft_threshold(y, step * l1) / (1 - step / gamma), y)
    # Where the penalty is more concave than the quadratic is convex, nothing lies between 0 and y: it is the better of
    # the two, or of 0 and what the box leaves of y.
    is_worse = ~is_convex & (gain(UPPER.prox(LOWER.prox(x, problem), problem), problem) <= 0)
    return torch.where(is_worse & torch.as_tensor(l1 != 0), torch.zeros_like(x), x)


def _derivative(w: Tensor, group: Group) -> Tensor:
    """Of what is taken off the L1 penalty."""
    return -w.sign() * torch.minimum(w.abs() / group["mcp_gamma"], like(w, group["l1"]))


MCP_GAMMA = Penalty(
    Option(
        "mcp_gamma",
        math.inf,
        "float",
        """turns the L1 penalty into the minimax concave penalty, > 0: its pull fades from ``l1`` at 0 to nothing at
        ``abs(w) = mcp_gamma * l1``. Default: inf, which is L1.""",
        "a number > 0",
        lambda value: isinstance(value, (int, float)) and value > 0.0,
    ),
    prox=_prox,
    value=lambda w, group: minimax_concave(w, group) - L1.value(w, group),
    subdifferential=lambda w, group: (_derivative(w, group), _derivative(w, group)),
    needs_zero=True,
)
