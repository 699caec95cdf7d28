"""How far rounding may carry one step: the formulas of docs/formulas.md, evaluated on intervals.

`step_bounds` takes the exact inputs of a step (weight, gradient, state, scalar states: single numbers) and returns, for
each element of the weight and of the state, an interval that holds every result which floating point arithmetic can
give. The reference in float64 lies in it, and any correct kernel does. No tolerance is chosen anywhere:

- An operation's exact result on the intervals is widened by one rounding: by u relative, u = 2**-24 for float32, and
  by half the smallest denormal. The exact result stays inside, so a fused multiply-add, which rounds once less, is
  covered.
- Where there are two orders of operations (torch's lerp for exp_avg, the multiplied-out prox), `either` takes the hull.
- A threshold tie needs no rule of its own: soft-thresholding is monotone, and an interval around a tie holds zero and
  what is next to it.
- Where an intermediate result can pass the largest number, the interval ends at infinity; where infinities can meet, a
  NaN is allowed. Where the inputs alone (an infinite gradient, say) make a NaN, it is demanded.
- A result is rounded to its own dtype when it is stored. Rounding is monotone, so the ends are rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INF = math.inf
LARGEST = torch.finfo(torch.float64).max


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """One rounding: relative, absolute, and the size from which on a result is rounded to infinity."""

    dtype: torch.dtype
    unit: float
    tiny: float
    limit: float


# The slack of 2**-20 pays for the float64 arithmetic on the ends. For float64 itself they round as the kernel does.
SINGLE = Arithmetic(torch.float32, 2.0**-24 * (1 + 2.0**-20), 2.0**-150, 2.0**128 - 2.0**103)
DOUBLE = Arithmetic(torch.float64, 2.0**-52, 2.0**-1074, INF)


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    return DOUBLE if dtype in (torch.float64, torch.complex128) else SINGLE


class Span:
    """An interval for each element. `nan`: a NaN is possible. Both ends NaN: a NaN is certain."""

    def __init__(self, lo: Tensor, hi: Tensor, nan: Tensor, arithmetic: Arithmetic) -> None:
        self.lo, self.hi, self.nan, self.arithmetic = lo, hi, nan, arithmetic

    # -- what it holds

    @property
    def point(self) -> Tensor:
        return self.lo == self.hi

    def is_point(self, value: float) -> Tensor:
        return (self.lo == value) & (self.hi == value) & ~self.nan

    @property
    def must_be_nan(self) -> Tensor:
        return self.lo.isnan()

    @property
    def zero(self) -> Tensor:
        return (self.lo <= 0) & (self.hi >= 0)

    @property
    def infinite(self) -> Tensor:
        return self.lo.isinf() | self.hi.isinf()

    def at(self, index: Tensor) -> Span:
        """Some of the elements, in a row."""
        return Span(*(part.reshape(-1)[index] for part in (self.lo, self.hi, self.nan)), self.arithmetic)

    def holds(self, values: Tensor) -> Tensor:
        """Element by element, whether `values`, stored in their own dtype, may come out."""
        real = torch.view_as_real(values.detach().resolve_conj()) if values.is_complex() else values.detach()
        lo, hi = (end.to(real.dtype).double() for end in (self.lo, self.hi))
        return torch.where(
            real.isnan(), self.nan | self.must_be_nan, ~self.must_be_nan & (lo <= real.double()) & (real.double() <= hi)
        )

    def coarser(self, times: float) -> Span:
        """The same, before operations whose results are up to so many times smaller than they would be here."""
        arithmetic = dataclasses.replace(self.arithmetic, tiny=times * self.arithmetic.tiny)
        return Span(self.lo, self.hi, self.nan, arithmetic)

    # -- operations

    def rounded(self) -> Span:
        return self._result(self, self.lo, self.hi, self.nan, self.is_point(0.0), tiny=True)

    def _result(self, other: Span, lo: Tensor, hi: Tensor, nan: Tensor, exact: Tensor, tiny: bool) -> Span:
        """Rounds outwards, and sorts out the NaNs: certain where the inputs are, and where they are single numbers."""
        a = self.arithmetic
        certain = self.must_be_nan | other.must_be_nan
        certain |= self.point & other.point & ~(self.nan | other.nan) & (nan | lo.isnan() | hi.isnan())
        nan = nan | lo.isnan() | hi.isnan() | self.nan | other.nan
        lo, hi = torch.where(lo.isnan(), -INF, lo), torch.where(hi.isnan(), INF, hi)
        smallest = a.tiny if tiny else 0.0
        lo = torch.where(exact, lo, lo - lo.abs().nan_to_num(posinf=0.0) * a.unit - smallest)
        hi = torch.where(exact, hi, hi + hi.abs().nan_to_num(posinf=0.0) * a.unit + smallest)
        # The finite end stays: a fused multiply-add does not overflow in between.
        lo, hi = torch.where(lo <= -a.limit, -INF, lo), torch.where(hi >= a.limit, INF, hi)
        return Span(torch.where(certain, math.nan, lo), torch.where(certain, math.nan, hi), nan, a)

    def __add__(self, other: Span) -> Span:
        meet = ((self.hi == INF) & (other.lo == -INF)) | ((self.lo == -INF) & (other.hi == INF))
        # A sum is never a denormal that had to be rounded.
        exact = self.is_point(0.0) | other.is_point(0.0)
        return self._result(other, self.lo + other.lo, self.hi + other.hi, meet, exact, tiny=False)

    def __neg__(self) -> Span:
        return Span(-self.hi, -self.lo, self.nan, self.arithmetic)

    def __sub__(self, other: Span) -> Span:
        return self + -other

    def __mul__(self, other: Span) -> Span:
        corners = torch.stack(torch.broadcast_tensors(*(a * b for a in self.ends for b in other.ends)))
        lo, hi = corners.nan_to_num(INF, INF, -INF).amin(0), corners.nan_to_num(-INF, INF, -INF).amax(0)
        # A product of finite numbers overflows, but not inside of a fused multiply-add.
        finite = ~(self.infinite | other.infinite)
        lo, hi = torch.where(finite, lo.clamp(max=LARGEST), lo), torch.where(finite, hi.clamp(min=-LARGEST), hi)
        meet = (self.zero & other.infinite) | (self.infinite & other.zero)
        positive = (self.lo >= 0) & (other.lo >= 0)
        lo, hi = torch.where(meet, torch.where(positive, 0.0, -INF), lo), torch.where(meet, INF, hi)
        exact = torch.zeros_like(lo, dtype=torch.bool)
        for span in (self, other):
            exact = exact | span.is_point(0.0) | span.is_point(1.0) | span.is_point(-1.0)
        return self._result(other, lo, hi, meet, exact, tiny=True)

    def __truediv__(self, other: Span) -> Span:
        """By something that is not negative."""
        assert not (other.lo < 0).any()
        lo = torch.where(self.lo < 0, self.lo / other.lo, self.lo / other.hi)
        hi = torch.where(self.hi > 0, self.hi / other.lo, self.hi / other.hi)
        meet = (self.zero & other.zero) | (self.infinite & other.infinite)
        return self._result(other, lo, hi, meet, other.is_point(1.0) | self.is_point(0.0), tiny=True)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        return self.lo, self.hi

    def sqrt(self) -> Span:
        # A widened sum of squares may begin below zero.
        lo, hi = self.lo.clamp(min=0).sqrt(), self.hi.clamp(min=0).sqrt()
        return self._result(self, lo, hi, self.nan, self.is_point(0.0), tiny=False)

    def monotone(self, f: Any) -> Span:
        """An increasing function that does not round."""
        return Span(f(self.lo), f(self.hi), self.nan, self.arithmetic)

    def abs(self) -> Span:
        lo = torch.where(self.zero, 0.0, torch.minimum(self.lo.abs(), self.hi.abs()))
        return Span(lo, torch.maximum(self.lo.abs(), self.hi.abs()), self.nan, self.arithmetic)

    def maximum(self, other: Span) -> Span:
        lo, hi = torch.maximum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        return Span(lo, hi, self.nan | other.nan, self.arithmetic)

    def not_negative(self) -> Span:
        """For what is so by its meaning, where widening began below zero."""
        return self.monotone(lambda end: end.clamp(min=0))


def either(a: Span, b: Span) -> Span:
    """One of two orders of operations. A NaN is certain only where it is in both."""
    both = a.must_be_nan & b.must_be_nan
    lo = torch.fmin(a.lo, b.lo)
    hi = torch.fmax(a.hi, b.hi)
    nan = a.nan | b.nan | a.must_be_nan | b.must_be_nan
    return Span(torch.where(both, math.nan, lo), torch.where(both, math.nan, hi), nan, a.arithmetic)


def select(condition: Tensor, a: Span, b: Span) -> Span:
    parts = (torch.where(condition, getattr(a, part), getattr(b, part)) for part in ("lo", "hi", "nan"))
    return Span(*parts, a.arithmetic)


def soft(z: Span, t: Span) -> Span:
    """sign(z) * max(|z| - t, 0), which grows with z and shrinks with t; one rounding, that of the difference."""

    def exact(z: Tensor, t: Tensor) -> Tensor:
        return torch.where(z.abs() <= t, 0.0, z - t * z.sign())

    lo = torch.fmin(exact(z.lo, t.lo), exact(z.lo, t.hi))
    hi = torch.fmax(exact(z.hi, t.lo), exact(z.hi, t.hi))
    # Never inf - inf: where the threshold is infinite, it is not below |z|.
    return z._result(t, lo, hi, torch.zeros_like(lo, dtype=torch.bool), t.is_point(0.0), tiny=False)


def exactly(values: Tensor, arithmetic: Arithmetic) -> Span:
    values = torch.view_as_real(values.detach().resolve_conj()) if values.is_complex() else values.detach()
    values = values.double().resolve_neg()
    return Span(values, values, torch.zeros_like(values, dtype=torch.bool), arithmetic)


def scalar(value: float, arithmetic: Arithmetic) -> Span:
    """A double of the host, before or after it is rounded to the arithmetic dtype."""
    exact = torch.tensor(value, dtype=torch.float64)
    rounded = exact.to(arithmetic.dtype).double()
    return Span(torch.minimum(exact, rounded), torch.maximum(exact, rounded), exact.isnan(), arithmetic)


def number_over(number: Span, divisor: Span) -> Span:
    """torch divides a Python number by a tensor through the reciprocal."""
    return either(number / divisor, number * (scalar(1.0, divisor.arithmetic) / divisor))


# -- the formulas


def clipped_by_value(g: Tensor, group: dict[str, Any], inv_grad_scale: float) -> Span:
    """Stages 1 and 2."""
    a = arithmetic_of(g.dtype)
    span = exactly(g, a) * scalar(inv_grad_scale, a)
    if group["maximize"]:
        span = -span
    if group["clip_value"] is not None:
        bound = scalar(float(group["clip_value"]), a)
        lo = torch.minimum(torch.maximum(span.lo, -bound.hi), bound.lo)
        span = Span(lo, torch.minimum(torch.maximum(span.hi, -bound.lo), bound.hi), span.nan, a)
    return span


def norm_bounds(clipped: list[Span], gradients: list[Tensor], inv_grad_scale: float) -> Span:
    """The norm of stage 3, in double.

    An element costs a few roundings, and so does each addition: the backends add runs of up to 1024 numbers, then 5
    lanes' halves, then a number a chunk and one a tensor. The terms are not negative, so n additions in any order err
    by no more than n roundings, relative to the sum. The same again pays for the sums that are taken here.
    """
    numels = [span.lo.numel() for span in clipped]
    slack = 2 * 2.0**-53 * sum(6 + min(numel, 1029) + numel // 32768 for numel in numels)
    # A square in double may underflow, also before the scale comes out of the sum.
    underflow = 2.0**-1074 * sum(numels) * max(1.0, inv_grad_scale**2)
    sums = [
        torch.stack([end.square().sum() for end in ends]).sum() if ends else torch.zeros((), dtype=torch.float64)
        for ends in ([span.abs().lo for span in clipped], [span.abs().hi for span in clipped])
    ]
    lo, hi = (sums[0] * (1 - slack) - underflow).clamp(min=0).sqrt(), (sums[1] * (1 + slack) + underflow).sqrt()
    # Or overflow: gradients above 1e154.
    if any(not gradient.abs().double().square().sum().isfinite() for gradient in gradients):
        hi = torch.where(hi.isnan(), hi, INF)
    nan = torch.tensor(any(bool(span.nan.any() | span.must_be_nan.any()) for span in clipped))
    if any(bool(span.must_be_nan.any()) for span in clipped):
        lo = hi = torch.tensor(math.nan, dtype=torch.float64)
    return Span(lo, hi, nan, DOUBLE)


def coefficient_bounds(norm: Span, max_grad_norm: float) -> Span:
    """min(1, max_grad_norm / (norm + 1e-6)); infinity measures and does not clip."""
    if max_grad_norm == INF:
        return scalar(1.0, DOUBLE)
    quotient = number_over(scalar(max_grad_norm, DOUBLE), norm + scalar(1e-6, DOUBLE))
    return quotient.monotone(lambda end: torch.minimum(end, torch.ones_like(end)))


def to_arithmetic(span: Span, a: Arithmetic) -> Span:
    """A double that is, or is not yet, rounded to `a`."""
    lo, hi = (end.to(a.dtype).double() for end in span.ends)
    return Span(torch.minimum(span.lo, lo), torch.maximum(span.hi, hi), span.nan, a)


def penalized(g: Span, w: Span, group: dict[str, Any]) -> Span:
    """Stage 4, coupled: term by term as the formulas have it, or with w's two factors added first."""
    a = g.arithmetic
    decay = 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))
    l1, l2 = (float(group[key]) if group["penalty_mode"] == "subgradient" else 0.0 for key in ("l1", "l2"))
    sign = w.monotone(torch.sign)

    def plus(g: Span, strength: float, operand: Span) -> Span:
        if strength == 0:
            return g
        factor = scalar(strength, a)
        # One that rounds to zero may be taken as none: it matters where w is infinite or NaN.
        return either(g, g + factor * operand) if factor.lo == 0 else g + factor * operand

    one_by_one = plus(plus(plus(g, decay, w), l1, sign), l2, w)
    together = plus(plus(g, decay + l2, w), l1, sign)
    return either(one_by_one, together)


