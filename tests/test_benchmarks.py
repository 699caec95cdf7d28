"""The benchmarks time nothing that is wrong, and count bytes and ratios right."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_cpp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cases
import cpu_step
import gate
import peers
import report

from fusedreg.backends import reference


@needs_cpp
@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, torch.float32) for rule in peers.RULES]
    + [("Adam", dtype) for dtype in gate.TOLERANCE if dtype != torch.float32],
    ids=str,
)
def test_the_gate_lets_through_what_is_right(rule, dtype) -> None:
    assert gate.failures(rule, peers.RULES[rule], dtype, "cpp", "cpu") == []


@needs_cpp
@pytest.mark.parametrize("rule", peers.RULES)
def test_nothing_is_timed_that_is_wrong(rule, monkeypatch) -> None:
    """A prox that is off by 1 % in the reference, as if the kernel were: each setting with a penalty is named."""
    right = reference.prox
    monkeypatch.setattr(reference, "prox", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    found = gate.failures(rule, peers.RULES[rule], torch.float32, "cpp", "cpu")
    assert len(found) >= 2
    assert all("away from the reference" in failure for failure in found)


@needs_cpp
def test_a_wrong_result_ends_the_benchmark(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(cpu_step, "failures", lambda *_: ["cpp, AdamW: 1.0 away"])
    monkeypatch.setattr(sys, "argv", ["cpu_step.py", "--output", str(tmp_path)])
    assert cpu_step.main() == 1
    printed = capsys.readouterr().out
    assert "1.0 away" in printed
    assert "Nothing was timed" in printed
    assert not list(tmp_path.iterdir())


def test_shapes_are_the_models_that_they_are_named_after() -> None:
    assert cases.numel_of(cases.gpt2_shapes()) == 124_439_808
    assert cases.numel_of(cases.resnet50_shapes()) == 25_557_032
    assert len(cases.resnet50_shapes()) == 161


def test_bytes_of_a_step() -> None:
    adam = peers.RULES["AdamW"]
    assert adam.bytes_per_element(torch.float32, clip=False) == 28
    assert adam.bytes_per_element(torch.float32, clip=True) == 32
    assert peers.RULES["Adam, amsgrad"].bytes_per_element(torch.bfloat16, clip=False) == 18


def test_rows_are_medians_and_ratios_to_the_plain_step() -> None:
    contenders = [peers.Contender(peers.PLAIN, lambda: None, False), peers.Contender("ours", lambda: None, True)]
    seconds = {peers.PLAIN: [1.0, 2.0, 9.0], "ours": [3.0, 4.0, 5.0]}
    plain, ours = report.rows_of(contenders, seconds, peers.PLAIN, peers.RULES["AdamW"], torch.float32, 10**9)
    assert (plain.ratio, ours.ratio) == (1.0, 2.0)
    assert math.isclose(ours.gb_per_s, 32 / 4)
    assert "2.00" in report.grid_of("case", [plain, ours], None).markdown()
