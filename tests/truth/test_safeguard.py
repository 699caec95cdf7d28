"""Proves what the safeguard d_prox = max(d, (l1 + l2 |w_old|) / 2) gives and leaves alone, and why the factor is 1/2.

Centered RMSprop's d vanishes at a solution. There the floor is held against s, what d is without the centering, and d
goes with it: d_prox = d * max(1, floor / s).

A penalty moves no weight by more than 2 * lr a step, so a row that never saw a gradient does not vanish at once; and
the solutions stay exact, also from where the metric is small. Without the floor the first is lost, with a factor of 1
the second.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from figures import at_most
from helpers import FusedRegAdagrad, FusedRegAdam, FusedRegAdamW, FusedRegRMSprop
from solvers import (
    SOLVERS,
    Solver,
    Strength,
    diabetes,
    minimise,
    prox_with_bare_floor,
    prox_with_floor,
    scikit_learns,
    violations,
)

import fusedreg
from fusedreg.backends import reference

STRENGTHS: list[Strength] = [(5.0, 0.0), (5.0, 0.3), (0.0, 0.3)]
LR = 0.01
# RMSprop with torch's eps, 1e-8, here, where these strengths need no other.
HERE = {
    "adam": SOLVERS["adam"],
    "amsgrad": SOLVERS["amsgrad"],
    "rmsprop": Solver(FusedRegRMSprop, {"lr": 2.0}, 1000, falls_to=0.1),
    "rmsprop-centered": Solver(FusedRegRMSprop, {"lr": 1.0, "alpha": 0.9, "centered": True}, 1000, falls_to=1e-10),
    "adagrad": Solver(FusedRegAdagrad, {"lr": 30.0}, 1000),
}

# -- the solutions


def from_the_least_squares_solution(solver: str, **options) -> np.ndarray:
    """There the loss has no gradient, so that the metric is eps and the floor is all that holds the prox."""
    problem = diabetes()
    start = np.linalg.solve(problem.gram.numpy(), problem.correlation.numpy())
    assert np.abs(problem.gradient(torch.from_numpy(start)).numpy()).max() < 1e-10
    return minimise(problem, STRENGTHS, HERE[solver], steps=1000, start=np.tile(start, (len(STRENGTHS), 1)), **options)


@pytest.mark.parametrize("solver", HERE)
def test_solutions_are_exact_from_where_the_metric_is_small(solver, backend) -> None:
    fit = from_the_least_squares_solution(solver, backend=backend)
    truth = scikit_learns(diabetes(), STRENGTHS)
    np.testing.assert_allclose(fit, truth, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(fit != 0, truth != 0)
    assert violations(diabetes(), fit, STRENGTHS).max() < 1e-8


@pytest.mark.parametrize(
    ("factor", "solver"),
    [(0.0, "adam"), (0.5, "adam"), (1.0, "adam"), (1.0, "amsgrad"), (0.5, "rmsprop")],
)
def test_solutions_are_exact_up_to_one_half_and_not_at_one(factor, solver, monkeypatch) -> None:
    """With 1, any weight where |gradient| = d is below the floor stays where it is.

    The step moves it by lr * |gradient| / d = lr, and the prox back by lr * (l1 + l2 |w|) / d_prox = lr. With 1/2 the
    prox moves it by 2 * lr there.
    """
    monkeypatch.setattr(reference, "prox", prox_with_floor(factor))
    fit = from_the_least_squares_solution(solver, backend="reference")
    distance = np.abs(fit - scikit_learns(diabetes(), STRENGTHS)).max(1)
    if factor <= 0.5:
        assert distance.max() < 1e-8
    else:
        assert distance.min() > 1


# On its support the loss has a gradient of l1, off it one of less; under half of l1, the floor acts.
CENTERED_STRENGTHS: list[Strength] = [(5.0, 0.0), (20.0, 0.0), (5.0, 0.3)]


@pytest.mark.parametrize("floor", ["right", "held against d", "without its ratio to d"])
def test_a_centered_metric_vanishes_at_the_solution_and_the_floor_goes_with_it(floor, monkeypatch) -> None:
    """Held against d itself, the floor acts wherever the gradient stands still. Held against s, but put in d's place,
    it acts on zeros with a small gradient: the step takes them to lr * |gradient| / d, the prox back by 2 * lr only."""
    wrong = {"held against d": prox_with_floor(0.5), "without its ratio to d": prox_with_bare_floor}
    if floor in wrong:
        monkeypatch.setattr(reference, "prox", wrong[floor])
    truth = scikit_learns(diabetes(), CENTERED_STRENGTHS)
    gradients = np.abs(diabetes().gradient(torch.from_numpy(truth)).numpy())
    assert ((gradients < 0.4 * np.array(CENTERED_STRENGTHS)[:, :1]).any(1)).all()
    solver = dataclasses.replace(HERE["rmsprop-centered"], steps=1500)
    distance = np.abs(minimise(diabetes(), CENTERED_STRENGTHS, solver, backend="reference") - truth).max(1)
    if floor == "right":
        assert distance.max() < 1e-8
    else:
        assert distance.min() > 0.5


# -- weights without a gradient


class UnusedRow(torch.nn.Module):
    """Of ten embeddings, nine are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8, dtype=torch.float64)

    def forward(self) -> torch.Tensor:
        return (self.embedding(torch.arange(9)) - 1).square().mean()

    def untouched(self) -> torch.Tensor:
        return self.embedding.weight[9].detach().clone()