@dataclasses.dataclass
class Bounds:
    """What stage 5 may come to."""

    z: Span
    state: dict[str, Span]
    scalars: dict[str, float]
    """The scalar states after the step."""
    tau: float
    d: Span | None = None
    safeguard: Span | None = None
    """What the prox's floor is held against, where that is not d."""
    has_floor: bool = True
    other_tau: float | None = None
    """What tau is where a scalar state is kept in float32."""
    is_multiplied_out: bool = False
    finish: Callable[[Span], dict[str, Span]] = lambda w: {}
    """States that go by the weight after stage 6."""


Scalars = dict[str, float]


def moving_average(average: Span, g: Span, beta: float) -> Span:
    """As the formula has it, or as torch's lerp, which starts from the end that is nearer."""
    a = g.arithmetic
    textbook = scalar(beta, a) * average + scalar(1 - beta, a) * g
    change = g - average
    lerp = average + scalar(1 - beta, a) * change if 1 - beta < 0.5 else g - scalar(beta, a) * change
    return either(textbook, lerp)


def moving_average_of_squares(average: Span, g: Span, beta: float) -> Span:
    a = g.arithmetic
    return (scalar(beta, a) * average + scalar(1 - beta, a) * g.abs() * g.abs()).not_negative()


def adam_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr, (beta1, beta2), t = float(group["lr"]), map(float, group["betas"]), scalars["step"] + 1
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    m = moving_average(state["exp_avg"], g, beta1)
    u = moving_average_of_squares(state["exp_avg_sq"], g, beta2)
    new = {"exp_avg": m, "exp_avg_sq": u}
    if group["amsgrad"]:
        u = new["max_exp_avg_sq"] = u.maximum(state["max_exp_avg_sq"])
    root = u.sqrt()
    d = either(root / scalar(correction2**0.5, a), root * scalar(1 / correction2**0.5, a))
    d = (d + scalar(float(group["eps"]), a)).not_negative()
    moved = either(
        scalar(lr, a) * (m / scalar(correction1, a)) / d,
        scalar(lr / correction1 if correction1 else math.nan, a) * (m / d),
    )
    return Bounds(w - moved, new, {"step": t}, lr, d)


