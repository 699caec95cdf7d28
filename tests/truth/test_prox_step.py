"""Proves that one step of the public optimizers ends at the minimiser of the problem that defines it.

That is  c / 2 * (x - z)^2 + l1 |x| + l2 / 2 * x^2,  with z where torch's twin would have put the weight, and c =
d_prox / lr for Adam, 1 / tau for SGD. The conditions of optimality decide, to rounding; scipy's minimize_scalar, which
knows nothing of a soft-threshold, must find no lower value and no other place.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from figures import at_most
from helpers import TWINS, FusedRegAdam, FusedRegAdamW, FusedRegSGD
from scipy.optimize import minimize_scalar

N_GROUPS, N_WEIGHTS = 24, 16
T = 4  # the step number that Adam's state pretends to: both bias corrections still count
BETAS, EPS = (0.9, 0.999), 1e-8


def decades(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return 10 ** rng.uniform(low, high, shape)


def penalties(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(l1, l2) of each group, from 1e-4 to 1e4; each is 0 in some of them."""
    l1, l2 = decades(rng, -4, 4, N_GROUPS), decades(rng, -4, 4, N_GROUPS)
    l1[::5], l2[1::5] = 0, 0
    return l1, l2


def values(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.stack([tensor.detach().double().cpu() for tensor in tensors]).numpy()


def assert_minimises(x, z, c, l1, l2, summands, epsilon) -> None:
    """`summands` bounds the size of what was added up to z: a rounding there is one of the result."""
    scale = epsilon * (c * summands + l1 + l2 * np.abs(x))
    slope = c * (x - z) + l2 * x
    violation = np.where(x != 0, np.abs(slope + l1 * np.sign(x)), np.abs(slope) - l1)
    at_most(4, (violation / scale).max(), f"one prox step, eps {epsilon:.0e}: optimality, in roundings")


def assert_scipy_finds_nothing_better(x, z, c, l1, l2, summands) -> None:
    """Near its minimum f is flat: scipy cannot tell places apart between which f changes by less than its rounding."""

    def f(at: float, z: float, c: float, l1: float, l2: float) -> float:
        return c / 2 * (at - z) ** 2 + l1 * abs(at) + l2 / 2 * at**2

    epsilon = np.finfo(float).eps
    for args in np.broadcast(x, z, c, l1, l2, summands):
        x_, z_, c_, l1_, l2_, size = map(float, args)
        # z itself is known to a few roundings of its summands.
        bounds = sorted((0.0, z_))
        found = minimize_scalar(
            f, args=(z_, c_, l1_, l2_), bounds=bounds, method="bounded", options={"xatol": 1e-13 * abs(z_) + 1e-300}
        )
        value = f(x_, z_, c_, l1_, l2_)
        slack = 16 * epsilon * size * (c_ * abs(x_ - z_) + l1_ + l2_ * abs(x_))
        assert value <= found.fun * (1 + 16 * epsilon) + slack
        resolution = np.sqrt(2 * epsilon * found.fun / (c_ + l2_))
        assert abs(x_ - found.x) <= 4 * resolution + 1e-7 * abs(z_) + 16 * epsilon * size


ADAM_FLAVOURS = {
    "adam": (FusedRegAdam, {}),
    "amsgrad": (FusedRegAdam, {"amsgrad": True}),
    "adamw-with-decay": (FusedRegAdamW, {"weight_decay": 0.3}),
    "adam-decoupled": (FusedRegAdam, {"l1_mode": "decoupled"}),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@every_dtype
@pytest.mark.parametrize("flavour", ADAM_FLAVOURS)
def test_adam(flavour, dtype, backend) -> None:
    """The state is set so that the metric d goes over 12 decades, on both sides of the safeguard's floor."""
    cls, options = ADAM_FLAVOURS[flavour]
    rng = np.random.default_rng(1)
    shape = (N_GROUPS, N_WEIGHTS)
    l1, l2 = penalties(rng)
    lr = decades(rng, -1, 0.3, N_GROUPS)
    wanted_d = decades(rng, -6, 6, *shape)
    w_old, m_old, g = rng.standard_normal((3, *shape)) * [np.ones(shape), wanted_d / 3, wanted_d / 3]
    bias_correction1, bias_correction2 = (1 - beta**T for beta in BETAS)
    v_old = (wanted_d**2 * bias_correction2 - (1 - BETAS[1]) * g**2) / BETAS[1]
    assert (v_old > 0).all()

    def tensors(array: np.ndarray) -> list[torch.Tensor]:
        return [torch.tensor(row, dtype=dtype, device=torch.get_default_device()) for row in array]

    params = [torch.nn.Parameter(row) for row in tensors(w_old)]
    groups = [{"params": [p], "lr": a, "l1": b, "l2": c} for p, a, b, c in zip(params, lr, l1, l2, strict=True)]
    optimizer = cls(groups, betas=BETAS, eps=EPS, backend=backend, **options)
    state = {
        i: {"step": torch.tensor(float(T - 1), device="cpu"), "exp_avg": m, "exp_avg_sq": v}
        for i, (m, v) in enumerate(zip(tensors(m_old), tensors(v_old), strict=True))
    }
    if options.get("amsgrad"):
        # The metric wanted stands in the maximum, and the second moment is a tenth of it.
        for own, maximum in zip(state.values(), tensors(wanted_d**2 * bias_correction2), strict=True):
            own["max_exp_avg_sq"], own["exp_avg_sq"] = maximum, maximum / 10
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    w_old = values(params)  # as rounded to the dtype
    for param, gradient in zip(params, tensors(g), strict=True):
        param.grad = gradient
    optimizer.step()

    l1, l2, lr = l1[:, None], l2[:, None], lr[:, None]
    x, m = values(params), values([optimizer.state[param]["exp_avg"] for param in params])
    second_moment = "max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"
    d = np.sqrt(values([optimizer.state[param][second_moment] for param in params]) / bias_correction2) + EPS
    np.testing.assert_allclose(d, wanted_d + EPS, rtol=1e-5)
    floor = (l1 + l2 * np.abs(w_old)) / 2
    d_prox = np.ones(shape) if flavour == "adam-decoupled" else np.maximum(d, floor)
    step = lr * m / bias_correction1 / d
    z = w_old * (1 - lr * options.get("weight_decay", 0.0)) - step
    size = np.abs(w_old) + np.abs(step)
    assert_minimises(x, z, d_prox / lr, l1, l2, size, torch.finfo(dtype).eps)
    if dtype == torch.float64:
        assert_scipy_finds_nothing_better(x, z, d_prox / lr, l1, l2, size)
    # Both cases come up often: the floor acting or not, a weight thresholded or not.
    for share in ((floor > d).mean(), (x == 0).mean()):
        assert 0.1 < share < 0.9


SGD_FLAVOURS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


@every_dtype
@pytest.mark.parametrize("start", ["first-steps", "from-torch"])
@pytest.mark.parametrize("flavour", SGD_FLAVOURS)
def test_sgd(flavour, start, dtype, backend) -> None:
    """lr, the inverse of SGD's metric, goes over 12 decades; gradients and penalties go with it. Three steps.

    They are the first, or the first after steps of torch's SGD: nobody counted the gain of that buffer, and it is taken
    as the stationary one.
    """
    options = SGD_FLAVOURS[flavour]
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    rng = np.random.default_rng(2)
    lr = decades(rng, -6, 6, N_GROUPS)
    l1, l2 = (strength**0.25 / lr for strength in penalties(rng))  # tau * l1 from 0.1 to 10
    params = [
        torch.nn.Parameter(torch.tensor(row, dtype=dtype, device=torch.get_default_device()))
        for row in 3 * rng.standard_normal((N_GROUPS, N_WEIGHTS))
    ]
    groups = [{"params": [p], "lr": a, "l1": b, "l2": c} for p, a, b, c in zip(params, lr, l1, l2, strict=True)]
    optimizer = FusedRegSGD(groups, backend=backend, **options)
    l1, l2, lr = l1[:, None], l2[:, None], lr[:, None]

    def draw_gradients() -> np.ndarray:
        for param, row in zip(params, 3 * rng.standard_normal((N_GROUPS, N_WEIGHTS)) / lr, strict=True):
            param.grad = torch.tensor(row, dtype=dtype, device=param.device)
        return values([param.grad for param in params])

    if start == "from-torch":
        twin = TWINS[FusedRegSGD]([{"params": [p], "lr": a.item()} for p, a in zip(params, lr, strict=True)], **options)
        for _ in range(2):
            draw_gradients()
            twin.step()
        optimizer.load_state_dict(twin.state_dict())
    n_zeros = 0
    for t in range(1, 4):
        w_old = values(params)
        g = draw_gradients()
        optimizer.step()
        # The gain in closed form: the first buffer is the gradient itself, and each step keeps momentum of the rest.
        stationary = (1 - dampening) / (1 - momentum)
        gain = momentum ** (t - 1) + stationary * (1 - momentum ** (t - 1)) if start == "first-steps" else stationary
        if not momentum:
            direction, tau = g, lr
        else:
            buffer = values([optimizer.state[param]["momentum_buffer"] for param in params])
            direction, tau = buffer, lr * gain
            if options.get("nesterov"):
                direction, tau = g + momentum * buffer, lr * (1 + momentum * gain)
        x, z = values(params), w_old - lr * direction
        size = np.abs(w_old) + lr * np.abs(direction) + (lr * np.abs(g) if options.get("nesterov") else 0)
        assert_minimises(x, z, 1 / tau, l1, l2, size, torch.finfo(dtype).eps)
        if dtype == torch.float64:
            assert_scipy_finds_nothing_better(x, z, 1 / tau, l1, l2, size)
        n_zeros += (x == 0).sum()
    assert 0.1 < n_zeros / (3 * N_GROUPS * N_WEIGHTS) < 0.9
