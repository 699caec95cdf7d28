"""For a developer's own before and after: `make bench-compare BASE=main`."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Problem, Shape
from peers import OURS, RULES, our_optimizer

import fusedreg

SHAPES: dict[str, list[Shape]] = {
    "20-tiny": CASES["20 tiny"],
    "1000-of-64x64": CASES["1000 of 64x64"],
    "resnet50": CASES["ResNet-50"],
}
SETTINGS = {name.replace(", ", "+").replace(" ", "-"): options for name, options in OURS.items()}


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def bench(benchmark, rule: str, shapes: list[Shape], dtype: torch.dtype, options: dict) -> None:
    problem = Problem.random(shapes, dtype)
    optimizer = our_optimizer(RULES[rule], problem.params, problem.max_norm, "cpp", **options)
    optimizer.step()  # makes state and plan
    benchmark.extra_info["fusedreg"] = fusedreg.__file__
    benchmark(optimizer.step)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_adamw(benchmark, shapes: str, setting: str) -> None:
    bench(benchmark, "AdamW", SHAPES[shapes], torch.float32, SETTINGS[setting])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.replace(", ", "-"))
def test_everything_on(benchmark, rule: str, dtype: torch.dtype) -> None:
    bench(benchmark, rule, SHAPES["resnet50"], dtype, OURS["decay, l1, l2, clip"])
