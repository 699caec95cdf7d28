"""FusedRegAdam: torch.optim.Adam with L1, L2 and clipping in its update pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import REGULARIZER_DOC, FusedRegOptimizer, scalar


class AdamRule(FusedRegOptimizer):
    """What FusedRegAdam and FusedRegAdamW share: the rule "adam"."""

    rule = "adam"
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    scalars = ("beta1", "beta2", "eps", "amsgrad")
    group_keys = ("lr", "weight_decay", "maximize", "decoupled_weight_decay", "betas", "eps", "amsgrad")

    @classmethod
    def states_of(cls, group: dict[str, Any]) -> tuple[str, ...]:
        return cls.state_names if group["amsgrad"] else cls.state_names[:2]

    @classmethod
    def rule_scalars(cls, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return scalar(beta1), scalar(beta2), scalar(group["eps"]), float(group["amsgrad"])

    def make_clock(self, group: dict[str, Any], position: int) -> Tensor:
        """The step count, where torch keeps it: ``state["step"]``, on the CPU unless capturable, fused or under AMP."""
        param = group["params"][position]
        state = self.state[param]
        step = state.get("step")
        on_device = group["capturable"] or group["fused"] or self._clocks_on_device
        if step is None or not isinstance(step, Tensor) or step.dtype not in (torch.float32, torch.float64):
            default = torch.get_default_dtype()
            dtype = torch.float64 if default == torch.float64 and not group["fused"] else torch.float32
            count = 0.0 if step is None else float(step)
            if on_device:
                state["step"] = torch.full((), count, dtype=dtype, device=param.device)  # does not wait for the device
            else:
                state["step"] = torch.tensor(count, dtype=dtype, device="cpu")
        elif self.defaults["differentiable"] and step.requires_grad:
            raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
        elif on_device and step.device != param.device:
            state["step"] = step.to(param.device)
        return state["step"]


class FusedRegAdam(AdamRule, torch.optim.Adam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


FusedRegAdam.__doc__ = f"""torch.optim.Adam with L1, L2 and gradient clipping fused into its one update pass.

    A drop-in subclass: the same arguments in the same order, the same state dict; with every regularizer off, the same
    step. `foreach` and `fused` are accepted and kept, and change nothing.
{REGULARIZER_DOC}
    The rule is that of Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = FusedRegAdam(model.parameters(), lr=1e-3, l1=1e-4, max_grad_norm=1.0)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
    """
