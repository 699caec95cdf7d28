"""Compaction of random nets with random zeros: the same outputs, always, and what was not followed is named.

``FUZZ_EXAMPLES=5000 python -m pytest tests/sparsity/test_compact_fuzz.py`` tries more, and others in every run.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import RandomNet, fill

import fusedreg
from fusedreg.sparsity.compact.follow import UNEXPECTED

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
SEEDS = st.integers(0, 2**32 - 1)


pytestmark = pytest.mark.usefixtures("in_one_thread")


@pytest.mark.parametrize("kind", ["vector", "image", "sequence"])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(architecture=SEEDS, weights=SEEDS, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_random_nets_compute_the_same(kind: str, architecture: int, weights: int, share: float) -> None:
    model = RandomNet(architecture, kind)
    fill(model, weights, share)
    model.train(weights % 2 == 0)
    before = copy.deepcopy(model.state_dict())
    small = fusedreg.compact(model, model.example(2, seed=0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.training == model.training
    # Other inputs, of another number, in float64: not what the call itself has compared.
    model, small = model.double().eval(), small.double().eval()
    x = model.example(3, seed=1)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        expected, outputs = model(x.clone()), small(x.clone())
    # The biases that constants went into were rounded to float32.
    torch.testing.assert_close(outputs, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))
    for left in small.report.left:
        assert left.where
        assert UNEXPECTED not in left.reason
    again = fusedreg.compact(small.float(), model.example(2, seed=0))
    assert again.report.parameters[1] <= small.report.parameters[1]
