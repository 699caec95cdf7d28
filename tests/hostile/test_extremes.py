"""Infinite and NaN weights, gradients and norms, and strengths at the ends of their range: the outcome is defined."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from conftest import EXTENSION, FAST
from helpers import OPTIMIZERS, FusedRegAdam, FusedRegSGD, known

import fusedreg
from fusedreg.penalties import PENALTY_MODES

LOST = [math.inf, -math.inf, math.nan]

HAVE_EPS = [cls for cls in OPTIMIZERS if any(h.name == "eps" for h in cls.spec.hyperparameters)]


def weights_and_gradients(*, weights=(), gradients=(), dtype=torch.float32):
    """Eight ordinary elements, some of which are replaced."""
    w, g = torch.linspace(0.5, 1.5, 8, dtype=dtype), torch.linspace(-1, 1, 8, dtype=dtype)
    w[: len(weights)] = torch.tensor(weights, dtype=dtype)
    g[: len(gradients)] = torch.tensor(gradients, dtype=dtype)
    w.requires_grad_()
    w.grad = g
    return w


@pytest.mark.skipif(EXTENSION is None, reason="no compiled extension")
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("strength", ["l1", "l2", "weight_decay"])
@pytest.mark.parametrize("mode", PENALTY_MODES)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_infinite_and_nan_weights_are_lost_in_the_same_way(cls, mode, strength, decoupled) -> None:
    """One strength alone: a term that is not there must not be 0 * inf.

    The weight itself may be infinite on one backend and NaN on the other where a prox in a metric is multiplied out.
    """
    results = []
    for backend in (FAST, "reference"):
        param = weights_and_gradients(weights=LOST)
        options = {**known(cls, weight_decay=0.0), strength: 0.125, "penalty_mode": mode}
        if "decoupled_weight_decay" in inspect.signature(cls).parameters:
            options["decoupled_weight_decay"] = decoupled
        optimizer = cls([param], lr=0.1, backend=backend, **options)
        optimizer.step()
        weight = param.detach()
        assert weight[2].isnan()
        assert weight.isfinite().tolist() == [False] * 3 + [True] * 5
        if mode == "proximal" and cls is not FusedRegSGD:
            weight = weight[2:]
        results.append([weight, *optimizer.state[param].values()])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, equal_nan=True)


@pytest.mark.skipif(EXTENSION is None, reason="no compiled extension")
@pytest.mark.parametrize("strengths", [{"l1": 0.125}, {"l1": 0.125, "l2": 0.5}, {"l1": 0.125, "l0": 0.5}, {"upper": 2}])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_infinite_and_nan_gradients_are_lost_in_the_same_way(cls, strengths) -> None:
    """And where a square alone is infinite, there may be a NaN: never a zero of an infinite threshold."""
    for mode in cls.spec.modes:
        if mode == "subgradient" and "l0" in strengths:
            continue
        results = []
        for backend in (FAST, "reference"):
            param = weights_and_gradients(weights=(1, 1, 1, 0, 1), gradients=(*LOST, math.inf, 1e25))
            options = known(cls, weight_decay=0.0, penalty_mode=mode) | strengths
            optimizer = cls([param], lr=0.1, backend=backend, **options)
            optimizer.step()
            results.append([param.detach(), *optimizer.state[param].values()])
        lost = results[0][0].isnan()
        assert not lost[5:].any()
        results[0][0][4] = results[1][0][4] if lost[4] else results[0][0][4]
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, equal_nan=True)


def test_an_infinite_weight_beside_a_subgradient_equals_the_loop(backend) -> None:
    """loss += l1 * |w|: the penalty's gradient at infinity is l1, and the weight stays infinite."""
    ours, twins = weights_and_gradients(weights=LOST), weights_and_gradients(weights=LOST)
    FusedRegSGD([ours], lr=0.1, momentum=0.9, l1=0.1, penalty_mode="subgradient", backend=backend).step()
    twins.grad = twins.grad + 0.1 * twins.detach().sign()
    torch.optim.SGD([twins], lr=0.1, momentum=0.9).step()
    torch.testing.assert_close(ours, twins, equal_nan=True)


