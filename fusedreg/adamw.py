"""FusedRegAdamW: torch.optim.AdamW with L1, L2 and clipping in its update pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import AdamRule
from .optimizer import REGULARIZER_DOC


class FusedRegAdamW(AdamRule, torch.optim.AdamW):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


FusedRegAdamW.__doc__ = f"""torch.optim.AdamW with L1, L2 and gradient clipping fused into its one update pass.

    A drop-in subclass: the same arguments in the same order, the same state dict; with every regularizer off, the same
    step. `foreach` and `fused` are accepted and kept, and change nothing. Mind that AdamW's own default is
    ``weight_decay=0.01``, decoupled decay, which acts beside ``l1`` and ``l2``.
{REGULARIZER_DOC}
    The rule is that of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101.
    """
