"""timm: our optimizers by their names, with the groups that timm makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from twin_runs import SPARING, assert_same_bits, zeros_of

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")


def make_vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=3)


def trained(name: str, steps: int = 4, **options: Any) -> tuple[Any, Any]:
    model = make_vit()
    optimizer = optim.create_optimizer_v2(model, name, **options)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=["decay", "layer_decay"])
def test_trains_as_the_twin(name: str, options: dict[str, Any]) -> None:
    import fusedreg.integrations.timm

    # eps: a key's bias has a gradient of 0, of which Adam would make steps of rounding's size and sign
    options = {"lr": 1e-3, "weight_decay": 0.05, "eps": 1e-3, **options}
    ours, optimizer = trained(f"fusedreg{name}", **options)
    theirs, twin = trained(name, **options)
    assert isinstance(optimizer, fusedreg.FusedRegOptimizer)
    assert len(optimizer.param_groups) == len(twin.param_groups) > 1
    assert optimizer.param_groups[0].get("nesterov") == twin.param_groups[0].get("nesterov")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_all_names() -> None:
    import fusedreg.integrations.timm

    names = optim.list_optimizers("fusedreg*")
    assert len(names) == len(fusedreg.rules.registry.OPTIMIZERS) - 1  # Rprop has no weight_decay
    for name in names:
        trained(name, steps=1, lr=1e-4)


def test_strengths_spare_what_is_small_or_named() -> None:
    import fusedreg.integrations.timm

    model, _ = trained("fusedregadamw", steps=10, lr=1e-3, **{**SPARING, "l1": 1.0})
    fresh = zeros_of(make_vit())
    assert zeros_of(model)[True] > fresh[True] + 1000
    assert zeros_of(model)[False] <= fresh[False]
    groups = fusedreg.param_groups(model, l1=1.0, exempt=["*pos_embed", "*cls_token"])
    assert {"pos_embed", "cls_token"} <= set(groups[1]["param_names"])


def test_resumes_exactly() -> None:
    import fusedreg.integrations.timm  # noqa: F401

    options = {"lr": 1e-3, "l1": 0.01, "regularize_min_ndim": 2}
    model, optimizer = trained("fusedregadamw", **options)
    other = make_vit()
    other.load_state_dict(model.state_dict())
    resumed = optim.create_optimizer_v2(other, "fusedregadamw", **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        its.zero_grad()
        each(torch.ones(2, 3, 32, 32)).sum().backward()
        its.step()
    assert_same_bits(model, other)
