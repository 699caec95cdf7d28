"""Lightning: automatic and manual optimization, its clip, the command line, a training that goes on; and Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from twin_runs import SPARING, assert_same, assert_same_bits, every_twin, make_data, make_model, mean_loss, zeros_of

import fusedreg

lightning = pytest.importorskip("lightning")
cli = pytest.importorskip("lightning.pytorch.cli")


class Module(lightning.LightningModule):
    """Without ``configure_optimizers``, which a command line adds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mean_loss(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(make_data(), batch_size=8)


class Automatic(Module):
    def __init__(self, cls: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.cls, self.options = cls, options

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(self.parameters(), **self.options)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)]


class Manual(Automatic):
    def __init__(self, cls: Any, options: dict[str, Any]) -> None:
        super().__init__(cls, options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trained(module: Module, tmp_path: Path, ckpt_path: str | None = None, **arguments: Any) -> Any:
    trainer = lightning.Trainer(**{**QUIET, "max_epochs": 1, "default_root_dir": tmp_path, **arguments})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@every_twin
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any], kind: Any, tmp_path: Path) -> None:
    modules = [kind(cls, options) for cls in (ours, theirs)]
    for module in modules:
        trained(module, tmp_path, **({"accumulate_grad_batches": 2} if kind is Automatic else {}))
    assert_same(*(module.net for module in modules))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_their_clip_with_the_twin_and_our_clip(precision: str, tmp_path: Path) -> None:
    options = {"lr": 0.05, "momentum": 0.9}
    twin, theirs = Automatic(torch.optim.SGD, options), Automatic(fusedreg.FusedRegSGD, options)
    ours = Automatic(fusedreg.FusedRegSGD, {**options, "max_grad_norm": 0.1})
    trained(twin, tmp_path, gradient_clip_val=0.1, precision=precision)
    trained(theirs, tmp_path, gradient_clip_val=0.1, precision=precision)
    trainer = trained(ours, tmp_path, precision=precision)
    assert_same(theirs.net, twin.net)
    assert_same(ours.net, twin.net)
    assert float(trainer.optimizers[0].grad_norm) > 0
    assert float(ours.optimizers().grad_norm) == float(trainer.optimizers[0].grad_norm)  # through their wrapper


AVERAGES = {
    "EMA": lambda: lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.8),
    "SWA": lambda: lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2),
}


@every_twin
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any], average: Any, tmp_path: Path) -> None:
    averaged, plain = (Automatic(cls, options) for cls in (ours, ours))
    twin = Automatic(theirs, options)
    for module in (averaged, twin):
        trained(module, tmp_path, callbacks=[average()], max_epochs=4)
    trained(plain, tmp_path, max_epochs=4)
    assert_same(averaged.net, twin.net)
    assert not torch.equal(averaged.net[0].weight, plain.net[0].weight)


def test_a_compiled_model_trains_as_the_twin(tmp_path: Path) -> None:
    nets = []
    for cls in (fusedreg.FusedRegAdamW, torch.optim.AdamW):
        module = Automatic(cls, {"lr": 1e-2})
        trained(torch.compile(module, backend="eager"), tmp_path)
        nets.append(module.net)
    assert_same(*nets)


def test_resumes_exactly(tmp_path: Path) -> None:
    options = {"lr": 1e-2, "l1": 0.02, "max_grad_norm": 1.0}
    first = Automatic(fusedreg.FusedRegAdamW, options)
    trained(first, tmp_path).save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    whole, resumed = (Automatic(fusedreg.FusedRegAdamW, options) for _ in range(2))
    trained(whole, tmp_path, max_epochs=2)
    trained(resumed, tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_same_bits(whole.net, resumed.net)


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "twin"])
def test_the_command_line_makes_it(is_ours: bool, tmp_path: Path) -> None:
    name = "fusedreg.FusedRegAdamW" if is_ours else "torch.optim.AdamW"
    strengths = [f"--optimizer.{key}={value}" for key, value in SPARING.items()] if is_ours else []
    made = cli.LightningCLI(
        Module,
        args=["fit", f"--optimizer={name}", "--optimizer.lr=0.01", *strengths, "--trainer.max_epochs=2"],
        trainer_defaults={**QUIET, "default_root_dir": str(tmp_path)},
        save_config_callback=None,
    )
    assert type(made.trainer.optimizers[0]).__name__ == name.split(".")[-1]
    zeros = zeros_of(made.model.net)
    assert (zeros[True] > 10) == is_ours
    assert zeros[False] == 0


