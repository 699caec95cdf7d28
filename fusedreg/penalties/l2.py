"""The L2 penalty, ``l2 / 2 * sum w^2``, in the same metric as the L1 penalty: the elastic net's other half."""

from __future__ import annotations

from .spec import Penalty, strength

L2 = Penalty(
    strength("l2", "strength of the penalty ``l2 / 2 * sum w^2``, >= 0. Default: 0."),
    prox=lambda x, problem: x / (1 + problem.kappa * problem.group["l2"]),
    value=lambda w, group: group["l2"] / 2 * w * w,  # w * w alone may underflow
    subdifferential=lambda w, group: (group["l2"] * w, group["l2"] * w),
    gradient=lambda w, group: group["l2"] * w,
    takes_complex=True,
)