def sgd_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    momentum, dampening, lr = (float(group[key]) for key in ("momentum", "dampening", "lr"))
    if momentum == 0:
        return Bounds(w - scalar(lr, a) * g, {}, {}, lr)
    before, buffer = scalars["momentum_gain"], g
    if before != 0:  # the first one is undamped
        buffer = scalar(momentum, a) * state["momentum_buffer"] + scalar(1 - dampening, a) * g
    gain = gain_after(before, momentum, dampening)
    direction, step_gain = buffer, gain
    if group["nesterov"]:
        direction, step_gain = g + scalar(momentum, a) * buffer, 1 + momentum * gain
    tau = lr * max(step_gain, 0.0)
    return Bounds(w - scalar(lr, a) * direction, {"momentum_buffer": buffer}, {"momentum_gain": gain}, tau)


def rmsprop_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr, alpha, momentum, eps = (float(group[key]) for key in ("lr", "alpha", "momentum", "eps"))
    v = moving_average_of_squares(state["square_avg"], g, alpha)
    new, new_scalars = {"square_avg": v}, {"step": scalars["step"] + 1}
    d = uncentered = (v.sqrt() + scalar(eps, a)).not_negative()
    if group["centered"]:
        m = new["grad_avg"] = moving_average(state["grad_avg"], g, alpha)
        # Rounding may bring a variance below zero.
        d = ((v - m.abs() * m.abs()).not_negative().sqrt() + scalar(eps, a)).not_negative()
    direction, gain = g / d, 1.0
    moved = either(scalar(lr, a) * direction, scalar(lr, a) * g / d)
    if momentum != 0:
        direction = new["momentum_buffer"] = scalar(momentum, a) * state["momentum_buffer"] + direction
        gain = new_scalars["momentum_gain"] = gain_after(scalars["momentum_gain"], momentum)
        moved = scalar(lr, a) * direction
    safeguard = uncentered if group["centered"] else None
    return Bounds(w - moved, new, new_scalars, lr * gain, d, safeguard)


