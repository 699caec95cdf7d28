"""What a penalty is: one declaration, which constructors, checks, the oracle and ``fusedreg.penalty`` follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
Scalar = Any  # a float, or a 0-dim tensor where autograd or a CUDA graph must see it

PENALTY_MODES = ("proximal", "decoupled", "subgradient")


def on_gpu(value: object) -> bool:
    """Whether reading a value would wait for a GPU. Such a value is taken as it is."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def as_python(value: Any) -> Any:
    """A scalar of numpy's as Python's: ``torch.load`` refuses checkpoints with others."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1 else value


def like(w: Tensor, value: Scalar) -> Tensor:
    """A number as a tensor beside ``w``, rounded to its dtype; one that is too large is infinite."""
    return torch.as_tensor(value, dtype=w.dtype, device=w.device)


def on_host(value: Any) -> Any:
    """A number as Python's, a tuple of them likewise. Reading a tensor on a GPU waits for it."""
    if isinstance(value, (tuple, list)):
        return tuple(map(on_host, value))
    is_one = isinstance(value, Tensor) and value.numel() == 1
    return value.detach().item() if is_one else as_python(value)  # detached: one that requires a gradient would warn


@dataclass(frozen=True)
class Option:
    """A keyword that every fusedreg optimizer takes beside its twin's, and a key of its param groups."""

    name: str
    default: Any
    type: str
    doc: str
    allowed: str
    """What may be given, in words."""
    is_allowed: Callable[[Any], bool]
    """Of a value as Python has it. One that is on a GPU is not asked about."""

    def check(self, value: Any) -> None:
        """Raises ValueError if ``value`` is not allowed."""
        if on_gpu(value):
            return
        if not self.is_allowed(on_host(value)):
            shown = repr(value) if isinstance(value, str) else value
            raise ValueError(f"Invalid {self.name} value: {shown} (allowed: {self.allowed})")


def strength(name: str, doc: str) -> Option:
    """An option that is a finite number >= 0, 0 by default."""
    return Option(
        name,
        0.0,
        "float",
        doc,
        "a finite number >= 0",
        lambda value: isinstance(value, (int, float)) and 0.0 <= value < math.inf,
    )


class Prox(NamedTuple):
    """The problem of stage 6: argmin over x of (x - z)^2 / (2 kappa) + all penalties, subject to all constraints."""

    z: Tensor
    """Where the rule's step has put the weight."""
    kappa: Scalar | Tensor
    w_old: Tensor
    """The weight before the step."""
    group: Group


@dataclass(frozen=True)
class Term:
    """What is common to penalties on elements and on units. At the default of its option it is not there."""

    option: Option
    """Its strength, or its bound."""
    value: Callable[[Tensor, Group], Tensor]
    """``value(w, group)``: the penalty of each element; of one on units, ``value(norms, group)``: of each unit. A
    constraint's is 0, and infinite where it is not met."""
    gradient: Callable[[Tensor, Group], Tensor] | None = field(default=None, kw_only=True)
    """``gradient(w, group)``: the subgradient that autograd takes of the penalty as a term of a loss. None where it
    says nothing of the penalty: with ``penalty_mode="subgradient"`` that is an error."""
    takes_complex: bool = field(default=False, kw_only=True)
    """Whether complex parameters may have it, as pairs of real numbers."""
    is_constraint: bool = field(default=False, kw_only=True)
    """Whether every weight, or unit, must meet it after a step, in every penalty mode."""

    @property
    def name(self) -> str:
        return self.option.name

    def is_on(self, group: Group) -> bool:
        """Whether the penalty acts. A strength that only a GPU knows counts as on."""
        value = group[self.name]
        return on_gpu(value) or bool(value != self.option.default)


@dataclass(frozen=True)
class UnitPenalty(Term):
    """A sum over the units of a parameter, or a constraint on each: of its Euclidean norm. See units.py."""


@dataclass(frozen=True)
class Penalty(Term):
    """A term of the objective, a sum over the elements of the weights, or a constraint on each of them.

    At its option's default its prox is the identity. Tensors are real, in the arithmetic dtype; every function returns
    new ones, of the shape of ``w``.
    """

    prox: Callable[[Tensor, Prox], Tensor]
    """``prox(x, problem)``: the minimiser, from ``x``, the one without this penalty and without those behind it in
    ``PENALTIES``. They are applied one after the other, in that order: together they must solve the whole problem."""
    subdifferential: Callable[[Tensor, Group], tuple[Tensor, Tensor]]
    """``subdifferential(w, group)``: each element's interval of subgradients, its lower and upper ends."""
    needs_zero: bool = field(default=False, kw_only=True)
    """Whether it is about weights that are zero, so that a box must not forbid them."""


def distance_to_subdifferential(penalties: tuple[Penalty, ...], gradient: Tensor, w: Tensor, group: Group) -> Tensor:
    """Each element's distance of ``-gradient``, the loss's, to the subdifferential of all penalties: 0 at a minimiser.

    Args:
        gradient: of the loss at ``w``, of its shape.
    """
    low, high = torch.zeros_like(w), torch.zeros_like(w)
    for penalty in penalties:
        its_low, its_high = penalty.subdifferential(w, group)
        low, high = low + its_low, high + its_high
    return torch.maximum(torch.maximum(low + gradient, -gradient - high), torch.zeros_like(w))
