"""param_groups exempts what it says, and sparsity_report counts right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedreg import FusedRegAdamW, param_groups, sparsity_report
from fusedreg.penalties import of_the_weights


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
    assert {k: v for k, v in weights.items() if k != "params"} == {
        "l1": 0.1, "l2": 0.2, "weight_decay": 0.3, "lr": 0.5, "penalty_mode": "decoupled",
    }  # fmt: skip
    assert {k: v for k, v in exempt.items() if k != "params"} == {
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
