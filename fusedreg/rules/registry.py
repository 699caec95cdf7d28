"""Every optimizer, once: what the suites, the tables and the commands walk."""

from __future__ import annotations

from ..optimizer import FusedRegOptimizer
from .adadelta import FusedRegAdadelta
from .adagrad import FusedRegAdagrad
from .adam import FusedRegAdam, FusedRegAdamW
from .adamax import FusedRegAdamax
from .asgd import FusedRegASGD
from .ftrl import FusedRegFTRL
from .lion import FusedRegLion
from .nadam import FusedRegNAdam
from .radam import FusedRegRAdam
from .rmsprop import FusedRegRMSprop
from .rprop import FusedRegRprop
from .sgd import FusedRegSGD

OPTIMIZERS: list[type[FusedRegOptimizer]] = [
    FusedRegAdam,
    FusedRegAdamW,
    FusedRegSGD,
    FusedRegRMSprop,
    FusedRegAdagrad,
    FusedRegNAdam,
    FusedRegRAdam,
    FusedRegAdamax,
    FusedRegAdadelta,
    FusedRegLion,
    FusedRegASGD,
    FusedRegRprop,
    FusedRegFTRL,
]
