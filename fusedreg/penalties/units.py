"""Penalties on whole units of a parameter: rows, columns, or all of it. What they are on, and their prox.

A unit's weights share one term: its Euclidean norm. So a unit becomes zero as a whole. The prox comes after that of the
element penalties, whose results are its ``y``. Yuan and Lin, "Model selection and estimation in regression with grouped
variables", https://doi.org/10.1111/j.1467-9868.2005.00532.x; with ``l1`` it is the sparse group lasso: Friedman, Hastie
and Tibshirani, https://arxiv.org/abs/1001.0736.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Group, Option, Scalar, UnitPenalty, like, strength

Unit = str | int

GROUP_L1 = UnitPenalty(
    strength(
        "group_l1",
        """strength of the penalty ``group_l1`` times the sum of the units' Euclidean norms, the group lasso, >= 0:
        whole units become zero. There is no factor for a unit's size. ``unit`` says what a unit is. Default: 0.""",
    ),
    value=lambda norms, group: like(norms, group["group_l1"]) * norms,
)
MAX_UNIT_NORM = UnitPenalty(
    Option(
        "max_unit_norm",
        math.inf,
        "float",
        "the largest Euclidean norm that a unit may have; ``unit`` says what a unit is. Default: inf.",
        "a number > 0, or inf for none",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
    ),
    value=lambda norms, group: torch.where(_exceeds(norms, group["max_unit_norm"]), math.inf, 0 * norms),
    is_constraint=True,
)
UNIT = Option(
    "unit",
    "rows",
    "str or int",
    """the units of ``group_l1`` and ``max_unit_norm``. ``"rows"`` (default): indices of a parameter's first dimension,
    its output units, filters, embeddings. ``"columns"``: of its second, its input units. ``"tensor"``: the whole
    parameter. n: so many neighbouring rows together.""",
    "'rows', 'columns', 'tensor' or a whole number > 0 of rows",
    lambda value: (
        value in ("rows", "columns", "tensor") or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
    ),
)


def _exceeds(norms: Tensor, bound: Scalar) -> Tensor:
    """But for rounding, which a projection leaves."""
    return norms > like(norms, bound) * (1 + 4 * torch.finfo(norms.dtype).eps)


def count_units(shape: tuple[int, ...], unit: Unit, option: str, whose: str) -> int:
    """How many units a parameter of a shape has.

    Raises:
        ValueError: it has none. The message speaks of an option and of whose parameter it is.
    """
    if unit == "tensor":
        return 1
    if len(shape) < (2 if unit == "columns" else 1):
        raise ValueError(f"Invalid {option} value: {unit!r} for {whose}, which has none")
    rows = unit if isinstance(unit, int) else 1
    if shape[0] % rows != 0:
        raise ValueError(f"Invalid {option} value: {unit} for {whose} (allowed: a number that divides {shape[0]})")
    return shape[1] if unit == "columns" else shape[0] // rows


def as_units(w: Tensor, unit: Unit) -> Tensor:
    """A parameter as (units, weights of each)."""
    if unit == "columns":
        w = w.movedim(1, 0)
    count = count_units(tuple(w.shape), unit if unit != "columns" else "rows", "unit", "a parameter")
    return w.reshape(count, w.numel() // max(count, 1))


def from_units(units: Tensor, like: Tensor, unit: Unit) -> Tensor:
    """The reverse of ``as_units``: in the shape of ``like``."""
    if unit == "columns":
        return units.reshape(like.movedim(1, 0).shape).movedim(0, 1)
    return units.reshape(like.shape)


def unit_code(unit: Unit) -> int:
    """The number that stands for it in the kernels: of rows, 0 for the tensor, -1 for a column."""
    return {"tensor": 0, "columns": -1, "rows": 1}[unit] if isinstance(unit, str) else unit


class UnitProx(NamedTuple):
    """argmin over x of sum d_i (x_i - z_i)^2 / (2 tau) + all penalties, subject to all constraints, unit by unit."""

    tau: Scalar
    ridge: Tensor
    """d + tau * l2, element by element."""
    furthest: Tensor
    """How far ``group_l1`` may move a weight in one step: the safeguard. Infinite where none is needed."""


def unit_prox(y: Tensor, problem: UnitProx, group: Group) -> Tensor:
    """The minimiser, from the element penalties' own ``y``. Tensors are (units, weights of each).

    The group lasso's is y * e r / (e r + tau * group_l1) with e the ridge and r its own norm, the root of
    ||e y / (e r + tau * group_l1)|| = 1, or 0 where there is none; the projection's y * e / (e + mu), with the mu that
    makes the norm right. Both roots are bracketed and halved.
    """
    e, strength = problem.ridge, like(y, problem.tau * group["group_l1"])
    is_usual = y.isfinite().all(1, keepdim=True)  # what is not finite is to be seen
    x, norm = y, y.norm(dim=1, keepdim=True)
    if group["group_l1"] != 0:
        r = _root(lambda r: (e * y / (e * r + strength)).norm(dim=1, keepdim=True) > 1, norm)
        shrunk = y * (e * r / (e * r + strength))
        x = torch.where((y - shrunk).abs() > problem.furthest, y - problem.furthest * y.sign(), shrunk)
    bound = like(y, group["max_unit_norm"])
    is_beyond = x.norm(dim=1, keepdim=True) > bound
    if bool(is_beyond.any()):
        most = e.amax(1, keepdim=True) * norm / bound
        mu = _root(lambda mu: (y * e / (e + mu)).norm(dim=1, keepdim=True) > bound, most)
        x = torch.where(is_beyond, y * e / (e + mu), x)
    return torch.where(is_usual, torch.where(x == 0, 0, x), y)  # zeros are +0.0


def _root(is_below, most: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Where ``is_below`` turns from True to False, between 0 and ``most``."""
    low, high = torch.zeros_like(most), most
    for _ in range(2 * torch.finfo(most.dtype).bits):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(high == 0, high, low)