def adagrad_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr = float(group["lr"]) / (1 + scalars["step"] * float(group["lr_decay"]))
    total = state["sum"] + g.abs() * g.abs()
    d = (total.sqrt() + scalar(float(group["eps"]), a)).not_negative()
    moved = either(scalar(lr, a) * (g / d), scalar(lr, a) * g / d)
    return Bounds(w - moved, {"sum": total}, {"step": scalars["step"] + 1}, lr, d)


def root_with_eps(v: Span, correction: float, eps: Span) -> Span:
    """sqrt(v / correction) + eps, in any order of the first two."""
    a = v.arithmetic
    corrected = (v / scalar(correction, a)).sqrt()
    root = v.sqrt()
    rooted = either(root / scalar(correction**0.5, a), root * scalar(1 / correction**0.5, a))
    return (either(corrected, rooted) + eps).not_negative()


def in_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def in_either_precision(f: Callable[[float], float], number: float, a: Arithmetic) -> Span:
    """f, a monotone function, of a scalar state that is kept in float32 or in float64."""
    return either(scalar(f(number), a), scalar(f(in_float32(number)), a))


def nadam_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr, (beta1, beta2), t = float(group["lr"]), map(float, group["betas"]), scalars["step"] + 1
    mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** (each * float(group["momentum_decay"]))) for each in (t, t + 1))
    product = scalars["mu_product"] * mu
    m = moving_average(state["exp_avg"], g, beta1)
    v = moving_average_of_squares(state["exp_avg_sq"], g, beta2)
    d = root_with_eps(v, 1 - beta2**t, scalar(float(group["eps"]), a))

    def share_of_g(product: float) -> float:
        return (1 - mu) / (1 - product)

    def share_of_m(product: float) -> float:
        return next_mu / (1 - product * next_mu)

    shares = [in_either_precision(share, product, a) for share in (share_of_g, share_of_m)]
    with_lr = [
        in_either_precision(lambda product, share=share: lr * share(product), product, a)
        for share in (share_of_g, share_of_m)
    ]
    moved = either(scalar(lr, a) * (shares[0] * g + shares[1] * m) / d, (with_lr[0] * g + with_lr[1] * m) / d)
    tau, other_tau = (
        lr * (share_of_g(each) + share_of_m(each) * (1 - beta1**t))
        for each in (product, in_float32(in_float32(mu) * scalars["mu_product"]))
    )
    new = {"exp_avg": m, "exp_avg_sq": v}
    return Bounds(w - moved, new, {"step": t, "mu_product": product}, tau, d, other_tau=other_tau)