class DeadUnit(torch.nn.Module):
    """Of four hidden units, one is off for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 4, dtype=torch.float64)
        self.second = torch.nn.Linear(4, 1, dtype=torch.float64)
        torch.nn.init.constant_(self.first.bias, 1.0)
        self.first.bias.data[2] = -1e6
        self.X = torch.randn(16, 8, dtype=torch.float64)

    def forward(self) -> torch.Tensor:
        return (self.second(self.first(self.X).relu()) - 1).square().mean()

    def untouched(self) -> torch.Tensor:
        return self.first.weight[2].detach().clone()


FLAVOURS = {
    "adam": (FusedRegAdam, {}),
    "amsgrad": (FusedRegAdam, {"amsgrad": True}),
    "adamw-no-decay": (FusedRegAdamW, {"weight_decay": 0.0}),
    "rmsprop": (FusedRegRMSprop, {}),
    "rmsprop-centered": (FusedRegRMSprop, {"centered": True}),
    "adagrad": (FusedRegAdagrad, {}),
}
PENALTIES = {"l1": (1e-3, 0.0), "l2": (0.0, 0.1), "both": (1e-3, 0.1), "huge": (100.0, 10.0)}


def trajectory(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    """The weights that get no gradient, before and after each step."""
    seen = [model.untouched()]
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        seen.append(model.untouched())
    return torch.stack(seen)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("model", [UnusedRow, DeadUnit], ids=lambda cls: cls.__name__)
def test_a_weight_without_gradients_moves_by_at_most_twice_lr(model, flavour, penalty, backend) -> None:
    cls, options = FLAVOURS[flavour]
    l1, l2 = PENALTIES[penalty]
    model = model()
    optimizer = cls(model.parameters(), lr=LR, l1=l1, l2=l2, backend=backend, **options)
    seen = trajectory(model, optimizer, steps=5)
    moves = (seen[1:] - seen[:-1]).abs()
    assert (seen.abs().diff(dim=0) <= 0).all()
    at_most(2 * (1 + 1e-12), moves.max().item() / LR, "a weight without gradients: move, in lr")
    # not by standing still
    assert moves.max() > 0.5 * LR


def test_a_weight_without_gradients_goes_to_zero_in_steps_of_twice_lr(backend) -> None:
    """As if it had a gradient of half l1: soon, and not at once."""
    model, steps = UnusedRow(), 150
    optimizer = FusedRegAdam(model.parameters(), lr=LR, l1=1e-3, backend=backend)
    seen = trajectory(model, optimizer, steps)
    walked = 2 * LR * torch.arange(steps + 1, dtype=seen.dtype, device=seen.device)[:, None]
    expected = seen[0].sign() * (seen[0].abs() - walked).clamp(min=0)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)
    assert (seen[1] != 0).all()
    assert (seen[-1] == 0).all()


@pytest.mark.parametrize("model", [UnusedRow, DeadUnit], ids=lambda cls: cls.__name__)
def test_without_the_floor_it_vanishes_at_once(model, monkeypatch) -> None:
    monkeypatch.setattr(reference, "prox", prox_with_floor(0.0))
    model = model()
    optimizer = FusedRegAdam(model.parameters(), lr=LR, l1=1e-3, backend="reference")
    seen = trajectory(model, optimizer, steps=1)
    assert (seen[0] != 0).all()
    assert seen[0].abs().max() > 2 * LR
    assert (seen[1] == 0).all()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_a_penalty_adds_to_any_step_is_bounded(flavour, backend) -> None:
    """|x - z| <= 2 lr, or where the step made the weight larger, 2 lr (l1 + l2 |x|) / (l1 + l2 |w_old|).

    In a centered metric, s / d times that: twice what a gradient of the size s moves it. z is the same step without
    penalties. Gradients over 16 decades, so that the metric is on both sides of the floor.
    """
    cls, options = FLAVOURS[flavour]
    l1, l2 = 1e-2, 0.5
    generator = torch.Generator().manual_seed(0)
    device = torch.get_default_device()

    def draw() -> torch.Tensor:
        return torch.randn(2000, generator=generator, dtype=torch.float64, device="cpu").to(device)

    param, twin = (torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64)) for _ in range(2))
    optimizer = cls([param], lr=LR, l1=l1, l2=l2, backend=backend, **options)
    bare = cls([twin], lr=LR, backend=backend, **options)
    scale = 10 ** torch.linspace(-12, 4, 2000, dtype=torch.float64)
    for _ in range(10):
        w_old = draw()
        param.data.copy_(w_old)
        twin.data.copy_(w_old)
        param.grad = twin.grad = draw() * scale
        optimizer.step()
        bare.step()
        x, z = param.detach(), twin.detach()
        limit = 2 * LR * ((l1 + l2 * x.abs()) / (l1 + l2 * w_old.abs())).clamp(min=1)
        if options.get("centered"):
            v, eps = optimizer.state[param]["square_avg"], 1e-8
            variance = (v - optimizer.state[param]["grad_avg"].square()).clamp(min=0)
            limit *= (v.sqrt() + eps) / (variance.sqrt() + eps)
        assert ((x - z).abs() <= limit * (1 + 1e-9)).all()
        assert (x.abs() <= z.abs()).all()
        # Reached to a tenth, where the metric is below the floor.
        assert ((x - z).abs() > 0.9 * 2 * LR).any()


# -- the other penalties


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 3.0, 1e3])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_minimax_concave_penalty_moves_a_weight_without_gradients_by_at_most_four_lr(
    flavour, gamma, backend
) -> None:
    """It is more concave than a metric of eps is convex. Where it is flat, no weight moves."""
    cls, options = FLAVOURS[flavour]
    for l1 in (1e-3, 0.1, 100.0):
        model = UnusedRow()
        optimizer = cls(model.parameters(), lr=LR, l1=l1, mcp_gamma=gamma, backend=backend, **options)
        seen = trajectory(model, optimizer, steps=4)
        moves = (seen[1:] - seen[:-1]).abs()
        assert (seen.abs().diff(dim=0) <= 0).all()
        at_most(4 * (1 + 1e-12), moves.max().item() / LR, "minimax concave: a weight without gradients: move, in lr")
        assert (moves[:, seen[0].abs() > gamma * l1] == 0).all()
        assert moves.max() > 0.5 * LR or gamma * l1 < 0.5


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_l0_penalty_takes_what_never_saw_a_gradient(flavour, backend) -> None:
    """Its metric is eps, by which no weight is worth an l0: it goes at once. The others are judged by what they do."""
    cls, options = FLAVOURS[flavour]
    model = UnusedRow()
    optimizer = cls(model.parameters(), lr=LR, l0=1e-3, backend=backend, **options)
    seen = trajectory(model, optimizer, steps=3)
    assert (seen[0] != 0).all()
    assert (seen[1:] == 0).all()
    assert (model.embedding.weight[:9] != 0).float().mean() > 0.5


def test_without_a_metric_there_is_no_floor(backend) -> None:
    """RAdam's first steps are gradient descent: their prox is that of a step of lr, however strong the penalties."""
    lr, l1, l2 = 0.01, 6.0, 4.0  # a floor would be at 3 + 2 |w|, above the metric of 1
    w, g = (torch.randn(50, dtype=torch.float64) for _ in range(2))
    param = w.clone().requires_grad_()
    param.grad = g
    fusedreg.FusedRegRAdam([param], lr=lr, l1=l1, l2=l2, backend=backend).step()
    z = w - lr * g
    expected = z.sign() * (z.abs() - lr * l1).clamp(min=0) / (1 + lr * l2)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)
    assert (expected != 0).float().mean() > 0.5
