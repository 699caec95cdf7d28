"""Callbacks for Lightning: ``lightning``, or ``pytorch_lightning`` where that was imported or is all there is."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from ..sparsity.schedule import SparsitySchedule
from .measured import measured, must_be_ours, ours_in

if (
    TYPE_CHECKING
    or "lightning.pytorch" in sys.modules
    or ("pytorch_lightning" not in sys.modules and importlib.util.find_spec("lightning") is not None)
):
    from lightning.pytorch import Callback
else:
    from pytorch_lightning import Callback


class LogCallback(Callback):
    """Logs ``fusedreg/zeros``, ``fusedreg/penalty`` and, where ``max_grad_norm`` is set, ``fusedreg/grad_norm``, every
    ``log_every_n_steps`` of the Trainer.

    With several optimizers of fusedreg's their numbers stand behind the prefix: ``fusedreg/1/zeros``. Other optimizers
    are passed over.
    """

    def __init__(self) -> None:
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        every = trainer.log_every_n_steps
        if trainer.global_step == self._last_step or every == 0 or (batch_idx + 1) % every != 0:
            return  # no step behind this batch, as gradients are accumulated
        self._last_step = trainer.global_step
        ours = [each for each in map(ours_in, trainer.optimizers) if each is not None]
        for i, optimizer in enumerate(ours):
            pl_module.log_dict(measured(optimizer, "fusedreg/" if len(ours) == 1 else f"fusedreg/{i}/"))


class SparsityCallback(Callback):
    """``fusedreg.SparsitySchedule`` over the Trainer's own number of steps; Lightning's checkpoints keep its place.

    Args:
        optimizer: the index of the optimizer, of those that ``configure_optimizers`` has returned.
        begin, end, every: as ``SparsitySchedule`` has them.

    Raises:
        TypeError: when training begins, and the optimizer is not one of fusedreg's.
        ValueError: likewise, and no group has a ``sparsity``, or a value is not allowed; the Trainer has no end.
    """

    def __init__(self, optimizer: int = 0, *, begin: float = 0.1, end: float = 0.75, every: int = 10) -> None:
        self._optimizer = optimizer
        self._options = {"begin": begin, "end": end, "every": every}
        self._trainers_step = 0
        self._last_step = 0
        self.schedule: SparsitySchedule | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("SparsityCallback needs a Trainer with an end (allowed: max_steps or max_epochs)")
        optimizer = must_be_ours(trainer.optimizers[self._optimizer])
        self.schedule = SparsitySchedule(optimizer, int(total), **self._options)  # type: ignore[arg-type]
        self.schedule.last_step = self._last_step
        self._trainers_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self._trainers_step:  # more than one further, with several optimizers
            self._trainers_step = trainer.global_step
            assert self.schedule is not None
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step if self.schedule is None else self.schedule.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]
