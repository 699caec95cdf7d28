"""Proves what a short minibatch run on digits keeps of the exactness: the zeros, the objective, the accuracy.

The runs are those of experiments/minibatch_sparsity.py, with fewer epochs; docs/minibatch.md has the long ones.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from solvers import one_thread

L1 = 1e-3


@pytest.fixture(scope="module")
def script():
    name = "minibatch_sparsity"
    path = Path(__file__).parents[2] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
@one_thread()
def rows(script):
    """Every way of the script, 20 epochs, one seed."""
    setting = script.Setting(script.Digits.load(), epochs=20, batch_size=64, seed=0)
    return dict(script.run_seed(setting, [L1]))


def test_proximal_gives_zeros_and_the_penalty_in_the_loss_none(rows, script) -> None:
    assert rows[L1, script.PROXIMAL].zeros > 0.35
    assert rows[L1, script.PENALTY].zeros == 0
    assert rows[0.0, script.DENSE].zeros == 0


def test_the_same_lambda_means_the_same(rows, script) -> None:
    """Both ways minimise the same objective, and end near the same value of it."""
    proximal, penalty = rows[L1, script.PROXIMAL], rows[L1, script.PENALTY]
    assert proximal.objective == pytest.approx(penalty.objective, rel=0.05)
    assert proximal.loss == pytest.approx(penalty.loss, rel=0.1)
    # which is not where a run without the penalty ends
    assert rows[L1, script.DENSE_PRUNED].objective > 1.5 * proximal.objective


def test_accuracy_is_within_a_few_points(rows, script) -> None:
    dense = rows[0.0, script.DENSE].accuracy
    assert dense > 0.95
    for way in (script.PROXIMAL, script.PENALTY, script.PENALTY_PRUNED, script.DENSE_FINETUNED):
        assert rows[L1, way].accuracy > dense - 0.04


def test_pruning_gives_the_zeros_that_it_was_asked_for(rows, script) -> None:
    """Otherwise the script would compare unlike things."""
    zeros = rows[L1, script.PROXIMAL].zeros
    for way in (script.PENALTY_PRUNED, script.DENSE_PRUNED, script.DENSE_FINETUNED):
        assert rows[L1, way].zeros == pytest.approx(zeros, abs=1e-3)


def test_decoupled_is_measured_against_the_normalised_step(rows, script) -> None:
    """The other lambda does next to nothing there, and its own ones give zeros."""
    assert rows[L1, script.DECOUPLED].zeros < 0.05
    by_strength = [rows[l1, script.DECOUPLED].zeros for l1 in script.DECOUPLED_L1]
    assert by_strength == sorted(by_strength)
    assert by_strength[-1] > 0.25


def test_the_table_has_a_line_for_each(rows, script) -> None:
    table = script.markdown({row: [result] for row, result in rows.items()}).splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
