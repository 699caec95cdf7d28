"""The benchmarks time nothing that is wrong, and count bytes and ratios right."""

from __future__ import annotations

import json
import math
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import needs_cpp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cases
import cpu_step
import gate
import gpu_step
import measure
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
def test_every_contender_of_a_rule_takes_a_step(rule) -> None:
    problem = cases.Problem.random([(3, 5), (7,)])
    before = [param.detach().clone() for param in problem.params]
    for contender in (
        *peers.the_best_two(peers.RULES[rule], problem),
        *peers.our_contenders(peers.RULES[rule], problem, "cpp"),
    ):
        contender.step()
        for param, old in zip(problem.params, before, strict=True):
            assert not param.equal(old)
            with torch.no_grad():
                param.copy_(old)


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


def test_the_gpu_sleeps_while_the_host_hands_over_what_is_timed(monkeypatch) -> None:
    done = []

    class Event:
        def __init__(self, enable_timing) -> None: ...

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, end) -> float:
            return 3.0

    for name, value in {"synchronize": lambda: None, "Event": Event, "_sleep": done.append}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    clock = measure.GpuClock(2)

    def step() -> None:
        time.sleep(0.01)
        done.append("step")

    assert clock(step) == 3.0 / 1e3 / 2
    assert done[1:] == ["event", "step", "step", "event"]
    done.clear()
    clock(step)
    assert done[0] >= 0.02 * measure.MOST_CYCLES_A_SECOND  # longer than the host took


def test_a_huge_case_holds_one_state_at_a_time(monkeypatch) -> None:
    alive: list[weakref.ref] = []

    def contender(name: str) -> peers.Contender:
        param = torch.zeros(4, requires_grad=True)
        param.grad = torch.ones(4)
        optimizer = torch.optim.Adam([param])
        alive.append(weakref.ref(optimizer))

        def step() -> None:
            optimizer.step()
            assert sum(bool(each() and each().state) for each in alive) == 1

        return peers.Contender(name, step, False)

    seconds, _ = gpu_step.time_in_turn([contender("a"), contender("b")], "cpu", 0.01)
    assert set(seconds) == {"a", "b"}


def test_the_gpu_cases_are_written_one_by_one_beside_those_before(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu_step, "SMOKE_CASES", {"one": [(5,)], "two": [(6,)]})
    monkeypatch.setattr(gpu_step, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(gpu_step, "failures", lambda *_: [])
    stop = []

    def run_case(name, *_):
        if name in stop:
            raise KeyboardInterrupt
        return [report.Row("ours", 1.0, (0.9, 1.1), 1.0, 2.0)]

    monkeypatch.setattr(gpu_step, "run_case", run_case)
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--smoke", "--output", str(tmp_path)])
    stop[:] = ["two"]
    with pytest.raises(KeyboardInterrupt):
        gpu_step.main()
    assert list(json.loads((tmp_path / "smoke.json").read_text())["cases"]) == ["one"]
    stop[:] = ["one"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--cases", "two"])
    gpu_step.main()
    assert list(json.loads((tmp_path / "smoke.json").read_text())["cases"]) == ["one", "two"]
    assert (tmp_path / "smoke.md").read_text().count("## ") == 2
