"""Proves what the examples claim, on their own functions: `make examples` runs this, and the scripts themselves.

Where matplotlib is missing, as after a bare `make test`, this is one skip.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is for `make examples` and `make demo`")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _common
import _shrinking as shrinking
import feature_selection
import linear_models
import overfitting
import shrink_a_network
import softmax_sparsity
import tutorial_l1_l2 as tutorial
import weight_decay_vs_l2 as decay

pytestmark = pytest.mark.usefixtures("in_one_thread")


# -- tutorial_l1_l2


@pytest.fixture(scope="module", params=["l1", "l2"])
def tutorial_runs(request) -> dict[str, tutorial.Run]:
    data = tutorial.breast_cancer(seed=0)
    initial = tutorial.make_net(30, seed=0)
    return {
        way: tutorial.train(way, initial, data, request.param, strength=0.02, epochs=10, seed=0)
        for way in (tutorial.IN_THE_LOSS, tutorial.SUBGRADIENT, tutorial.PROXIMAL)
    }


def test_tutorials_loop_is_reproduced_step_by_step(tutorial_runs) -> None:
    tutorial.assert_same_steps(tutorial_runs[tutorial.IN_THE_LOSS], tutorial_runs[tutorial.SUBGRADIENT])
    with pytest.raises(AssertionError, match="the weights differ"):
        tutorial.assert_same_steps(tutorial_runs[tutorial.IN_THE_LOSS], tutorial_runs[tutorial.PROXIMAL])


def test_tutorials_factor_of_two_matters(monkeypatch) -> None:
    """l2 = lambda instead of 2 * lambda is another loop, and the comparison sees it."""
    make = tutorial.make_optimizer

    def without_the_factor(way, model, kind, strength):
        return make(way, model, kind, strength if way == tutorial.IN_THE_LOSS else strength / 2)

    monkeypatch.setattr(tutorial, "make_optimizer", without_the_factor)
    data, initial = tutorial.breast_cancer(seed=0), tutorial.make_net(30, seed=0)
    loop, ours = (
        tutorial.train(way, initial, data, "l2", strength=0.02, epochs=1, seed=0)
        for way in (tutorial.IN_THE_LOSS, tutorial.SUBGRADIENT)
    )
    with pytest.raises(AssertionError, match="the weights differ"):
        tutorial.assert_same_steps(loop, ours)


def test_tutorials_only_the_prox_has_zeros() -> None:
    data, initial = tutorial.random_labels(seed=0), tutorial.make_net(10, seed=0)
    runs = {
        way: tutorial.train(way, initial, data, "l1", strength=0.05, epochs=10, seed=0)
        for way in (tutorial.IN_THE_LOSS, tutorial.SUBGRADIENT, tutorial.PROXIMAL)
    }
    assert runs[tutorial.IN_THE_LOSS].zeros == runs[tutorial.SUBGRADIENT].zeros == 0
    assert runs[tutorial.PROXIMAL].zeros > 0.2
    ends = [run.objective[-1] for run in runs.values()]
    assert max(ends) - min(ends) < 0.01 * (runs[tutorial.PROXIMAL].objective[0] - max(ends))


# -- softmax_sparsity


@pytest.fixture(scope="module")
def digits() -> _common.Split:
    return _common.load_split()


def test_softmax_zeros_need_no_threshold(digits) -> None:
    c = 0.01
    penalty = softmax_sparsity.norm_penalty(c, 1)
    loop = softmax_sparsity.fit(digits, 300, penalty)
    ours = softmax_sparsity.fit(digits, 300, l1=c, cost_penalty=penalty)
    assert loop.share_below(0) == 0
    assert ours.share_below(0) > 0.8
    assert loop.share_below(1e-2) - loop.share_below(1e-4) > 0.5
    assert ours.share_below(1e-2) - ours.share_below(1e-4) < 0.05
    assert abs(ours.cost / loop.cost - 1) < 0.03


def test_softmax_group_penalty_is_l2_of_another_strength(digits) -> None:
    c = 0.3
    grouped = softmax_sparsity.fit(digits, 400, softmax_sparsity.norm_penalty(c, 2), lr_falls=True)
    matched = softmax_sparsity.fit(digits, 400, l2=c / softmax_sparsity.size(grouped), lr_falls=True)
    plain = softmax_sparsity.fit(digits, 400, l2=c, lr_falls=True)
    torch.testing.assert_close(grouped.weight, matched.weight, rtol=0, atol=1e-3)
    assert softmax_sparsity.size(plain) < 0.6 * softmax_sparsity.size(grouped)


def test_softmax_group_penalty_is_group_l1(digits) -> None:
    grouped = softmax_sparsity.fit(digits, 400, softmax_sparsity.norm_penalty(0.3, 2), lr_falls=True)
    exact = softmax_sparsity.fit(digits, 400, group_l1=0.3, unit="tensor", lr_falls=True)
    assert (grouped.weight - exact.weight).norm() < 1e-3 * softmax_sparsity.size(grouped)
    above = softmax_sparsity.emptying_strength(digits) * 1.01
    assert (softmax_sparsity.fit(digits, 400, group_l1=above, unit="tensor", lr_falls=True).weight == 0).all()


def test_softmax_group_penalty_empties_and_l2_does_not(digits) -> None:
    limit = softmax_sparsity.emptying_strength(digits)
    sizes = [
        softmax_sparsity.size(softmax_sparsity.fit(digits, 400, softmax_sparsity.norm_penalty(c, 2), lr_falls=True))
        for c in (0.9 * limit, 1.1 * limit)
    ]
    assert sizes[0] > 0.3
    assert sizes[1] < 0.05
    assert softmax_sparsity.size(softmax_sparsity.fit(digits, 400, l2=1.1 * limit, lr_falls=True)) > 0.8


# -- feature_selection


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_feature_selection_is_lasso_path(seed) -> None:
    _, strengths, path, theirs = feature_selection.run(seed, count=20)  # asserts the coefficients
    np.testing.assert_array_equal(path != 0, theirs != 0)
    assert not path[0].any()
    entered = feature_selection.entered_at(path, strengths)
    assert entered == feature_selection.entered_at(theirs, strengths)
    useful = [entered[name] for name, effect in feature_selection.EFFECTS.items() if effect]
    useless = [entered[name] for name, effect in feature_selection.EFFECTS.items() if not effect]
    assert min(useful) > max(useless)


# -- linear_models


@pytest.mark.parametrize("i", range(4), ids=["lasso", "ridge", "elastic-net", "logistic"])
def test_linear_models_are_scikit_learns(i) -> None:
    problem = linear_models.make_problems()[i]
    result = linear_models.fit(problem, steps=3000)
    linear_models.assert_same(problem, result)
    assert bool((result.ours == 0).any()) == (problem.l1 > 0)
    result.ours = result.ours + 1e-5
    with pytest.raises(AssertionError, match="differ"):
        linear_models.assert_same(problem, result)


# -- weight_decay_vs_l2


def test_decay_coupled_and_proximal_are_ridge_and_decoupled_is_not() -> None:
    problem = decay.LeastSquares.load()
    ends = {way: decay.train(problem, way, decay.LAMBDA, steps=1500) for way in decay.WAYS}
    decay.check(problem, {decay.LAMBDA: ends})
    ridge, boxed = problem.ridge(decay.LAMBDA), problem.in_box(decay.LAMBDA)
    decoupled = ends[decay.DECOUPLED][-1]
    assert np.abs(decoupled - boxed).max() < 0.1 * np.abs(decoupled - ridge).max()
    # Three paths: the two that end together part on the way.
    assert np.abs(ends[decay.COUPLED] - ends[decay.PROXIMAL]).max() > 0.02


# -- overfitting


@pytest.fixture(scope="module")
def recipes() -> dict[str, overfitting.Recipe]:
    return {recipe.name: recipe for recipe in overfitting.RECIPES}


@pytest.fixture(scope="module")
def noisy_digits() -> _common.Split:
    return overfitting.with_wrong_labels(
        _common.load_split(train_size=overfitting.TRAINING_IMAGES, test_size=None), seed=0
    )


def test_overfitting_penalties_help(recipes, noisy_digits) -> None:
    runs = {
        name: overfitting.train(recipes[name], noisy_digits, epochs=150, seed=0)
        for name in ("nothing", "L1, 0.0015", "L2, 0.02", "early stopping")
    }
    plain = runs.pop("nothing")
    assert plain.train_loss[-1] < 0.05
    assert plain.test_loss[-1] > 1.8 * min(plain.test_loss)
    for name, run in runs.items():
        assert run.test_loss[run.stop] < 0.75 * plain.test_loss[-1], name
        assert run.accuracy[run.stop] > plain.accuracy[-1], name
    assert overfitting.zeros(runs["L1, 0.0015"].net) > 0.5
    assert runs["early stopping"].stop < 100


def test_overfitting_l2_zeros_are_what_no_gradient_holds_up(recipes, noisy_digits) -> None:
    """A weight is zero only if on no training image its input is there while its unit fires."""
    net = overfitting.train(recipes["L2, 0.02"], noisy_digits, epochs=200, seed=0).net
    inputs, zeros = noisy_digits.train_x, 0
    for layer in net:
        outputs = layer(inputs)
        if isinstance(layer, torch.nn.Linear):
            is_zero = layer.weight.detach() == 0
            fires = outputs > 0 if layer is not net[-1] else torch.ones_like(outputs, dtype=torch.bool)
            has_gradient = fires.float().T @ (inputs != 0).float() > 0
            assert not (is_zero & has_gradient).any()
            zeros += int(is_zero.sum())
        inputs = outputs
    assert zeros > 500


def test_overfitting_clipping_tames_a_large_lr(noisy_digits) -> None:
    wild, tamed = (
        overfitting.train(recipe, noisy_digits, epochs=150, seed=0)
        for recipe in overfitting.RECIPES
        if recipe.sgd is not None
    )
    assert wild.train_loss[-1] > 1
    assert tamed.train_loss[-1] < 0.1


def test_overfitting_batch_norm_is_exempt(recipes) -> None:
    recipe = recipes["batch norm, L1 0.001"]
    net = overfitting.make_net(recipe, seed=0)
    optimizer = overfitting.make_optimizer(recipe, net)
    strengths = {param: group["l1"] for group in optimizer.param_groups for param in group["params"]}
    assert len(strengths) == len(list(net.parameters())) > 6
    for layer in net:
        if isinstance(layer, torch.nn.Linear):
            assert (strengths[layer.weight], strengths[layer.bias]) == (1e-3, 0)
        elif isinstance(layer, torch.nn.BatchNorm1d):
            assert (strengths[layer.weight], strengths[layer.bias]) == (0, 0)


# -- demo, part 4, and shrink_a_network


def test_a_net_is_four_times_smaller_and_as_good(digits) -> None:
    """Its multiplications, too, by more than four: the time at a large batch follows them."""
    dense, small = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        initial = _common.mlp(*shrinking.WIDTHS)
        dense.append(shrinking.shrink(shrinking.DENSE, 0.0, initial, digits, 550, seed))
        small.append(shrinking.shrink(shrinking.ROWS, shrinking.UNITS[0], initial, digits, 550, seed))
    for one in small:
        assert one.net.report.max_difference < 1e-4
        assert one.net.report.flops[0] > 4 * one.net.report.flops[1]
        assert shrinking.numbers(one.trained) > 4 * shrinking.numbers(one.net)
        assert shrinking.stored(one.trained) > 4 * shrinking.stored(one.net)
    assert np.mean([one.accuracy for one in small]) > np.mean([one.accuracy for one in dense]) - 0.005


def test_single_zeros_are_as_many_by_magnitude(digits) -> None:
    torch.manual_seed(0)
    initial = _common.mlp(*shrinking.WIDTHS)
    ways = [shrinking.shrink(way, 0.95, initial, digits, 100, 0) for way in (shrinking.SINGLES, shrinking.MAGNITUDE)]
    ours, theirs = (shrinking.numbers(way.net) for way in ways)
    assert abs(ours - theirs) <= 1
    assert ours < 0.06 * shrinking.numbers(initial)


@pytest.mark.filterwarnings("ignore:at a sparsity of")  # so few steps leave a layer one row
def test_a_network_shrinks_while_it_trains(tmp_path) -> None:
    small, accuracy = shrink_a_network.run(200, 0, tmp_path / "small.pt")
    assert accuracy["before the cut"] == accuracy["after it"]
    assert accuracy["at the end"] > 0.95
    numel = sum(param.numel() for param in shrink_a_network.ResidualNet().parameters())
    assert sum(param.numel() for param in small.parameters()) < numel / 4
