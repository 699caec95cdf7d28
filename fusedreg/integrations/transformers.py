"""Callbacks for Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..sparsity.schedule import SparsitySchedule
from .measured import measured, must_be_ours, ours_in


class LogCallback(TrainerCallback):
    """Adds ``fusedreg/zeros``, ``fusedreg/penalty`` and, where ``max_grad_norm`` is set, ``fusedreg/grad_norm`` to what
    the Trainer logs of the training.

    ``Trainer(callbacks=[LogCallback()])`` shows them in ``trainer.state.log_history`` and on the screen.
    ``LogCallback().add_to(trainer)`` puts it before all others, so that reporters (TensorBoard, W&B) have them too.
    With another optimizer it adds nothing.
    """

    def add_to(self, trainer: Trainer) -> LogCallback:
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        ours = ours_in(optimizer)
        if logs is None or "loss" not in logs or ours is None:
            return
        values = measured(ours)
        logs.update(values)
        state.log_history[-1].update(values)


class SparsityCallback(TrainerCallback):
    """``fusedreg.SparsitySchedule`` over the Trainer's own number of steps; a resumed training goes on where it stood.

    Args:
        begin, end, every: as ``SparsitySchedule`` has them.

    Raises:
        TypeError: when training begins, and the optimizer is not one of fusedreg's.
        ValueError: likewise, and no group has a ``sparsity``, or a value is not allowed.
    """

    def __init__(self, begin: float = 0.1, end: float = 0.75, every: int = 10) -> None:
        self._options = {"begin": begin, "end": end, "every": every}
        self.schedule: SparsitySchedule | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.schedule = SparsitySchedule(must_be_ours(optimizer), state.max_steps, **self._options)  # type: ignore[arg-type]
        self.schedule.last_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.schedule is not None
        self.schedule.step()
