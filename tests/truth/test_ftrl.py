"""FTRL-Proximal against its closed form, written anew from the papers, and against numbers that TensorFlow has."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import FusedRegFTRL
from torch import Tensor


class ClosedForm:
    """McMahan et al., KDD 2013, algorithm 1, in its own words: ``z`` and ``n``, per coordinate, from w = 0."""

    def __init__(self, size: int, lr: float, beta: float) -> None:
        self.lr, self.beta = lr, beta
        self.w, self.z, self.n = (torch.zeros(size, dtype=torch.float64) for _ in range(3))

    def step(self, g: Tensor, lambda1: float, lambda2: float = 0.0) -> None:
        sigma = ((self.n + g * g).sqrt() - self.n.sqrt()) / self.lr
        self.z += g - sigma * self.w
        self.n += g * g
        scale = (self.beta + self.n.sqrt()) / self.lr + lambda2
        self.w = torch.where(self.z.abs() <= lambda1, 0.0, -(self.z - self.z.sign() * lambda1) / scale)


def stream(steps: int, size: int) -> list[Tensor]:
    """Noise around a mean that turns: some weights come to life, go, and come back with the other sign."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.linspace(-1, 1, size, dtype=torch.float64)
    return [
        mean * math.cos(i / 30) + 2 * torch.randn(size, generator=generator, dtype=torch.float64) for i in range(steps)
    ]


L1_OF_STEP = {
    "none": lambda i: 0.0,
    "little": lambda i: 1e-3,
    "in every step": lambda i: 0.3,
    "changing": lambda i: 0.05 * (i % 9),
    "once": lambda i: 5.0 * (i == 0),
}


@pytest.mark.parametrize("name", L1_OF_STEP)
def test_every_step_is_the_closed_form(name, backend) -> None:
    """Its lambda1 is the sum of our l1 over the steps: t * l1; or, as in KDD 2013, all of it in the first step."""
    l1, lr, beta, size = L1_OF_STEP[name], 0.5, 0.7, 60
    form = ClosedForm(size, lr, beta)
    w = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = FusedRegFTRL([w], lr=lr, beta=beta, backend=backend)
    lambda1, zeros, crossings = 0.0, 0, 0
    for i, g in enumerate(stream(300, size)):
        lambda1 += l1(i)
        before = w.detach().cpu().clone()
        optimizer.param_groups[0]["l1"] = l1(i)
        w.grad = g.to(w.device)
        optimizer.step()
        form.step(g, lambda1)
        torch.testing.assert_close(w.detach().cpu(), form.w, rtol=1e-10, atol=1e-12)
        assert (w.detach().cpu() == 0).equal(form.w == 0)
        zeros += int((form.w == 0).sum())
        crossings += int((before * form.w < 0).sum())
    assert crossings > 20 or lambda1 > 1
    assert zeros > 300 or lambda1 < 1
    assert optimizer.state[w]["l1_sum"].item() == pytest.approx(lambda1)


@pytest.mark.parametrize("lambda2", [0.0, 4.0])
def test_its_lambda2_is_a_larger_beta(lambda2, backend) -> None:
    """It stands beside the sum of squares, once and not in every step: lr * lambda2 more in beta, from w = 0."""
    lr, beta, size = 0.5, 0.7, 20
    form = ClosedForm(size, lr, beta)
    w = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = FusedRegFTRL([w], lr=lr, beta=beta + lr * lambda2, l1=0.2, backend=backend)
    for i, g in enumerate(stream(100, size)):
        w.grad = g.to(w.device)
        optimizer.step()
        form.step(g, 0.2 * (i + 1), lambda2)
        torch.testing.assert_close(w.detach().cpu(), form.w, rtol=1e-10, atol=1e-12)


# The expected weights of tensorflow/python/training/ftrl_test.py, float32: 10 steps with the same gradients, lr 3, an
# accumulator that begins at 0.1. TensorFlow has no beta, and twice its l2 is the papers' lambda2.
TENSORFLOWS = [
    (0.001, 0.0, (-7.66718769, -10.91273689, -0.93460727, -1.86147261)),
    (0.001, 2.0, (-0.24059935, -0.46829352, -0.02406147, -0.04830509)),
]


@pytest.mark.parametrize(("l1", "l2", "expected"), TENSORFLOWS)
def test_the_numbers_of_tensorflow(l1, l2, expected, backend) -> None:
    lr, start, g = 3.0, torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([0.1, 0.2, 0.01, 0.02])
    initial, beta = 0.1, 1e-12 + lr * 2 * l2
    # TensorFlow's sums begin at 0 wherever a weight begins, so that its first step takes of it sigma's share alone.
    root = (initial + g.double() ** 2).sqrt()
    share = (root - initial**0.5) / (beta + root)
    w = torch.nn.Parameter((start * share).float().to(torch.get_default_device()))
    optimizer = FusedRegFTRL([w], lr=lr, beta=beta, initial_accumulator_value=initial, l1=l1, backend=backend)
    for _ in range(10):
        w.grad = g.to(w.device)
        optimizer.step()
        optimizer.param_groups[0]["l1"] = 0.0  # it stands once beside the sum of gradients
    torch.testing.assert_close(w.detach().cpu(), torch.tensor(expected), rtol=2e-6, atol=2e-7)


def test_noise_wakes_no_weight(backend) -> None:
    """Gradients without a mean, larger than l1: Adagrad's prox lets each of them through, and a sum does not grow."""
    generator = torch.Generator().manual_seed(1)
    w = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = FusedRegFTRL([w], lr=0.5, l1=0.5, backend=backend)
    awake = []
    for _ in range(400):
        w.grad = torch.randn(200, generator=generator, dtype=torch.float64).to(w.device)
        optimizer.step()
        awake.append(int((w != 0).sum()))
    assert awake[0] > 50
    assert max(awake[-100:]) <= 2
