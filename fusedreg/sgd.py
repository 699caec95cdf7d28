"""FusedRegSGD: torch.optim.SGD with L1, L2 and clipping in its update pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import REGULARIZER_DOC, FusedRegOptimizer, scalar


class FusedRegSGD(FusedRegOptimizer, torch.optim.SGD):
    rule = "sgd"
    state_names = ("momentum_buffer",)
    scalars = ("momentum", "dampening", "nesterov")
    group_keys = ("lr", "weight_decay", "maximize", *scalars)

    _gains: dict[Tensor, Tensor] = {}  # noqa: RUF012
    """Each parameter's gain, a view of its place in its group's ``momentum_gain``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        l1_mode: str = "proximal",
        clip_value: float | None = None,
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        self._set_regularizers(
            backend, l1=l1, l2=l2, l1_mode=l1_mode, clip_value=clip_value, max_grad_norm=max_grad_norm
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    @classmethod
    def states_of(cls, group: dict[str, Any]) -> tuple[str, ...]:
        return cls.state_names if group["momentum"] != 0 else ()

    @classmethod
    def rule_scalars(cls, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return float(scalar(group["momentum"])), float(group["dampening"]), float(group["nesterov"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_clocks()

    def _forget_clocks(self) -> None:
        self._gains = {}

    def align_clocks(self) -> None:
        """A gain goes with its parameter, wherever the user has moved that; by place only what was just loaded."""
        known, self._gains = self._gains, {p: gain for p, gain in self._gains.items() if p in self.state}
        for group in self.param_groups:
            params, saved = group["params"], group.get("momentum_gain")
            if not params or (saved is None and group["momentum"] == 0):
                continue
            # Beside the parameters where they are on one GPU, so that no step waits for it.
            devices = {param.device for param in params}
            on_one_gpu = len(devices) == 1 and params[0].is_cuda
            device = params[0].device if on_one_gpu else torch.device("cpu")
            if saved is None or len(saved) != len(params):
                # NaN for a buffer that is there already and that nobody counted: the rule takes the stationary gain.
                saved = torch.full((len(params),), math.nan, dtype=torch.float64, device=device)
            gains = [known.get(param, saved[i]).to(device) for i, param in enumerate(params)]
            group["momentum_gain"] = torch.stack(gains)
            self._gains.update(zip(params, group["momentum_gain"].unbind(), strict=True))

    def make_clock(self, group: dict[str, Any], position: int) -> Tensor | None:
        """The momentum's gain, which the prox needs (csrc/rules/sgd.h says why).

        torch's SGD counts nothing. The gains stand in the group, a float64 tensor with one for each parameter, so that
        the state of a parameter keeps the keys that torch's has.
        """
        if group["momentum"] == 0:
            return None
        gain = group["momentum_gain"][position]
        if self.state[group["params"][position]].get("momentum_buffer") is None:
            gain.zero_()
        return gain


FusedRegSGD.__doc__ = f"""torch.optim.SGD with L1, L2 and gradient clipping fused into its one update pass.

    A drop-in subclass: the same arguments in the same order, the same state dict; with every regularizer off, the same
    step. `foreach` and `fused` are accepted and kept, and change nothing. Sparse gradients are refused.
{REGULARIZER_DOC}
    With ``l1_mode="proximal"`` the prox's step size is ``lr`` times the momentum's gain, so that heavy-ball, damped and
    Nesterov momentum all end at the exact minimiser. The proximal gradient method is that of Parikh and Boyd, "Proximal
    Algorithms", https://web.stanford.edu/~boyd/papers/prox_algs.html.
    """