def radam_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr, (beta1, beta2), t = float(group["lr"]), map(float, group["betas"]), scalars["step"] + 1
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    m = moving_average(state["exp_avg"], g, beta1)
    v = moving_average_of_squares(state["exp_avg_sq"], g, beta2)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction2
    is_rectified = length > 5
    tau, d, m_over_d = lr, exactly(torch.ones_like(w.lo), a), m
    m_hat_over_d = m / scalar(correction1, a)
    if is_rectified:
        tau *= ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
        root = v.sqrt() + scalar(float(group["eps"]), a)
        d = either(root / scalar(correction2**0.5, a), root * scalar(1 / correction2**0.5, a)).not_negative()
        m_over_d, m_hat_over_d = m / d, scalar(tau, a) * m_hat_over_d / d
    else:
        m_hat_over_d = scalar(tau, a) * m_hat_over_d
    moved = either(m_hat_over_d, scalar(tau / correction1, a) * m_over_d)
    return Bounds(w - moved, {"exp_avg": m, "exp_avg_sq": v}, {"step": t}, tau, d, has_floor=is_rectified)


def adamax_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr, (beta1, beta2), t = float(group["lr"]), map(float, group["betas"]), scalars["step"] + 1
    m = moving_average(state["exp_avg"], g, beta1)
    u = (scalar(beta2, a) * state["exp_inf"]).maximum(g.abs() + scalar(float(group["eps"]), a)).not_negative()
    correction = 1 - beta1**t
    moved = either(scalar(lr, a) * (m / scalar(correction, a)) / u, scalar(lr / correction, a) * (m / u))
    return Bounds(w - moved, {"exp_avg": m, "exp_inf": u}, {"step": t}, lr, u)


def adadelta_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a = w.arithmetic
    lr, rho, eps = float(group["lr"]), float(group["rho"]), scalar(float(group["eps"]), w.arithmetic)
    v = moving_average_of_squares(state["square_avg"], g, rho)
    of_gradients, of_steps = ((each + eps).not_negative().sqrt() for each in (v, state["acc_delta"]))
    delta = of_steps / of_gradients * g
    d, largest = of_gradients / of_steps, scalar(1e18, a)
    d = Span(torch.minimum(d.lo, largest.lo), torch.minimum(d.hi, largest.hi), d.nan, a).not_negative()
    new = {"square_avg": v, "acc_delta": moving_average_of_squares(state["acc_delta"], delta, rho)}
    return Bounds(w - scalar(lr, a) * delta, new, {"step": scalars["step"] + 1}, lr, d, of_gradients)


def lion_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a, lr, (beta1, beta2) = w.arithmetic, float(group["lr"]), map(float, group["betas"])
    direction = moving_average(state["exp_avg"], g, beta1).monotone(sign_or_nan)
    return Bounds(w - scalar(lr, a) * direction, {"exp_avg": moving_average(state["exp_avg"], g, beta2)}, {}, lr)


def asgd_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a, lr, t = w.arithmetic, float(group["lr"]), scalars["step"] + 1
    lambd, alpha, t0 = (float(group[key]) for key in ("lambd", "alpha", "t0"))
    eta, mu, ax = scalars["eta"], scalars["mu"], state["ax"]

    def average(w: Span) -> dict[str, Span]:
        return {"ax": w if mu == 1 else ax + scalar(mu, a) * (w - ax)}

    new = {"step": t, "eta": lr / (1 + lambd * lr * t) ** alpha, "mu": 1 / max(1.0, t - t0)}
    return Bounds(w * scalar(1 - lambd * eta, a) - scalar(eta, a) * g, {}, new, eta, finish=average)


def among(*cases: tuple[Tensor, Span]) -> Span:
    """Of all that may be, where each may."""
    (seen, found), *others = cases
    for may_be, span in others:
        found = select(seen & may_be, either(found, span), select(may_be, span, found))
        seen = seen | may_be
    return found


