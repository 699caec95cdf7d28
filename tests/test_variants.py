"""experiments/variants.py builds the kernels without torch around them: they still are the kernels that are shipped."""

import platform
import shutil

import pytest
import torch
from conftest import needs_cpp

import fusedreg

pytestmark = [
    needs_cpp,
    pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("c++") is None, reason="needs c++ on x86-64"),
]


@pytest.fixture
def variants():
    return pytest.importorskip("experiments.variants")


def test_each_variant_finds_the_lines_that_it_replaces(variants) -> None:
    for variant in (*variants.STEP_VARIANTS.values(), *variants.NORM_VARIANTS.values()):
        texts = {}
        for name, old, new in variant.replace:
            text = texts.setdefault(name, (variants.CSRC / name).read_text())
            assert text.count(old) == 1, (name, old)
            texts[name] = text.replace(old, new)


def test_the_kernels_are_the_shipped_ones(variants, tmp_path) -> None:
    passes = variants.Passes(variants.Variant(), tmp_path)
    torch.manual_seed(0)
    w, g, m, v = torch.randn(70_001), torch.randn(70_001), torch.randn(70_001), torch.rand(70_001)
    param = w.clone().requires_grad_()
    param.grad = g * 0.5  # its clip's coefficient
    optimizer = fusedreg.FusedRegAdamW([param], lr=1e-3, weight_decay=0.01, l1=1e-4, l2=1e-4, backend="cpp")
    optimizer.state[param] = {"step": torch.tensor(10.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    passes.adamw(w, g, m, v)
    state = optimizer.state[param]
    for own, shipped in ((w, param.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert torch.equal(own, shipped)
    total = passes.library.squares(variants._pointer(g), *passes._work(g))
    assert total == pytest.approx(float(g.double().square().sum()), rel=1e-12)
