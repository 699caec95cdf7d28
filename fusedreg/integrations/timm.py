"""Gives timm our optimizers, when it is imported: ``create_optimizer_v2(model, "fusedregadamw", l1=1e-5)``.

The names are the classes', without capitals: timm splits names at "_". What timm's own entry for a twin says, as that
SGD has Nesterov's momentum, ours says too. Rprop, which has no ``weight_decay``, is not among them: timm gives one to
every optimizer.
"""

from __future__ import annotations

import inspect

from timm.optim import OptimInfo, list_optimizers
from timm.optim._optim_factory import default_registry

from ..optimizer import FusedRegOptimizer
from ..rules.registry import OPTIMIZERS


def _info(cls: type[FusedRegOptimizer]) -> OptimInfo:
    known = inspect.signature(cls).parameters
    twin = cls.spec.twin
    name = twin.__name__.lower() if twin is not None else ""
    theirs = default_registry.get_optimizer_info(name) if name in list_optimizers() else None
    return OptimInfo(
        name=cls.__name__.lower(),
        opt_class=cls,
        description=f"fusedreg.{cls.__name__}",
        has_eps="eps" in known,
        has_momentum="momentum" in known,
        has_betas="betas" in known,
        defaults=theirs.defaults if theirs is not None and theirs.opt_class is twin else None,
    )


for _cls in OPTIMIZERS:
    if "weight_decay" in inspect.signature(_cls).parameters:
        default_registry.register(_info(_cls))
