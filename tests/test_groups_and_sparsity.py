"""param_groups exempts what it says, and sparsity_report counts right."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fusedreg import FusedRegAdam, FusedRegAdamW, FusedRegOptimizer, param_groups, sparsity_report
from fusedreg.penalties import of_the_weights
from fusedreg.rules.registry import OPTIMIZERS


def test_param_groups() -> None:
    model = nn.Sequential(
        nn.Linear(4, 3), nn.LayerNorm((2, 3)), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(5, 4), nn.PReLU()
    )
    weights, exempt = param_groups(model, l1=0.1, l2=0.2, weight_decay=0.3, lr=0.5, penalty_mode="decoupled")
    names = {id(param): name for name, param in model.named_parameters()}
    assert [names[id(p)] for p in weights["params"]] == ["0.weight", "2.weight", "4.weight"]
    assert [names[id(p)] for p in exempt["params"]] == [
        "0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias", "5.weight",
    ]  # fmt: skip
    about_params = ("params", "param_names", "param_places")
    assert {k: v for k, v in weights.items() if k not in about_params} == {
        "l1": 0.1, "l2": 0.2, "weight_decay": 0.3, "lr": 0.5, "penalty_mode": "decoupled",
    }  # fmt: skip
    assert {k: v for k, v in exempt.items() if k not in about_params} == {
        **{option.name: option.default for option in of_the_weights()},
        "weight_decay": 0.0, "lr": 0.5, "penalty_mode": "decoupled",
    }  # fmt: skip


def test_strengths_left_out_are_the_optimizers() -> None:
    optimizer = FusedRegAdamW(param_groups(nn.Linear(4, 3)), l1=0.25)
    assert [(g["l1"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.01), (0.0, 0.0)]


def test_penalties_and_constraints_are_for_the_weights_alone() -> None:
    weights, exempt = param_groups(nn.Linear(4, 3), freeze_zeros=True, lr=0.5)
    assert (weights["freeze_zeros"], exempt["freeze_zeros"]) == (True, False)
    optimizer = FusedRegAdamW(param_groups(nn.Linear(4, 3)), freeze_zeros=True)
    assert [group["freeze_zeros"] for group in optimizer.param_groups] == [True, False]


def test_shared_parameters_are_listed_once_and_empty_groups_left_out() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    (only,) = param_groups(nn.Sequential(first, second), l1=0.1)
    assert len(only["params"]) == 1


def test_sparsity_report() -> None:
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    report = sparsity_report(model)
    weight, bias = report
    assert (weight.name, weight.shape, weight.numel, weight.zeros) == ("weight", (4, 3), 12, 10)
    assert (weight.empty_rows, weight.empty_columns) == (2, 1)
    assert (bias.zeros, bias.empty_rows) == (1, None)
    assert (report.zeros, report.numel, report.empty_rows, report.empty_columns) == (11, 16, 2, 1)
    assert report.fraction == 11 / 16
    assert "68.8%" in str(report)
    assert sparsity_report(model.parameters()).zeros == sparsity_report(list(model.named_parameters())).zeros == 11


def test_sparsity_report_of_nothing_and_of_empty_tensors() -> None:
    assert sparsity_report([]).fraction == 0.0
    report = sparsity_report([torch.zeros(0, 4), torch.tensor(0.0)])
    assert (report.numel, report.zeros) == (1, 1)


@pytest.mark.parametrize(
    ("strengths", "named"),
    [({"l1": 0.1}, "l1=0.1 acts"), ({"l2": 0.2, "weight_decay": 0.3}, "l2=0.2, weight_decay=0.3 acts"), ({}, "every")],
)
def test_strengths_that_act_on_nothing_are_told(strengths: dict[str, float], named: str) -> None:
    with pytest.warns(UserWarning, match=f"{named}.*on nothing: all parameters are exempt") as warned:
        (exempt,) = param_groups(nn.Sequential(nn.LayerNorm(3), nn.PReLU()), **strengths)
    assert len(exempt["params"]) == 3
    assert warned[0].filename == __file__


def test_nothing_is_told_where_nothing_was_asked() -> None:
    param_groups(nn.LayerNorm(3), l1=0.0)
    assert param_groups(nn.ReLU(), l1=0.1) == []


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(param): name for name, param in model.named_parameters()}
    return [[names[id(param)] for param in group["params"]] for group in groups]


def test_names_and_places_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    groups = param_groups(model, l1=0.1)
    assert [group["param_names"] for group in groups] == names_by_group(model, groups)
    assert [group["param_places"] for group in groups] == [[0, 4], [1, 2, 3, 5]]
    optimizer = FusedRegAdamW(groups)
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group["param_places"] for group in each.param_groups] == [[0, 4], [1, 2, 3, 5]]
        assert each.param_groups[0]["param_names"] == ["0.weight", "2.weight"]


def test_a_lazy_module_is_refused_until_it_has_dimensions() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' is of a lazy module that has seen no batch"):
        param_groups(model, l1=0.1)
    model(torch.zeros(1, 4))
    assert names_by_group(model, param_groups(model, l1=0.1))[0] == ["0.weight", "1.weight"]


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_a_weight_is_computed_from_is_spared(norm: Callable[[nn.Module], nn.Module]) -> None:
    """A penalty that shrinks a direction ends in a division of zero by zero."""
    model = nn.Sequential(norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"l1=0\.5 spares the weights that are computed from parameters: 0\.weight"):
        groups = param_groups(model, l1=0.5)
    assert names_by_group(model, groups)[0] == ["1.weight"]
    optimizer = FusedRegAdamW(groups, lr=0.1, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
    assert model[0].weight.any()
    param_groups(model, l1=0.5, exempt=[model[0]])  # asked for: nothing is told


def test_weights_that_were_flattened_are_told() -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.zeros(12))
            self.head = nn.Linear(3, 2)

    with pytest.warns(UserWarning, match=r"l1=0\.1 spares most elements: 'flat' has one dimension"):
        param_groups(Flattened(), l1=0.1)
    param_groups(Flattened(), l1=0.0)
    param_groups(Flattened(), l1=0.1, exempt=["flat"])
    param_groups(nn.Sequential(nn.Linear(1, 9), nn.BatchNorm1d(9)), l1=0.1)  # what is small by its nature


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> torch.optim.Optimizer:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + step)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("cls", [cls for cls in OPTIMIZERS if cls.spec.twin], ids=lambda cls: cls.spec.name)
@pytest.mark.parametrize("is_named", [False, True], ids=["places", "names"])
def test_a_checkpoint_without_groups_loads_into_groups(cls: type[FusedRegOptimizer], is_named: bool) -> None:
    """Training that goes on in groups is that which goes on without, where the groups regularize nothing."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    other = copy.deepcopy(model)
    torchs = cls.spec.twin(model.named_parameters() if is_named else model.parameters(), lr=0.02)
    trained(model, torchs)
    other.load_state_dict(model.state_dict())
    ours = cls(param_groups(other, weight_decay=0.0), lr=0.5)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for group in torchs.param_groups:
        group["weight_decay"] = 0.0
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.02]
    trained(model, torchs)
    trained(other, ours)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_strengths_of_groups_outlive_a_checkpoint_without_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    saved = trained(model, FusedRegAdamW(model.parameters(), lr=0.02, l1=0.7, penalty_mode="decoupled")).state_dict()
    optimizer = FusedRegAdamW(param_groups(model, l1=0.1), lr=0.5)
    optimizer.load_state_dict(saved)
    weights, spared = optimizer.param_groups
    assert (weights["l1"], weights["weight_decay"], spared["l1"], spared["weight_decay"]) == (0.1, 0.01, 0.0, 0.0)
    assert (weights["lr"], weights["penalty_mode"], spared["penalty_mode"]) == (0.02, "decoupled", "decoupled")
    back = FusedRegAdamW(model.parameters())
    back.load_state_dict(optimizer.state_dict())
    for key, state in saved["state"].items():
        torch.testing.assert_close(back.state_dict()["state"][key], state)
    assert "param_places" not in back.param_groups[0]


