"""Proves what a short minibatch run on digits keeps of the exactness: the zeros, the objective, the accuracy.

The runs are those of experiments/sparsity/strengths.py, with fewer epochs; docs/minibatch.md has the long ones.
"""

from __future__ import annotations

import dataclasses

import pytest
from helpers import one_thread

from experiments.sparsity import strengths

L1 = 1e-3


@pytest.fixture(scope="module")
@one_thread()
def rows():
    """Every way, 20 epochs, one seed."""
    problem = dataclasses.replace(strengths.DIGITS, epochs=20)
    return dict(strengths.run_seed(problem, seed=0, strengths=[L1]))


def test_proximal_gives_zeros_and_the_penalty_in_the_loss_none(rows) -> None:
    assert rows[L1, strengths.PROXIMAL].zeros > 0.35
    assert rows[L1, strengths.PENALTY].zeros == 0
    assert rows[0.0, strengths.DENSE].zeros == 0


def test_the_same_lambda_means_the_same(rows) -> None:
    """Both ways minimise the same objective, and end near the same value of it."""
    proximal, penalty = rows[L1, strengths.PROXIMAL], rows[L1, strengths.PENALTY]
    assert proximal.objective == pytest.approx(penalty.objective, rel=0.05)
    assert proximal.loss == pytest.approx(penalty.loss, rel=0.1)
    # which is not where a run without the penalty ends
    assert rows[0.0, strengths.DENSE].loss < 0.5 * proximal.loss


def test_accuracy_is_within_a_few_points(rows) -> None:
    dense = rows[0.0, strengths.DENSE].accuracy
    assert dense > 0.95
    for way in (strengths.PROXIMAL, strengths.PENALTY, strengths.PENALTY_PRUNED):
        assert rows[L1, way].accuracy > dense - 0.04


def test_pruning_gives_the_zeros_that_it_was_asked_for(rows) -> None:
    """Otherwise the table would compare unlike things."""
    assert rows[L1, strengths.PENALTY_PRUNED].zeros == pytest.approx(rows[L1, strengths.PROXIMAL].zeros, abs=1e-3)


def test_decoupled_is_measured_against_the_normalised_step(rows) -> None:
    """The other lambda does next to nothing there, and its own ones give zeros."""
    assert rows[L1, strengths.DECOUPLED].zeros < 0.05
    by_strength = [rows[l1, strengths.DECOUPLED].zeros for l1 in strengths.DECOUPLED_L1]
    assert by_strength == sorted(by_strength)
    assert by_strength[-1] > 0.25


def test_the_table_has_a_line_for_each(rows) -> None:
    table = strengths.markdown({row: [result] for row, result in rows.items()}).splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
