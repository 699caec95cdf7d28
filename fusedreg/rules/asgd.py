"""FusedRegASGD: torch.optim.ASGD with the regularizers in its update pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..optimizer import FusedRegOptimizer
from ..penalties import Regularizers
from ..penalties.spec import on_host
from .spec import AsStored, Group, Hyperparameter, RuleSpec, Scalar, Scalars, ScalarState, Step, TensorState


# torch makes both in its default dtype, as the count of steps is, also where they are stored in a wider one.
def next_eta(scalars: Mapping[str, Scalar], group: Group, as_stored: AsStored) -> Scalar:
    lr, t = group["lr"], scalars["step"] + 1
    base = 1 + group["lambd"] * lr * t
    if isinstance(base, Tensor):
        eta = lr / base ** group["alpha"]
    else:  # a power of a negative number is a NaN
        eta = (lr / torch.tensor(base, dtype=torch.float64, device="cpu") ** group["alpha"]).item()
    return as_stored("step", eta)


def next_mu(scalars: Mapping[str, Scalar], group: Group, as_stored: AsStored) -> Scalar:
    steps_averaged = scalars["step"] + 1 - group["t0"]
    if isinstance(steps_averaged, Tensor):
        return as_stored("step", 1 / steps_averaged.clamp(min=1))
    return as_stored("step", 1 / max(1.0, steps_averaged))


def asgd(w: Tensor, g: Tensor, state: Mapping[str, Tensor], scalars: Scalars, group: Group) -> Step:
    """Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992."""
    eta, mu, ax = scalars.before["eta"], scalars.before["mu"], state["ax"]

    def average(w: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"ax": w if not isinstance(mu, Tensor) and mu == 1 else ax + mu * (w - ax)}

    return Step(w * (1 - group["lambd"] * eta) - eta * g, {}, tau=eta, finish=average)


class FusedRegASGD(FusedRegOptimizer, torch.optim.ASGD):
    """
    The prox's step size is the step's own, ``eta``. ``lambd``, whose default is 1e-4, is a decay that adds to ``l2``:
    with ``penalty_mode="proximal"`` it ends at the minimiser for ``l2 + lambd``. ``ax``, the average, is one of weights
    as they are after the penalties. It has exact zeros where no averaged step had another number.

    The rule is that of Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM Journal on
    Control and Optimization 30, 1992.
    """

    spec = RuleSpec(
        "asgd",
        asgd,
        states=(TensorState("ax", why_no_codes="the average is the weights that it is used for"),),
        scalar_states=(
            ScalarState("step", is_beside=True),
            ScalarState("eta", initial=lambda group: on_host(group["lr"]), next=next_eta, is_beside=True),
            ScalarState("mu", initial=lambda group: 1.0, next=next_mu, is_beside=True),
        ),
        hyperparameters=(Hyperparameter("lambd"), Hyperparameter("alpha"), Hyperparameter("t0")),
        twin=torch.optim.ASGD,
        why_no_units="its average is taken before them",
        variants={
            "plain": {},
            "averaged": {"lambd": 0.3, "alpha": 0.6, "t0": 2.0},
            "maximize": {"maximize": True, "t0": 0.0, "lambd": 0.0},
        },
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **regularizers: Unpack[Regularizers],
    ) -> None:
        self._set_regularizers(regularizers)
        super().__init__(
            params,
            lr,
            lambd,
            alpha,
            t0,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