def rprop_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a, lr = w.arithmetic, float(group["lr"])
    (minus, plus), (smallest, largest) = (map(float, group[key]) for key in ("etas", "step_sizes"))
    product, before = g * state["prev"], state["step_size"]
    grows, turns = product.hi > 0, product.lo < 0
    stays = (product.lo <= 0) & (product.hi >= 0) | product.nan | product.must_be_nan
    least, most = scalar(smallest, a), scalar(largest, a)

    def clamped(size: Span) -> Span:
        lo = torch.minimum(torch.maximum(size.lo, least.lo), most.lo)
        return Span(lo, torch.minimum(torch.maximum(size.hi, least.hi), most.hi), size.nan, a)

    sizes = [clamped(before * scalar(factor, a)) for factor in (plus, minus, 1.0)]
    zero = exactly(torch.zeros_like(w.lo), a)
    gradients = [g, zero, g]
    moved = [w - size * each.monotone(sign_or_nan) for size, each in zip(sizes, gradients, strict=True)]
    z, prev, size = (among(*zip((grows, turns, stays), each, strict=True)) for each in (moved, gradients, sizes))
    return Bounds(z, {"prev": prev, "step_size": size}, {"step": scalars["step"] + 1}, lr)


def ftrl_bounds(w: Span, g: Span, state: dict[str, Span], scalars: Scalars, group: dict[str, Any]) -> Bounds:
    a, lr = w.arithmetic, float(group["lr"])
    before = scalars["l1_sum"]
    after = before + (float(group["l1"]) if group["penalty_mode"] == "proximal" else 0.0)
    total = state["sum"] + g.abs() * g.abs()
    d = (total.sqrt() + scalar(float(group["beta"]), a)).not_negative()
    moved = w - either(scalar(lr, a) * (g / d), scalar(lr, a) * g / d)
    was_zero = w.is_point(0.0)
    waiting = state["held_back"] - g
    arriving = either(number_times_over(d * moved, lr), d * moved * scalar(1 / lr if lr else 0.0, a))
    dual = select(was_zero, waiting, arriving + scalar(before, a) * w.monotone(torch.sign))
    woken, ahead = soft(dual, scalar(before, a)), moved * w.monotone(torch.sign)
    waited = either(scalar(lr, a) * (woken / d), scalar(lr, a) * woken / d)
    z = decided(was_zero | (ahead.hi < 0), ~was_zero & (ahead.lo >= 0), waited, moved)
    bound = scalar(after, a)
    lo = torch.minimum(torch.maximum(dual.lo, -bound.hi), bound.lo)
    held = Span(lo, torch.maximum(torch.minimum(dual.hi, bound.hi), -bound.lo), dual.nan, a)

    def finish(w: Span) -> dict[str, Span]:
        nothing = exactly(torch.zeros_like(w.lo), a)
        return {"held_back": decided(w.is_point(0.0), ~w.zero | w.must_be_nan, held, nothing)}

    return Bounds(z, {"sum": total}, {"l1_sum": after}, lr, d, has_floor=False, finish=finish)


def number_times_over(a: Span, lr: float) -> Span:
    """a / lr, where lr is not 0."""
    return a / scalar(lr, a.arithmetic) if lr else a


def sign_or_nan(end: Tensor) -> Tensor:
    return torch.where(end.isnan(), end, end.sign())


RULES = {
    "adam": adam_bounds,
    "sgd": sgd_bounds,
    "rmsprop": rmsprop_bounds,
    "adagrad": adagrad_bounds,
    "nadam": nadam_bounds,
    "radam": radam_bounds,
    "adamax": adamax_bounds,
    "adadelta": adadelta_bounds,
    "ftrl": ftrl_bounds,
    "lion": lion_bounds,
    "asgd": asgd_bounds,
    "rprop": rprop_bounds,
}
"""Stage 5 of every rule: ``rule(w, g, state, scalars, group)``, the scalar states as they were before the step."""


