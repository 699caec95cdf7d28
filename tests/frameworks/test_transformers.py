"""Hugging Face's Trainer, with the optimizer handed over, and with its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twin_runs import SPARING, assert_same, assert_same_bits, every_twin, make_data, make_model, mean_loss, zeros_of

import fusedreg

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": mean_loss(logits, labels), "logits": logits}


def trained(
    tmp_path: Path,
    cls: Any,
    options: dict[str, Any],
    way: str = "class",
    resume: bool = False,
    callbacks: list[Any] | None = None,
    **arguments: Any,
) -> Any:
    model = Model()
    own = {"optimizer_cls_and_kwargs": (cls, options)}
    if way == "object":
        own = {"optimizers": (cls(model.parameters(), **options), None)}
    defaults = {"max_steps": 8, "save_strategy": "no", "max_grad_norm": 0.0, "logging_steps": 1}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=8,
            **{**defaults, **arguments},
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in make_data()],
        callbacks=callbacks,
        **own,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@every_twin
@pytest.mark.parametrize("way", ["object", "class"])
def test_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any], way: str, tmp_path: Path) -> None:
    runs = [trained(tmp_path, cls, options, way, gradient_accumulation_steps=2) for cls in (ours, theirs)]
    assert_same(*(run.model.net for run in runs))


def test_our_clip_is_theirs(tmp_path: Path) -> None:
    options = {"lr": 0.05, "momentum": 0.9}
    ours = trained(tmp_path, fusedreg.FusedRegSGD, {**options, "max_grad_norm": 0.1})
    theirs = trained(tmp_path, torch.optim.SGD, options, max_grad_norm=0.1)
    assert_same(ours.model.net, theirs.model.net)


def test_trains_in_bfloat16_as_the_twin(tmp_path: Path) -> None:
    runs = [trained(tmp_path, cls, {"lr": 1e-2}, bf16=True) for cls in (fusedreg.FusedRegAdamW, torch.optim.AdamW)]
    assert_same(*(run.model.net for run in runs))


@pytest.mark.parametrize("way", ["object", "class"])
def test_resumes_exactly(way: str, tmp_path: Path) -> None:
    options = {"lr": 1e-2, "l1": 0.02, "max_grad_norm": 1.0}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path, fusedreg.FusedRegAdamW, options, way, **saving)
    (tmp_path / "checkpoint-8").rename(tmp_path / "last")
    resumed = trained(tmp_path, fusedreg.FusedRegAdamW, options, way, resume=True, **saving)
    assert_same_bits(whole.model, resumed.model)
    assert resumed.state.global_step == 8


def test_strengths_spare_what_is_small(tmp_path: Path) -> None:
    trainer = trained(tmp_path, fusedreg.FusedRegAdamW, {"lr": 1e-2, **SPARING}, max_steps=20)
    assert zeros_of(trainer.model)[True] > 20
    assert zeros_of(trainer.model)[False] == 0
    groups = trainer.optimizer.param_groups
    assert len(groups) == 2  # with decay, and without
    assert {group["regularize_min_ndim"] for group in groups} == {2}


@pytest.mark.parametrize("cls", [fusedreg.FusedRegAdamW, torch.optim.AdamW])
def test_log_callback(cls: Any, tmp_path: Path) -> None:
    from fusedreg.integrations.transformers import LogCallback

    class Reporter(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    is_ours = cls is fusedreg.FusedRegAdamW
    options = {"lr": 1e-2, **({"max_grad_norm": float("inf"), **SPARING} if is_ours else {})}
    reporter = Reporter()
    trainer = trained(tmp_path, cls, options, callbacks=[LogCallback(), reporter], max_steps=12)
    history = [each for each in trainer.state.log_history if "loss" in each]
    keys = {"fusedreg/zeros", "fusedreg/penalty", "fusedreg/grad_norm"}
    for logs in (*history, *(each for each in reporter.seen if "loss" in each)):
        assert keys & set(logs) == (keys if is_ours else set())
        if is_ours:
            assert logs["fusedreg/grad_norm"] == pytest.approx(logs["grad_norm"], rel=1e-4)
    if is_ours:
        ours = trainer.optimizer.optimizer
        assert history[-1]["fusedreg/penalty"] == pytest.approx(float(fusedreg.penalty(ours)))
        assert history[-1]["fusedreg/zeros"] == fusedreg.sparsity_report(trainer.model).fraction > 0
    LogCallback().add_to(trainer)
    assert isinstance(trainer.callback_handler.callbacks[0], LogCallback)


def test_sparsity_callback_and_its_resumption(tmp_path: Path) -> None:
    from fusedreg.integrations.transformers import SparsityCallback

    options = {"lr": 1e-2, "sparsity": 0.5, "regularize_min_ndim": 2}
    arguments = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}

    def run(resume: bool) -> Any:
        callbacks = [SparsityCallback(begin=0.2, end=0.8, every=2)]
        return trained(tmp_path, fusedreg.FusedRegAdamW, options, resume=resume, callbacks=callbacks, **arguments)

    whole = run(False)
    assert zeros_of(whole.model) == {True: (10 * 16 + 16 * 2) // 2, False: 0}
    (tmp_path / "checkpoint-20").rename(tmp_path / "last")
    assert_same_bits(whole.model, run(True).model)
    with pytest.raises(TypeError, match="Invalid optimizer"):
        trained(tmp_path, torch.optim.AdamW, {}, callbacks=[SparsityCallback()])