def test_the_command_line_knows_the_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.LightningCLI(
            Module,
            args=["fit", "--optimizer=fusedreg.FusedRegAdamW", "--optimizer.penalty_mode=exact"],
            trainer_defaults=QUIET,
            save_config_callback=None,
        )
    assert "decoupled" in capsys.readouterr().err


def test_log_callback(tmp_path: Path) -> None:
    from fusedreg.integrations.lightning import LogCallback

    def logged(cls: Any, options: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        module = Automatic(cls, options)
        trainer = trained(module, tmp_path, callbacks=[LogCallback()], log_every_n_steps=4, max_epochs=3)
        return trainer, {key: float(each) for key, each in trainer.logged_metrics.items()}

    trainer, values = logged(fusedreg.FusedRegAdamW, {"lr": 1e-2, "max_grad_norm": float("inf"), **SPARING})
    (optimizer,) = trainer.optimizers
    assert values["fusedreg/penalty"] == pytest.approx(float(fusedreg.penalty(optimizer)))
    assert values["fusedreg/grad_norm"] == pytest.approx(float(optimizer.grad_norm))
    assert values["fusedreg/zeros"] == pytest.approx(fusedreg.sparsity_report(trainer.model).fraction)
    assert values["fusedreg/zeros"] > 0
    assert logged(torch.optim.AdamW, {})[1] == {}


def test_sparsity_callback_and_its_resumption(tmp_path: Path) -> None:
    from fusedreg.integrations.lightning import SparsityCallback

    options = {"lr": 1e-2, "sparsity": 0.5, "regularize_min_ndim": 2}

    def run(epochs: int, ckpt_path: str | None = None) -> tuple[Any, Any]:
        module = Automatic(fusedreg.FusedRegAdamW, options)
        callbacks = [SparsityCallback(begin=0.2, end=0.8, every=2)]
        return module, trained(
            module, tmp_path, ckpt_path, max_epochs=epochs, callbacks=callbacks, accumulate_grad_batches=2
        )

    whole, _ = run(4)
    assert zeros_of(whole.net) == {True: (10 * 16 + 16 * 2) // 2, False: 0}
    module = Automatic(fusedreg.FusedRegAdamW, options)
    schedule = SparsityCallback(begin=0.2, end=0.8, every=2)

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)

    trained(module, tmp_path, max_epochs=4, callbacks=[schedule, Stop()], accumulate_grad_batches=2)
    assert schedule.schedule.last_step == 16
    resumed, trainer = run(4, str(tmp_path / "half.ckpt"))
    assert trainer.callbacks[0].schedule.last_step == 16
    assert_same_bits(whole.net, resumed.net)
    with pytest.raises(TypeError, match="Invalid optimizer"):
        trained(Automatic(torch.optim.AdamW, {}), tmp_path, callbacks=[SparsityCallback()])


# -- Fabric


def with_fabric(
    cls: Any, options: dict[str, Any], epochs: int = 1, load: Path | None = None, save: Path | None = None,
    clip: float | None = None, precision: str = "32-true",
) -> Any:  # fmt: skip
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = make_model()
    model, optimizer = fabric.setup(model, cls(model.parameters(), **options))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(make_data(), batch_size=8))
    if load is not None:
        fabric.load(load, {"model": model, "optimizer": optimizer})
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(mean_loss(model(x), y))
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
    if save is not None:
        fabric.save(save, {"model": model, "optimizer": optimizer})
    return model, optimizer


@every_twin
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any], precision: str) -> None:
    runs = [with_fabric(cls, options, clip=0.5, precision=precision)[0] for cls in (ours, theirs)]
    assert_same(*runs)


def test_fabric_resumes_exactly_and_shows_the_norm(tmp_path: Path) -> None:
    options = {"lr": 1e-2, "l1": 0.02, "max_grad_norm": 1.0}
    _, optimizer = with_fabric(fusedreg.FusedRegAdamW, options, save=tmp_path / "half.ckpt")
    assert float(optimizer.grad_norm) > 0
    whole, _ = with_fabric(fusedreg.FusedRegAdamW, options, epochs=2)
    resumed, _ = with_fabric(fusedreg.FusedRegAdamW, {"lr": 0.5}, load=tmp_path / "half.ckpt")
    assert_same_bits(whole, resumed)