def gain_after(before: float, momentum: float, dampening: float = 0.0) -> float:
    """s_t. `before` is s_(t-1): 0 before the first step, NaN where nobody counted."""
    if before == 0:
        return 1.0
    if math.isnan(before):
        return (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0
    return momentum * before + (1 - dampening)


def floored(d: Span, safeguard: Span | None, floor: Span) -> Span:
    """d_prox. Where the floor is above the safeguard, d goes up with it."""
    if safeguard is None:
        return d.maximum(floor)
    scaled = floor * (d / safeguard)
    acts = floor.lo > safeguard.hi
    rests = (floor.hi <= safeguard.lo) & ~floor.nan & ~safeguard.nan
    return select(acts, scaled, select(rests, d, either(scaled, d)))


def prox_bounds(bounds: Bounds, w_old: Span, group: dict[str, Any]) -> Span:
    """Stage 6. In a metric: divided by it as in the formula, or multiplied out as in the code."""
    if bounds.other_tau is not None:
        each = (dataclasses.replace(bounds, tau=tau, other_tau=None) for tau in (bounds.tau, bounds.other_tau))
        return either(*(prox_bounds(one, w_old, group) for one in each))
    z = bounds.z
    if float(group["lr"]) == 0:
        return z
    stages = Stages.of(bounds, group)
    if stages.shrinks:
        z = prox_in_metric(stages, w_old) if stages.d is not None else minimisers(stages, None)
    elif stages.is_boxed:
        z = boxed(z, stages)
    if not group["freeze_zeros"]:
        return z
    frozen = Span(torch.zeros_like(z.lo), torch.zeros_like(z.hi), bounds.z.nan, z.arithmetic)
    return select(w_old.is_point(0.0) & ~bounds.z.must_be_nan, frozen, z)


@dataclasses.dataclass
class Stages:
    """What stage 6 is told: numbers as the host has them, d where the prox is in a metric."""

    z: Span
    d: Span | None
    safeguard: Span | None
    tau: float
    l1: float
    l2: float
    l0: float
    gamma: float
    lower: float
    upper: float
    has_floor: bool
    is_multiplied_out: bool

    @classmethod
    def of(cls, bounds: Bounds, group: dict[str, Any]) -> Stages:
        mode = group["penalty_mode"]
        l1, l2, l0 = (0.0 if mode == "subgradient" else float(group[name]) for name in ("l1", "l2", "l0"))
        gamma = float(group["mcp_gamma"]) if l1 != 0 else INF
        lower, upper = float(group["lower"]), float(group["upper"])
        tau = float(group["lr"]) if mode == "decoupled" else bounds.tau
        d = bounds.d if mode == "proximal" else None
        told = (bounds.has_floor, bounds.is_multiplied_out)
        return cls(bounds.z, d, bounds.safeguard, tau, l1, l2, l0, gamma, lower, upper, *told)

    @property
    def shrinks(self) -> bool:
        return self.l1 != 0 or self.l2 != 0 or self.l0 != 0

    @property
    def is_boxed(self) -> bool:
        return self.lower != -INF or self.upper != INF

    def of_arithmetic(self, value: float) -> Span:
        return scalar(value, self.z.arithmetic)


def boxed(x: Span, stages: Stages) -> Span:
    lower, upper = stages.of_arithmetic(stages.lower), stages.of_arithmetic(stages.upper)
    lo = torch.minimum(torch.maximum(x.lo, lower.lo), upper.lo)
    return Span(lo, torch.minimum(torch.maximum(x.hi, lower.hi), upper.hi), x.nan, x.arithmetic)


def decided(yes: Tensor, no: Tensor, a: Span, b: Span) -> Span:
    """a where it is certain, b where it is certain not to be, and both where rounding decides."""
    return select(yes, a, select(no, b, either(a, b)))


def prox_in_metric(stages: Stages, w_old: Span) -> Span:
    assert stages.d is not None
    size = w_old.abs()
    strength1, strength2 = stages.of_arithmetic(stages.l1), stages.of_arithmetic(stages.l2)
    slope = strength1
    if stages.gamma != INF:
        slope = strength1 - either(
            size / stages.of_arithmetic(stages.gamma), size * stages.of_arithmetic(1 / stages.gamma)
        )
        slope = slope.not_negative()
    d = stages.d
    if stages.has_floor:
        pull = strength2 * size
        if stages.l2 == 0:  # the code may leave it out, of an infinite weight too
            pull = either(pull, exactly(torch.zeros_like(size.lo), size.arithmetic))
        d = floored(d, stages.safeguard, stages.of_arithmetic(0.5) * (slope + pull)).not_negative()
    else:  # one that never acts may be computed: a strength that only a double holds, times 0
        d = Span(d.lo, d.hi, d.nan | (strength2 * size).nan, d.arithmetic)
    if stages.gamma != INF:
        d = d.maximum(stages.of_arithmetic(2 * stages.tau / stages.gamma))
    # Its size grows with d, which stands in it twice: both ends alone, one after the other, say more than the interval.
    at_ends = either(*(minimisers(stages, Span(end, end, d.nan, d.arithmetic)) for end in d.ends))
    return select((d.lo > 0) & (d.hi < INF), at_ends, minimisers(stages, d))


def minimisers(stages: Stages, d: Span | None) -> Span:
    """The minimiser without a metric (d is None), or with this d_prox: as the formulas have it, or as the code does."""
    z, one = stages.z, stages.of_arithmetic(1.0)
    strength1, strength2, tau = (stages.of_arithmetic(value) for value in (stages.l1, stages.l2, stages.tau))
    fades = stages.gamma != INF
    # multiplied out
    metric, step_size = one, tau
    if d is not None:
        # Products are allowed to be smaller than they are here by this much, and no more: see choose_update.
        metric, step_size = (span.coarser(32) for span in (d, tau))
    scaled, threshold = (z if d is None else metric * z), (step_size * strength1).not_negative()
    ridge = metric + (step_size * strength2).not_negative()
    if stages.is_multiplied_out:  # both once more by d, where the floor acts
        threshold, ridge = threshold.rounded().not_negative(), ridge.rounded().not_negative()
    curvature = (ridge - stages.of_arithmetic(stages.tau / stages.gamma)).not_negative()
    pulled = soft(scaled, threshold)
    flat, firm = scaled / ridge, pulled / curvature
    if d is None:
        whole, rest = 1 + stages.tau * stages.l2, 1 + stages.tau * (stages.l2 - 1 / stages.gamma)
        flat = either(flat, scaled * stages.of_arithmetic(1 / whole))
        firm = either(firm, pulled * stages.of_arithmetic(1 / rest if rest > 0 else INF))
    # divided
    kappa = tau if d is None else number_over(tau, d).not_negative()
    shrink = one + (kappa * strength2).not_negative() if stages.l2 != 0 else one
    y, step = z / shrink, kappa / shrink
    if fades:
        rest_of_one = (one - step / stages.of_arithmetic(stages.gamma)).not_negative()
        flat, firm = either(flat, y), either(firm, soft(y, (step * strength1).not_negative()) / rest_of_one)
    elif stages.l1 != 0:
        firm = either(firm, soft(z, (kappa * strength1).not_negative()) / shrink)
    else:
        firm = either(firm, y)

    is_flat, is_firm = torch.zeros_like(z.lo, dtype=torch.bool), torch.ones_like(z.lo, dtype=torch.bool)
    is_concave, is_convex = is_flat, is_firm
    if fades:
        knee = stages.of_arithmetic(stages.gamma * stages.l1)
        border = knee * ridge
        is_flat = (scaled.abs().lo > border.hi) & (y.abs().lo > knee.hi)
        is_firm = (scaled.abs().hi < border.lo) & (y.abs().hi < knee.lo)
        if d is None:
            gamma = stages.of_arithmetic(stages.gamma)
            is_concave, is_convex = step.lo > gamma.hi, step.hi < gamma.lo
            is_flat, is_firm = is_flat | is_concave, is_firm & is_convex
    x = decided(is_flat, is_firm, flat, firm)
    if stages.is_boxed:
        x = boxed(x, stages)
    may_be_worse = torch.ones_like(is_flat) if stages.l0 != 0 else ~is_convex
    if not may_be_worse.any():
        return x

    # Whether zero is better: the gain of x in units of 1 / (2 tau), and as the formulas have it.
    size, two = x.abs(), stages.of_arithmetic(2.0)
    pull = two * scaled.abs()
    gains = [size * (pull - two * threshold - size * (ridge - stages.of_arithmetic(stages.tau / stages.gamma)))]
    if fades:
        height = stages.of_arithmetic(stages.tau * (stages.gamma * stages.l1) * stages.l1)
        beyond = size * (pull - size * ridge) - height
        gains = [decided(size.lo > knee.hi, size.hi <= knee.lo, beyond, gains[0])]
    costs = [stages.of_arithmetic(2 * stages.tau * stages.l0)]
    own = strength1 * size
    if fades:
        double = (stages.of_arithmetic(stages.gamma) * two).not_negative()
        within = own - size * size / double
        highest = stages.of_arithmetic(stages.gamma * stages.l1 * stages.l1 / 2)
        own = decided(size.lo > knee.hi, size.hi < knee.lo, highest, within)
    quadratic = size * (two * z.abs() - size) / (two * kappa).not_negative()
    gains.append(quadratic - own - strength2 / two * size * size)
    costs.append(stages.of_arithmetic(stages.l0))
    is_zero, is_kept = torch.ones_like(is_flat), torch.ones_like(is_flat)
    for gain, cost in zip(gains, costs, strict=True):
        certain = ~gain.nan & ~gain.must_be_nan
        is_zero = is_zero & certain & (gain.hi <= cost.lo)
        is_kept = is_kept & ((certain & (gain.lo > cost.hi)) | gain.must_be_nan)
    if stages.l0 == 0:
        is_zero, is_kept = is_zero & is_concave, is_kept | is_convex
    zero = Span(torch.zeros_like(x.lo), torch.zeros_like(x.hi), torch.zeros_like(x.nan), x.arithmetic)
    # A NaN is never smaller than a cost.
    return select(x.must_be_nan, x, decided(is_zero & ~x.nan, is_kept, zero, x))


def multiplies_out(rule: str, group: dict[str, Any]) -> bool:
    """Whether the code divides once for the step and its prox: then the weight is multiplied by the metric before the
    step is taken off it, and that product rounds."""
    if rule not in ("adam", "nadam", "radam", "adamax", "adagrad", "rmsprop") or group.get("momentum"):
        return False
    shrinks = any(group[name] != 0 for name in ("l1", "l2", "l0"))
    return shrinks and group["penalty_mode"] == "proximal" and (group["l1"] == 0 or group["mcp_gamma"] == INF)


def step_bounds(
    rule: str,
    w: Tensor,
    clipped: Span,
    state: dict[str, Tensor],
    scalars: Scalars,
    group: dict[str, Any],
    coefficient: Span | None,
) -> tuple[Span, Bounds]:
    """Stages 3 to 6 for one parameter: bounds of the weight, and of the state in those of stage 5."""
    a = arithmetic_of(w.dtype)
    w_old = exactly(w, a)
    g = clipped if coefficient is None else clipped * to_arithmetic(coefficient, a)
    g = penalized(g, w_old, group)
    moving = w_old
    if group.get("decoupled_weight_decay"):
        moving = w_old * scalar(1 - float(group["lr"]) * float(group["weight_decay"]), a)
    is_multiplied_out = multiplies_out(rule, group)
    if is_multiplied_out:
        moving = moving.coarser(16).rounded()
    spans = {name: exactly(tensor, a) for name, tensor in state.items()}
    bounds = RULES[rule](moving, g, spans, scalars, group)
    bounds.is_multiplied_out = is_multiplied_out
    weight = prox_bounds(bounds, w_old, group)
    bounds.state |= bounds.finish(weight)
    return weight, bounds
