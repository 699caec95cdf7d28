"""skorch, fastai, ignite, peft, Opacus: each one's own loop, beside torch's twin in the same."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from twin_runs import SPARING, assert_same, assert_same_bits, every_twin, make_data, make_model, mean_loss, zeros_of

import fusedreg

# -- skorch


def skorch_net(cls: Any, **options: Any) -> Any:
    skorch = pytest.importorskip("skorch")
    return skorch.NeuralNetClassifier(
        make_model,
        criterion=nn.CrossEntropyLoss,
        optimizer=cls,
        batch_size=8,
        max_epochs=2,
        train_split=None,
        verbose=0,
        iterator_train__shuffle=False,
        **options,
    )


def as_arrays() -> tuple[Any, Any]:
    x, y = make_data().tensors
    return x.numpy(), y.numpy()


@every_twin
def test_skorch_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    own = {f"optimizer__{key}": value for key, value in options.items()}
    nets = [skorch_net(cls, **own).fit(*as_arrays()) for cls in (ours, theirs)]
    assert_same(*(net.module_ for net in nets))


def test_skorch_in_a_grid_search_and_resumed(tmp_path: Path) -> None:
    model_selection = pytest.importorskip("sklearn.model_selection")
    own = {"optimizer__regularize_min_ndim": 2, "optimizer__max_grad_norm": 1.0}
    net = skorch_net(fusedreg.FusedRegAdamW, optimizer__lr=1e-2, **own)
    grid = {"optimizer__l1": list(np.float64([0.0, 0.05]))}
    search = model_selection.GridSearchCV(net, grid, cv=2, error_score="raise").fit(*as_arrays())
    assert search.best_estimator_.optimizer_.param_groups[0]["l1"] in (0.0, 0.05)
    assert float(search.best_estimator_.optimizer_.grad_norm) > 0
    strong = skorch_net(fusedreg.FusedRegAdamW, optimizer__lr=1e-2, optimizer__l1=0.05, **own).fit(*as_arrays())
    assert zeros_of(strong.module_)[True] > 10
    assert zeros_of(strong.module_)[False] == 0

    files = {"f_params": tmp_path / "p", "f_optimizer": tmp_path / "o"}
    strong.save_params(**files)
    resumed = skorch_net(fusedreg.FusedRegAdamW).initialize()
    resumed.load_params(**files)
    for each in (strong, resumed):
        each.partial_fit(*as_arrays())
    assert_same_bits(strong.module_, resumed.module_)


def test_skorch_groups_by_name() -> None:
    groups = [("*bias", {"l1": 0.0}), ("1.*", {"l1": 0.0})]
    net = skorch_net(fusedreg.FusedRegAdamW, optimizer__l1=0.05, optimizer__param_groups=groups).fit(*as_arrays())
    assert zeros_of(net.module_)[True] > 10
    assert zeros_of(net.module_)[False] == 0


# -- fastai


def fastai_model(cls: Any, options: dict[str, Any], epochs: int = 2, load: Any = None, save: Any = None) -> Any:
    basics = pytest.importorskip("fastai.basics")
    loader = basics.DataLoader(make_data(), batch_size=8, device=torch.device("cpu"))
    learner = basics.Learner(
        basics.DataLoaders(loader, loader, device=torch.device("cpu")),
        make_model(),
        loss_func=mean_loss,
        opt_func=functools.partial(basics.OptimWrapper, opt=cls, **options),
        train_bn=False,
    )
    if load is not None:
        learner.load(load, with_opt=True)
    with learner.no_logging():
        learner.fit(epochs, lr=options["lr"], wd=options.get("weight_decay"), reset_opt=False)
    if save is not None:
        learner.save(save, with_opt=True)
    return learner


@every_twin
def test_fastai_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    learners = [fastai_model(cls, options) for cls in (ours, theirs)]
    assert_same(*(learner.model for learner in learners))


def test_fastai_resumes_exactly_with_strengths(tmp_path: Path) -> None:
    options = {"lr": 1e-2, "max_grad_norm": 1.0, **SPARING}
    whole = fastai_model(fusedreg.FusedRegAdamW, options, save=tmp_path / "half")
    assert zeros_of(whole.model)[True] > 10
    assert zeros_of(whole.model)[False] == 0
    assert float(whole.opt.opt.grad_norm) > 0
    resumed = fastai_model(fusedreg.FusedRegAdamW, options, epochs=1, load=tmp_path / "half")
    with whole.no_logging():
        whole.fit(1, lr=1e-2, reset_opt=False)
    assert_same_bits(whole.model, resumed.model)


# -- ignite


def ignite_trainer(cls: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    engine = pytest.importorskip("ignite.engine")
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    return engine.create_supervised_trainer(model, optimizer, mean_loss), model, optimizer


def loader() -> Any:
    return torch.utils.data.DataLoader(make_data(), batch_size=8)


@every_twin
def test_ignite_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    models = []
    for cls in (ours, theirs):
        trainer, model, optimizer = ignite_trainer(cls, options)
        handlers = pytest.importorskip("ignite.handlers")
        engine = pytest.importorskip("ignite.engine")
        schedule = handlers.param_scheduler.LinearCyclicalScheduler(optimizer, "lr", 0.01, 0.001, 8)
        trainer.add_event_handler(engine.Events.ITERATION_STARTED, schedule)
        trainer.run(loader(), max_epochs=2)
        models.append(model)
    assert_same(*models)


def test_ignite_resumes_exactly(tmp_path: Path) -> None:
    handlers = pytest.importorskip("ignite.handlers")
    engine = pytest.importorskip("ignite.engine")
    options = {"lr": 1e-2, "l1": 0.02, "max_grad_norm": 1.0}
    trainer, whole, optimizer = ignite_trainer(fusedreg.FusedRegAdamW, options)
    saved = {"trainer": trainer, "model": whole, "optimizer": optimizer}
    checkpoint = handlers.Checkpoint(saved, handlers.DiskSaver(str(tmp_path)), filename_pattern="half.pt")
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED(once=1), checkpoint)
    trainer.run(loader(), max_epochs=2)

    trainer, resumed, optimizer = ignite_trainer(fusedreg.FusedRegAdamW, {"lr": 0.5})
    objects = {"trainer": trainer, "model": resumed, "optimizer": optimizer}
    handlers.Checkpoint.load_objects(objects, str(tmp_path / "half.pt"))
    trainer.run(loader(), max_epochs=2)
    assert_same_bits(whole, resumed)


# -- peft


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["0", "3"]))


def steps(model: nn.Module, optimizer: Any, count: int = 8) -> nn.Module:
    x, y = make_data().tensors
    for _ in range(count):
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
    return model


@every_twin
def test_peft_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    models = []
    for cls in (ours, theirs):
        model = adapted()
        models.append(steps(model, cls([param for param in model.parameters() if param.requires_grad], **options)))
    assert_same(*models)
    assert any(param.any() for name, param in models[0].named_parameters() if "lora_B" in name)


def test_peft_with_strengths_and_all_parameters() -> None:
    """The frozen ones are listed, too, have no gradient, and stay as they are."""
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    optimizer = fusedreg.FusedRegAdamW(fusedreg.param_groups(model, l1=0.05), lr=1e-2)
    steps(model, optimizer, 30)
    adapters = {name: param for name, param in model.named_parameters() if "lora_" in name}
    assert sum(int((param == 0).sum()) for param in adapters.values()) > 10
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters() if name not in adapters)


def test_peft_lora_plus_makes_groups() -> None:
    optimizers = pytest.importorskip("peft.optimizers")
    pytest.importorskip("peft")
    models = []
    for cls in (fusedreg.FusedRegAdamW, torch.optim.AdamW):
        model = adapted()
        optimizer = optimizers.create_loraplus_optimizer(
            model, optimizer_cls=cls, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
        )
        assert len(optimizer.param_groups) > 1
        models.append(steps(model, optimizer))
    assert_same(*models)


# -- Opacus


def private(cls: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    opacus = pytest.importorskip("opacus")
    model = make_model()
    model, optimizer, data = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=cls(model.parameters(), **options),
        data_loader=torch.utils.data.DataLoader(make_data(), batch_size=8),
        noise_multiplier=0.1,
        max_grad_norm=1.0,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(3),
    )
    for x, y in data:
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@every_twin
def test_opacus_trains_as_the_twin(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    assert_same(*(private(cls, options)[0] for cls in (ours, theirs)))


def test_opacus_with_strengths() -> None:
    """The prox comes behind the noise: zeros are exact, and cost no privacy."""
    model, optimizer = private(fusedreg.FusedRegAdamW, {"lr": 1e-2, "max_grad_norm": float("inf"), **SPARING})
    assert zeros_of(model)[True] > 5
    assert zeros_of(model)[False] == 0
    assert float(optimizer.original_optimizer.grad_norm) > 0