def test_groups_of_equal_sizes_are_told_apart_by_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    named = dict(model.named_parameters())
    swapped = [{"params": [(name, named[name])], "lr": lr} for name, lr in (("1.weight", 0.1), ("0.weight", 0.2))]
    saved = trained(model, torch.optim.Adam(swapped))
    first, second = param_groups(model[0], weight_decay=0.0)[0], param_groups(model[1], weight_decay=0.0)[0]
    first["param_names"], second["param_names"] = ["0.weight"], ["1.weight"]
    optimizer = FusedRegAdam([first, second])
    optimizer.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], saved.state[model[0].weight]["exp_avg"])


def test_groups_that_cannot_be_told_apart_are_refused() -> None:
    body, head = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    whole = nn.Sequential(body, head)
    optimizer = FusedRegAdam([*param_groups(body, l1=0.1), *param_groups(head, l1=0.2)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(torch.optim.Adam(whole.parameters()).state_dict())
    by_hand = [{"params": head.named_parameters(), "lr": 0.1}, {"params": [("x", torch.zeros(3))], "lr": 0.2}]
    saved = torch.optim.Adam(by_hand).state_dict()
    saved["param_groups"][1]["param_names"], saved["param_groups"][0]["param_names"] = ["1.bias"], [
        "0.weight", "0.bias", "1.weight", "other",
    ]  # fmt: skip
    own = FusedRegAdam([{**group} for group in param_groups(head)])
    with pytest.raises(ValueError, match="a parameter group that doesn't match the size"):
        own.load_state_dict(saved)
    names = list(head.named_parameters())
    two_rates = torch.optim.Adam([{"params": names[:3]}, {"params": names[3:], "lr": 0.5}]).state_dict()
    with pytest.raises(ValueError, match="several saved groups"):
        own.load_state_dict(two_rates)
