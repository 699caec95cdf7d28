"""Accelerate: accumulation, its clip, lower precision, and a state that is saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from twin_runs import assert_same, assert_same_bits, every_twin, make_data, make_model, mean_loss

import fusedreg

accelerate = pytest.importorskip("accelerate")


class Run:
    def __init__(self, cls: Any, options: dict[str, Any], clip: float | None = None, **arguments: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(True)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **arguments)
        model = make_model()
        optimizer = cls(model.parameters(), **options)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
        loader = torch.utils.data.DataLoader(make_data(), batch_size=8)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.clip = clip
        self.norms: list[float] = []

    def epoch(self) -> Run:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(mean_loss(self.model(x), y))
                if self.clip is not None and self.accelerator.sync_gradients:
                    self.norms.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self


@every_twin
@pytest.mark.parametrize("arguments", [{}, {"mixed_precision": "bf16"}], ids=["fp32", "bf16"])
def test_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any], arguments: dict[str, Any]) -> None:
    runs = [Run(cls, options, clip=0.5, **arguments).epoch() for cls in (ours, theirs)]
    assert_same(*(run.model for run in runs))


def test_our_clip_is_theirs() -> None:
    options = {"lr": 0.05, "momentum": 0.9}
    theirs = Run(torch.optim.SGD, options, clip=0.1).epoch()
    ours = Run(fusedreg.FusedRegSGD, {**options, "max_grad_norm": 0.1}).epoch()
    assert_same(ours.model, theirs.model)
    assert float(ours.optimizer.optimizer.grad_norm) == pytest.approx(theirs.norms[-1], rel=1e-4)


def test_resumes_exactly(tmp_path: Path) -> None:
    options = {"lr": 1e-2, "l1": 0.02, "max_grad_norm": 1.0}
    whole = Run(fusedreg.FusedRegAdamW, options).epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    resumed = Run(fusedreg.FusedRegAdamW, {"lr": 0.5})
    with torch.no_grad():
        for module in resumed.model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    resumed.accelerator.load_state(str(tmp_path))
    assert_same_bits(resumed.epoch().model, whole.model)
