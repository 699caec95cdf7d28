"""Where one answer is right to the last bit: 16-bit numbers, ties at a threshold, sums that must not cancel."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAST, needs_cpp
from helpers import OPTIMIZERS, FusedRegAdam, FusedRegRMSprop, FusedRegSGD

pytestmark = needs_cpp

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
halves = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_numbers(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """The same bits, signs of zeros included; a NaN has no one pattern."""
    assert ours.isnan().equal(truth.isnan())
    numbers = ~truth.isnan()
    assert ours[numbers].view(torch.int16).equal(truth[numbers].view(torch.int16))


@halves
def test_every_16_bit_number_is_read_and_written_as_it_is(dtype, instruction_set) -> None:
    patterns = all_patterns(dtype)
    param = patterns.clone().requires_grad_()
    param.grad = torch.zeros_like(patterns)
    FusedRegSGD([param], lr=0.0, backend=FAST).step()
    assert_same_numbers(param.detach(), patterns)


@halves
@pytest.mark.parametrize("step", [257, 4095, 20011])
def test_every_16_bit_number_is_rounded_as_torch_rounds_it(dtype, step, instruction_set) -> None:
    """w - g is one float32 operation; the sums meet every exponent, ties, subnormals and overflow."""
    weights = all_patterns(dtype)
    gradients = weights[(torch.arange(2**16) * step + 12345) % 2**16]
    param = weights.clone().requires_grad_()
    param.grad = gradients.clone()
    FusedRegSGD([param], lr=1.0, backend=FAST).step()
    exact = weights.float() - gradients.float()
    assert_same_numbers(param.detach(), exact.to(dtype))
    ties = (exact.view(torch.int32) & (0xFFFF if dtype == torch.bfloat16 else 0x1FFF)) == (
        0x8000 if dtype == torch.bfloat16 else 0x1000
    )
    assert (ties & exact.isfinite()).sum() > 100


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [2.0**-8, 0.375, 1.0, 24.0])
@pytest.mark.parametrize("mode", ["proximal", "decoupled"])
def test_a_weight_on_the_threshold_is_zero_and_the_next_is_not(mode, threshold, dtype, backend) -> None:
    """|z| = lr * l1 exactly, and one unit in the last place on either side of it."""
    t = torch.tensor(threshold, dtype=dtype)
    around = [torch.nextafter(t, to) for to in (torch.zeros((), dtype=dtype), t, torch.tensor(math.inf, dtype=dtype))]
    weight = torch.stack([sign * w for sign in (1, -1) for w in around]).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    FusedRegSGD([weight], lr=0.5, l1=2 * threshold, penalty_mode=mode, backend=backend).step()
    beyond = around[2] - t
    assert beyond > 0
    assert weight.tolist() == [0, 0, beyond.item(), 0, 0, -beyond.item()]
    assert not torch.signbit(weight.detach()[[0, 1, 3, 4]]).any()


# Their metric is eps where no gradient has come yet, and tau is lr.
STEP_BY_LR_OVER_EPS = [cls for cls in OPTIMIZERS if cls.spec.name in ("adam", "rmsprop", "adagrad")]


@pytest.mark.parametrize("cls", STEP_BY_LR_OVER_EPS)
@pytest.mark.parametrize(("l2", "most"), [(1e-9, 23), (1.0, 19)])
@pytest.mark.parametrize(("eps", "least"), [(1.0, -37), (1e-8, -29), (1e-12, -25), (1e-15, -22)])
def test_multiplying_by_the_metric_neither_overflows_nor_underflows(cls, eps, least, l2, most) -> None:
    """The code takes soft(d * w, ...) / (d + ...), where the formula has soft(w, ...) / (1 + ...).

    Weights come out with a few roundings where d * |w| is a normal float32: between 1.2e-38 and 3.4e38. Here d is the
    larger of eps and l2 * |w| / 2.
    """
    magnitudes = torch.logspace(least, most, 200, dtype=torch.float64).float()
    weight = torch.cat([magnitudes, -magnitudes]).requires_grad_()
    old, lr = weight.detach().double(), 1e-3
    weight.grad = torch.zeros_like(weight)
    cls([weight], lr=lr, eps=eps, weight_decay=0.0, l2=l2, backend=FAST).step()
    d = torch.maximum(torch.tensor(eps, dtype=torch.float64), l2 * old.abs() / 2)
    expected = old / (1 + lr * l2 / d)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=8 * 2.0**-23, atol=0)


BETAS = [(0.0, 0.0), (0.0, 0.9), (0.3, 0.2), (0.49, 0.999), (0.5, 0.9), (0.9, 0.999)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("cls", "options", "average"),
    [
        *((FusedRegAdam, {"betas": betas}, "exp_avg") for betas in BETAS),
        *((FusedRegRMSprop, {"centered": True, "alpha": alpha}, "grad_avg") for alpha in (0.0, 0.3, 0.5, 0.99)),
    ],
)
def test_a_small_gradient_after_a_large_one(cls, options, average, dtype, backend) -> None:
    """exp_avg + (1 - beta1) * (g - exp_avg) loses a g that is far smaller than exp_avg; with a small beta1 nothing else
    is left of the sum. torch's lerp starts from the nearer end; with beta1 = 0, exp_avg is the gradient, to the bit."""
    results = []
    for each, backends in ((cls.spec.twin, {}), (cls, {"backend": backend})):
        weight = torch.zeros(64, dtype=dtype).requires_grad_()
        optimizer = each([weight], lr=0.1, **options, **backends)
        for scale in (1e5, 1e-6, 1e-6):
            weight.grad = scale * torch.linspace(1, 2, 64, dtype=dtype)
            optimizer.step()
        results.append((weight.detach(), optimizer.state[weight][average]))
    if 0.0 in (options.get("alpha"), options.get("betas", (None,))[0]):
        assert results[1][1].equal(weight.grad)
    eps = torch.finfo(dtype).eps
    # A variance is a difference, of which little may be left; the weights follow it.
    for ours, twins in list(zip(results[1], results[0], strict=True))[1 if "centered" in options else 0 :]:
        torch.testing.assert_close(ours, twins, rtol=16 * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_variance_that_rounding_makes_negative_is_zero(dtype, backend) -> None:
    """A gradient that stands still has none, and v - m^2 comes out on either side of zero. torch's weight is a NaN."""
    gradient = torch.linspace(0.1, 3, 200, dtype=dtype)
    weight, twin = (torch.zeros(200, dtype=dtype).requires_grad_() for _ in range(2))
    weight.grad, twin.grad = gradient, gradient.clone()
    optimizer = FusedRegRMSprop([weight], lr=1e-9, alpha=0.5, centered=True, l1=0.01, backend=backend)
    twins = torch.optim.RMSprop([twin], lr=1e-9, alpha=0.5, centered=True)
    for _ in range(100):
        optimizer.step()
        twins.step()
    assert twin.isnan().any()
    assert weight.isfinite().all()
