"""FusedRegNAdam: torch.optim.NAdam with the regularizers in its update pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..codes import LINEAR, ROOTS
from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from .spec import AsStored, Group, Hyperparameter, RuleSpec, Scalar, Scalars, ScalarState, Step, TensorState


def momentum_at(t: Scalar, group: Group) -> Scalar:
    """mu_t: the momentum of step t, which grows to beta1."""
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))


def next_mu_product(scalars: Mapping[str, Scalar], group: Group, as_stored: AsStored) -> Scalar:
    # torch rounds the factor, too
    return scalars["mu_product"] * as_stored("mu_product", momentum_at(scalars["step"] + 1, group))


def over(a: Scalar, b: Scalar) -> Scalar:
    # A product that is rounded to 1: as the kernels have it, and not an error in the middle of an update.
    return a / b if isinstance(b, Tensor) or b != 0 else math.inf


def nadam_metric(state: Mapping[str, Tensor], scalars: Mapping[str, Scalar], group: Group) -> Tensor:
    return (state["exp_avg_sq"] / (1 - group["betas"][1] ** scalars["step"])).sqrt() + group["eps"]


def nadam(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Dozat, "Incorporating Nesterov Momentum into Adam", https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    t, mu_product = scalars.after["step"], scalars.after["mu_product"]
    mu, next_mu = momentum_at(t, group), momentum_at(t + 1, group)
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * g
    exp_avg_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    new_state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    d = nadam_metric(new_state, scalars.after, group)
    share_of_g, share_of_m = over(1 - mu, 1 - mu_product), over(next_mu, 1 - mu_product * next_mu)
    # A constant gradient g makes the average (1 - beta1^t) * g.
    tau = lr * (share_of_g + share_of_m * (1 - beta1**t))
    return Step(w - lr * (share_of_g * g + share_of_m * exp_avg) / d, new_state, tau, metric=d)


class FusedRegNAdam(FusedRegOptimizer, torch.optim.NAdam):
    """
    With ``penalty_mode="proximal"`` the prox's step size is what a step of this size moves a weight by under a constant
    gradient: ``lr`` times the shares of the gradient and of its average, over Adam's root of the second moment.

    The rule is that of Dozat, "Incorporating Nesterov Momentum into Adam",
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """

    spec = RuleSpec(
        "nadam",
        nadam,
        metric=nadam_metric,
        states=(TensorState("exp_avg", codes=LINEAR), TensorState("exp_avg_sq", codes=ROOTS)),
        scalar_states=(
            ScalarState("step"),
            ScalarState(
                "mu_product",
                initial=lambda group: 1.0,
                next=next_mu_product,
            ),
        ),
        hyperparameters=(
            Hyperparameter("betas", fields=("beta1", "beta2"), is_on_host=True),
            Hyperparameter("eps"),
            Hyperparameter("momentum_decay", is_on_host=True),
        ),
        twin=torch.optim.NAdam,
        variants={
            "plain": {},
            "decoupled": {"decoupled_weight_decay": True, "momentum_decay": 0.1, "betas": (0.8, 0.95)},
            "maximize": {"maximize": True},
        },
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