@pytest.mark.parametrize("mode", PENALTY_MODES)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_lr_0_moves_no_weight_whatever_it_is(cls, mode, backend) -> None:
    special = [*LOST, 1e-45, -1e-40, 3e38, -3e38]
    param = weights_and_gradients(weights=special)
    before = param.detach().clone()
    options = known(cls, lr=0.0, l1=0.5, weight_decay=0.0, penalty_mode=mode)
    if cls.spec.name == "rprop":  # its lr is where step sizes begin
        options["step_sizes"] = (0.0, 50.0)
    optimizer = cls([param], backend=backend, **options)
    optimizer.step()
    torch.testing.assert_close(param.detach(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", LOST)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_max_grad_norm_inf_measures_and_does_not_clip(cls, bad, backend) -> None:
    """docs/formulas.md. One gradient that overflowed must not cost every weight of the model."""
    results = []
    for bound in (math.inf, None):
        params = [weights_and_gradients(gradients=[bad]), weights_and_gradients()]
        optimizer = cls(params, lr=0.1, max_grad_norm=bound, backend=backend)
        optimizer.step()
        results.append(torch.cat([param.detach() for param in params]))
        if bound is not None:
            assert not optimizer.grad_norm.isfinite()
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert results[0][1:].isfinite().all()


@pytest.mark.parametrize("bad", LOST)
def test_a_norm_that_is_not_finite_does_what_torchs_clip_does(bad, backend) -> None:
    results = []
    for ours in (True, False):
        params = [weights_and_gradients(gradients=[bad]), weights_and_gradients()]
        if ours:
            FusedRegSGD(params, lr=0.1, max_grad_norm=1.0, backend=backend).step()
        else:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            torch.optim.SGD(params, lr=0.1).step()
        results.append(torch.cat([param.detach() for param in params]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip_value", [3.4e38, 1e39, 1e300, math.inf])
def test_a_clip_value_that_no_float32_reaches_clips_nothing(clip_value, dtype, backend) -> None:
    results = []
    for bound in (clip_value, None):
        param = weights_and_gradients(dtype=dtype)
        FusedRegSGD([param], lr=0.1, clip_value=bound, backend=backend).step()
        results.append(param.detach())
    assert results[0].equal(results[1])


@pytest.mark.parametrize("key", ["l1", "l2", "weight_decay", "lr"])
@pytest.mark.parametrize("value", [5e-324, 1e-50, 1e-45])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_strength_that_float32_cannot_hold_is_none(cls, value, key, backend) -> None:
    results = []
    for strength in (value, 0.0):
        param = weights_and_gradients()
        options = {**known(cls, lr=0.1, weight_decay=0.0), "l1": 0.1 if key == "lr" else 0.0, key: strength}
        cls([param], backend=backend, **options).step()
        results.append(param.detach())
    before = weights_and_gradients().detach()
    # Of the weight and of its step, which may take most of it.
    bound = 2 * torch.finfo(torch.float32).eps * (before.abs() + (results[1] - before).abs())
    assert ((results[0] - results[1]).abs() <= bound).all()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_every_16_bit_gradient_may_be_infinite(scale, backend) -> None:
    """As after an overflow in fp16, had GradScaler not looked: nothing crashes, and NaN or inf is what comes out."""
    param = torch.ones(100, dtype=torch.float16).requires_grad_()
    param.grad = torch.full_like(param, math.inf)
    optimizer = FusedRegAdam([param], lr=0.1, l1=0.1, max_grad_norm=1.0, clip_value=3.0, backend=backend)
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    # clipped to 3 each: an infinite gradient is one of a known sign
    assert param.isfinite().all()
    assert optimizer.grad_norm == 30.0


def test_an_empty_parameter_has_no_elements_to_overlap(backend) -> None:
    param = torch.zeros(1, 0).expand(6, 0).requires_grad_()
    other = torch.ones(2).requires_grad_()
    param.grad, other.grad = torch.zeros(6, 0), torch.ones(2)
    FusedRegSGD([param, other], lr=0.5, backend=backend).step()
    assert other.tolist() == [0.5, 0.5]


@pytest.mark.skipif(EXTENSION is None, reason="no compiled extension")
@pytest.mark.parametrize("nesterov", [False, True])
def test_dampening_above_1_is_the_same_on_every_backend(nesterov) -> None:
    """torch allows it. The momentum's gain is then negative, and so would be the prox's step size."""
    results = []
    for backend in (FAST, "reference"):
        param = weights_and_gradients(weights=[0.0, -1.0], dtype=torch.float64)
        optimizer = FusedRegSGD([param], lr=0.1, momentum=0.5, l1=1.0, l2=0.1, backend=backend)
        optimizer.param_groups[0].update(dampening=1.8, nesterov=nesterov)
        for _ in range(4):
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-15)


@pytest.mark.skipif(EXTENSION is None, reason="no compiled extension")
@pytest.mark.parametrize("strength", ["l1", "l2"])
@pytest.mark.parametrize("cls", HAVE_EPS)
def test_a_metric_of_nothing_is_the_same_on_every_backend(cls, strength) -> None:
    """eps = 0 and a gradient whose square is nothing: the step is infinite, and the floor is all that the prox has."""
    results = []
    for backend in (FAST, "reference"):
        param = weights_and_gradients()
        param.grad = torch.full_like(param, 1e-30)
        cls([param], lr=0.1, eps=0.0, weight_decay=0.0, backend=backend, **{strength: 1e-4}).step()
        results.append(param.detach())
    torch.testing.assert_close(*results, equal_nan=True)


def test_the_square_of_a_weight_that_is_weighed_may_underflow(backend) -> None:
    """x = z / (1 + 3e37), near 6e-39, gains z * x / 2 / 0.1, near 5.8e-39: less than it costs."""
    param = weights_and_gradients(weights=[0.0863699], gradients=[-0.65])
    options = {"l2": 3e38, "l0": 1e-38, "penalty_mode": "decoupled"}
    FusedRegAdam([param], lr=0.1, betas=(0.0, 0.0), **options, backend=backend).step()
    assert param[0] == 0


def test_a_value_counts_weights_whose_square_underflows() -> None:
    """Against the same in float64, where no square does."""
    w = torch.tensor([1e-30, -3e-25, 0.0], dtype=torch.float32)
    for options in ({"l2": 1e35}, {"l1": 1e-3, "mcp_gamma": 1e-21}):
        values = []
        for dtype in (torch.float32, torch.float64):
            param = torch.nn.Parameter(w.to(dtype))
            values.append(fusedreg.penalty(FusedRegSGD([param], lr=0.1, **options)).double())
        torch.testing.assert_close(*values, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("strength", ["l1", "l2", "l0"])
@pytest.mark.parametrize("cls", HAVE_EPS)
def test_a_metric_that_is_subnormal_makes_no_nan(cls, strength, backend) -> None:
    """Where everything is below the smallest normal number, products of two of them vanish."""
    param = weights_and_gradients(weights=[1.5e-5])
    param.grad = torch.full_like(param, 1.5e-43)
    options = known(cls, lr=1e-3, eps=1e-45, weight_decay=0.0) | {strength: 1e-38}
    optimizer = cls([param], backend=backend, **options)
    for _ in range(2):
        optimizer.step()
    assert not param.isnan().any()


@pytest.mark.parametrize("strengths", [{}, {"l1": 0.125}, {"l1": 0.125, "l2": 0.5}])
@pytest.mark.parametrize(("side", "bound"), [("lower", 1e20), ("upper", -1e20)])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_box_far_from_zero_holds_its_weights(cls, side, bound, strengths, backend) -> None:
    """The squares of its bounds are infinite: the objective of such a weight is too, and zero is no better."""
    for mode in cls.spec.modes:
        param = weights_and_gradients()
        options = known(cls, lr=0.1, weight_decay=0.01) | {side: bound, **strengths, "penalty_mode": mode}
        cls([param], max_grad_norm=1.0, backend=backend, **options).step()
        assert (param == torch.tensor(bound)).all()


@pytest.mark.parametrize(("lr", "l1"), [(1e39, 1e-4), (1e-3, 1e39), (1e20, 1e20)])
@pytest.mark.parametrize("cls", [cls for cls in HAVE_EPS if cls.spec.name != "radam"])  # whose first step has no metric
def test_an_infinite_threshold_hides_no_infinite_gradient(cls, lr, l1, backend) -> None:
    """The step is an infinity over another."""
    param = torch.tensor([-0.3, 0.3, -1e-3]).requires_grad_()
    param.grad = torch.tensor([math.inf, -math.inf, math.inf])
    cls([param], lr=lr, l1=l1, l2=1e-4, **known(cls, weight_decay=0.0), backend=backend).step()
    assert param.isnan().all()


@pytest.mark.parametrize(("dtype", "l2", "size"), [(torch.float64, 1e300, 1.5), (torch.float32, 1e20, 1e5)], ids=str)
@pytest.mark.parametrize("cls", [cls for cls in HAVE_EPS if cls.spec.name not in ("radam", "adadelta")])
def test_a_huge_strength_makes_no_nan(cls, dtype, l2, size, backend) -> None:
    """Where the floor acts, a product of both metrics and the weight would be infinite."""
    results = []
    for each, its_dtype in ((backend, dtype), ("reference", torch.float64)):
        param = torch.tensor([size, -size], dtype=its_dtype).requires_grad_()
        param.grad = torch.full_like(param, 1e10)
        cls([param], lr=1e-3, l2=l2, **known(cls, weight_decay=0.0), backend=each).step()
        results.append(param.detach().double())
    torch.testing.assert_close(*results, rtol=16 * torch.finfo(dtype).eps, atol=0)
