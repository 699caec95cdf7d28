"""Proves that experiments/sparsity compares like with like: the same budget and zeros, scores as papers have them.

And that its bars hold, and that docs/minibatch.md shows its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from experiments.sparsity import report, runner
from experiments.sparsity.problems import PROBLEMS
from experiments.sparsity.ways import (
    DENSE,
    UNIT_WAYS,
    WAYS,
    Run,
    damage,
    gradual,
    lamp,
    magnitude,
    measure,
    run_way,
    weights_of,
    zero_smallest,
)

BARS = {0.9: 0.977, 0.95: 0.971, 0.97: 0.964, 0.98: 0.954}
SHORT = dataclasses.replace(PROBLEMS["digits"], epochs=4)
SHORT_DEEP = dataclasses.replace(PROBLEMS["deep"], epochs=4)


pytestmark = pytest.mark.usefixtures("in_one_thread")


@pytest.fixture
def steps() -> Iterator[list[int]]:
    """Counts the steps of all optimizers."""
    count = [0]

    def counted(*_: object) -> None:
        count[0] += 1

    handle = register_optimizer_step_post_hook(counted)
    yield count
    handle.remove()


@pytest.mark.parametrize("name", WAYS)
def test_weights_have_the_same_budget_and_zeros(name: str, steps: list[int]) -> None:
    run = Run(SHORT, "Adam", seed=0, share=0.8)
    result = run_way(WAYS[name], run)
    assert steps == [run.steps]
    # a penalty may have made more zeros than were asked for
    assert 0.7999 < result.zeros < (0.95 if name in ("l1", "mcp") else 0.8001)
    assert result.accuracy > 0.5


@pytest.mark.parametrize("name", UNIT_WAYS)
def test_units_have_the_same_budget_and_zeros(name: str, steps: list[int]) -> None:
    if name in ("tp", "taylor"):
        pytest.importorskip("torch_pruning")
    run = Run(SHORT_DEEP, "Adam", seed=0, share=0.5, units=True)
    result = run_way(UNIT_WAYS[name], run)
    assert steps == [run.steps]
    assert result.zeros == 0.5 or (name == "group_l1" and 0.5 <= result.zeros < 0.8)
    assert result.accuracy > 0.5


def test_a_mask_comes_to_the_same_weights() -> None:
    """The ways by magnitude stand for gradual pruning with masks, which is how it is published."""
    run = Run(SHORT, "Adam", seed=0, share=0.8)
    frozen = gradual(magnitude)(run)
    model = run.model()
    optimizer = run.optimizer(model)
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights_of(optimizer)]

    def after_step(step: int) -> None:
        with torch.no_grad():
            for w, mask in zip(weights_of(optimizer), masks, strict=True):
                w.mul_(mask)
        if run.is_renewal(step):
            zero_smallest(weights_of(optimizer), magnitude(run, model, optimizer), run.share_at(step))
            masks[:] = [w.detach() != 0 for w in weights_of(optimizer)]

    run.train(model, optimizer, after_step)
    assert measure(run, model).zeros == pytest.approx(0.8, abs=1e-4)
    for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_scores_are_those_of_their_papers() -> None:
    run = Run(SHORT, "Adam", seed=0, share=0.0)
    model = run.model()
    optimizer = run.optimizer(model)
    run.train(model, optimizer, epochs=1)
    weights = weights_of(optimizer)
    for w, score in zip(weights, lamp(run, model, optimizer), strict=True):
        squares = w.detach().double().square().flatten()
        for i in (0, 7, int(squares.argmin()), int(squares.argmax())):
            expected = squares[i] / squares[squares >= squares[i]].sum()
            torch.testing.assert_close(score.flatten()[i], expected)
        assert score.max() == 1
    for w, score in zip(weights, damage(run, model, optimizer), strict=True):
        state = optimizer.state[w]
        fisher = state["exp_avg_sq"] / (1 - 0.999 ** state["step"].item())
        torch.testing.assert_close(score.square(), fisher * w.detach().square())


def test_what_is_smallest_goes_globally_and_in_each_layer() -> None:
    scores = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])]
    for layerwise, expected in ((False, (4 * [0.0], 4 * [1.0])), (True, ([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]))):
        weights = [torch.ones(4), torch.ones(2, 2)]
        zero_smallest(weights, scores, 0.5, layerwise)
        # each layer keeps its best
        want = [list(expected[0]), list(expected[1])]
        want[0][3] = 1.0
        if not layerwise:
            want[1][0] = 0.0
        assert [w.flatten().tolist() for w in weights] == want
    rows = [torch.ones(2, 3)]
    zero_smallest(rows, [torch.tensor([2.0, 1.0])], 0.5)
    assert rows[0].tolist() == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]


def test_the_bars_hold_in_the_results() -> None:
    means = report.means("digits", "metric", runner.read())
    assert all(means[share] >= bar for share, bar in BARS.items())


def test_the_results_come_again() -> None:
    """Of the highest bar: two seeds, as another machine may round otherwise."""
    row = runner.read()[runner.read().index(runner.Row("digits", "Adam", False, "metric", 0.98, [], []))]
    for seed in range(2):
        accuracy, zeros = run_way(WAYS["metric"], Run(PROBLEMS["digits"], "Adam", seed, 0.98))
        assert zeros == pytest.approx(0.98, abs=1e-4)
        assert accuracy == pytest.approx(row.accuracies[seed], abs=0.012)
        assert accuracy >= BARS[0.98] - 0.005


def test_results_are_whole_and_are_not_run_again(tmp_path) -> None:
    file = tmp_path / "results.json"
    comparison = runner.Comparison("digits", "Adam", (0.9,), ways=("metric",))
    rows = [row for row, _ in runner.rows_of(comparison)]
    for row in rows:
        row.accuracies.extend([0.5, 0.6, 0.7])
        row.zeros.extend(3 * [row.share])
    runner.write(rows, file)
    assert runner.run_all((comparison,), file) == rows
    table = report.table(comparison, runner.read(file)).splitlines()
    assert table[0] == "| dense: 60.0 (50.0 to 70.0) | 90 % |"
    assert table[2].endswith("| **60.0** (50.0 to 70.0) |")
    # what is there is of all seeds
    for row in runner.read():
        assert len(row.accuracies) == len(row.zeros) == runner.SEEDS, row


def test_the_page_shows_the_results() -> None:
    page = report.PAGE.read_text()
    assert page.count("<!-- table: ") >= 10
    assert report.renewed(page, report.tables()) == page, "run `python -m experiments.sparsity tables`"


def test_a_dense_run_has_no_zeros() -> None:
    assert run_way(DENSE, Run(SHORT, "SGD", seed=0, share=0.0)).zeros == 0
