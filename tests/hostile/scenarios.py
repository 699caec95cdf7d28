"""What the fuzzer draws: parameters in every layout, values, hyperparameters over their whole range, steps, sabotage.

A scenario is plain data, so that a failing one can be read; `build` and `lay_out` turn it into tensors.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fusedreg.penalties import PENALTIES as PENALTY_SPECS

SENTINEL = 12345.0
CHUNK = 32 * 1024
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
LAYOUTS = ("contiguous", "misaligned", "transposed", "channels_last", "strided", "gaps")
GRADIENT_LAYOUTS = (*LAYOUTS, "expanded", "conjugated")


@dataclasses.dataclass(frozen=True)
class Values:
    """Normal numbers times 10**scale, and among them, a `share`, numbers of the palette."""

    seed: int
    scale: int
    palette: tuple[float, ...]
    share: float

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        real_shape = (*shape, 2) if dtype.is_complex else shape
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(real_shape, generator=generator, dtype=torch.float64) * 10.0**self.scale
        if self.palette:
            chosen = torch.randint(len(self.palette), real_shape, generator=generator)
            from_palette = torch.tensor(self.palette, dtype=torch.float64)[chosen]
            values = torch.where(
                torch.rand(real_shape, generator=generator, dtype=torch.float64) < self.share, from_palette, values
            )
        if dtype.is_complex:
            return torch.view_as_complex(values).to(dtype)
        return values.to(dtype)


@dataclasses.dataclass(frozen=True)
class Param:
    shape: tuple[int, ...]
    layout: str
    dtype: str
    values: Values


@dataclasses.dataclass(frozen=True)
class Gradient:
    layout: str
    values: Values


@dataclasses.dataclass(frozen=True)
class Step:
    options: list[dict[str, Any]]
    """New hyperparameters, group by group."""
    gradients: list[Gradient | None]
    max_grad_norm: float | None
    grad_scale: float | None
    found_inf: float | None
    sabotage: str | None


@dataclasses.dataclass(frozen=True)
class Scenario:
    optimizer: type
    params: list[list[Param]]
    """Group by group."""
    options: list[dict[str, Any]]
    max_grad_norm: float | None
    steps: list[Step]


def lay_out(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A buffer of sentinels, and in it a view with these values, in this layout."""
    shape = tuple(values.shape)
    if layout == "expanded":
        # One number, or one row, for all.
        if not shape or values.numel() == 0:
            return lay_out(values, "contiguous")
        buffer, row = lay_out(values[:1].clone(), "contiguous")
        return buffer, row.expand(shape)
    if layout == "conjugated":
        buffer, view = lay_out(values.conj().resolve_conj(), "contiguous")
        return buffer, view.conj()
    order = list(range(len(shape)))  # dimensions from the outermost to the innermost
    if layout == "transposed":
        order.reverse()
    elif layout == "channels_last" and len(shape) == 4:
        order = [0, 2, 3, 1]
    strides, stride = [0] * len(shape), 1
    for place, dim in enumerate(reversed(order)):
        if layout == "strided" and place == 0:
            stride = 2
        if layout == "gaps" and place == len(shape) - 1:
            stride += 3
        strides[dim] = stride
        stride *= max(shape[dim], 1)
    # Nothing around a contiguous one: there an address sanitizer has its red zones.
    before, behind = (0, 0) if layout in ("contiguous", "transposed", "channels_last") else (1, 70)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if values.numel() else 0
    buffer = torch.full((before + extent + behind,), SENTINEL, dtype=values.dtype)
    view = buffer.as_strided(shape, strides, before)
    view.copy_(values)
    return buffer, view


# -- strategies: moderate numbers mostly, so that each term is seen, and now and then one from the ends of its range.
# With a dozen numbers in a scenario, one in ten leaves a third of the scenarios without any extreme.


def mostly(usual: st.SearchStrategy, *extremes: float) -> st.SearchStrategy:
    return st.one_of(*[usual] * 9, st.sampled_from(extremes))


PENALTIES = mostly(
    st.sampled_from([0.0, 1e-4, 0.05, 0.3, 2.0]), 5e-324, 1e-45, 1e-38, 1e-20, 1e10, 1e19, 3e38, 1e39, 1e300
)
LRS = mostly(st.sampled_from([1e-3, 0.02, 0.1, 1.0]), 0.0, 5e-324, 1e-45, 1e-38, 1e-10, 1e10, 1e38, 1e39, 1e300)
BETAS = mostly(
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 0.999]), 5e-324, 1e-45, 1e-8, 1 - 1e-8, 1 - 2.0**-24, 1 - 2.0**-53
)
ALPHAS = st.one_of(*[BETAS] * 9, st.just(1.0))
EPS = mostly(st.sampled_from([1e-8, 1e-6, 0.1]), 0.0, 5e-324, 1e-45, 1e-38, 1e-15, 1.0, 1e20, 1e38, 1e39)
MOMENTA = mostly(st.sampled_from([0.0, 0.3, 0.9, 0.99]), 5e-324, 1e-45, 1e-8, 1 - 2.0**-53, 1.0, 1.5)
LR_DECAYS = mostly(st.sampled_from([0.0, 1e-3, 0.1]), 5e-324, 1e-45, 1.0, 1e10, 1e300)
# No more than every dtype can hold: torch.optim.Adagrad's constructor raises.
ACCUMULATORS = mostly(st.sampled_from([0.0, 0.0, 0.1, 1.0]), 5e-324, 1e-45, 1e-20, 6e4)
# RAdam counts the steps that an average stands for: a difference that rounding decides where beta2 is nearly 1. NAdam
# divides by 1 less a product of momenta that is kept in float32. In torch too.
SHORTER_BETAS = mostly(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 0.999]), 5e-324, 1e-45, 1e-8)
MOMENTUM_DECAYS = mostly(st.sampled_from([0.0, 4e-3, 0.1]), 5e-324, 1e-45, 1.0, 1e10, 1e300)
STARTS = mostly(st.sampled_from([0.0, 1.0, 2.0, 1e6]), -1e300, -0.5, 5e-324, 1.5, 1e300)
# No more than every dtype can hold: torch.optim.Rprop raises in its first step.
STEPS_AT_FIRST = mostly(st.sampled_from([1e-3, 0.02, 0.1, 1.0]), 0.0, 5e-324, 1e-45, 1e-38, 1e-10, 6e4)
ETAS_MINUS = mostly(st.sampled_from([0.5, 0.9]), 1e-45, 1e-8, 1 - 2.0**-10)
ETAS_PLUS = mostly(st.sampled_from([1.2, 2.0]), 1 + 2.0**-10, 1e10, 1e38)
SMALLEST_STEPS = mostly(st.sampled_from([0.0, 1e-6, 1e-3]), 5e-324, 1e-45, 1e-20)
LARGEST_STEPS = mostly(st.sampled_from([50.0, 0.1]), 1e-3, 1e10, 1e38)
BETAS_OF_FTRL = mostly(st.sampled_from([1.0, 0.1, 1e-3]), 1e-15, 1e-8, 10.0, 1e20, 1e38)
CLIP_VALUES = mostly(st.sampled_from([None, None, 0.3, 1.2]), 0.0, 5e-324, 1e-45, 1e-30, 1e30, 3e38, 1e39, math.inf)
NORMS = mostly(st.sampled_from([None, None, 0.5, 4.0]), 5e-324, 1e-45, 1e-30, 1e10, 1e38, 1e300, math.inf)
GRAD_SCALES = mostly(
    st.sampled_from([None, None, None, 1.0, 2.0, 65536.0]), 0.5, 3.0, 1e-3, 1e-40, 1e-45, 1e30, math.inf
)
FOUND_INF = mostly(st.sampled_from([None, None, None, 0.0]), -0.0, 1.0, 2.0, math.nan, 1e-45)

SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0)
NUMBERS = (
    1.0,
    -1.0,
    1e-3,
    0.05,
    5e-324,
    1e-45,
    -1e-45,
    6e-8,
    1e-40,
    -1e-38,
    1.2e-38,
    1e-20,
    1e10,
    -1e19,
    65504.0,
    1e38,
)
PALETTES = st.one_of(
    st.just(()),
    st.just(()),
    st.just(()),
    st.just((0.0, -0.0)),
    st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3).map(tuple),
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=1, max_size=4).map(tuple),
)
VALUES = st.builds(
    Values,
    seed=st.integers(0, 999),
    scale=mostly(st.just(0), -40, -20, -5, 5, 18, 30, 37),
    palette=PALETTES,
    share=st.sampled_from([0.1, 0.5, 1.0]),
)

SMALL_SHAPES = st.one_of(
    st.tuples(st.integers(0, 70)),
    st.tuples(st.integers(0, 9), st.integers(0, 17)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)),
    st.just(()),
)
LARGE_SHAPES = st.sampled_from([(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (2 * CHUNK + 1,), (301, 211)])


@st.composite
def sgd_options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(MOMENTA)
    nesterov = momentum > 0 and draw(st.booleans())
    # Above 1, the prox would have a negative step size.
    dampening = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.0, 0.3, 0.9, -0.5]))
    return {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}


OWN_OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "adam": st.fixed_dictionaries({"betas": st.tuples(BETAS, BETAS), "eps": EPS, "amsgrad": st.booleans()}),
    "sgd": sgd_options(),
    "rmsprop": st.fixed_dictionaries({"alpha": ALPHAS, "eps": EPS, "momentum": MOMENTA, "centered": st.booleans()}),
    "adagrad": st.fixed_dictionaries({"lr_decay": LR_DECAYS, "eps": EPS, "initial_accumulator_value": ACCUMULATORS}),
    "nadam": st.fixed_dictionaries(
        {"betas": st.tuples(SHORTER_BETAS, BETAS), "eps": EPS, "momentum_decay": MOMENTUM_DECAYS},
    ),
    "radam": st.fixed_dictionaries({"betas": st.tuples(BETAS, SHORTER_BETAS), "eps": EPS}),
    "adamax": st.fixed_dictionaries({"betas": st.tuples(BETAS, BETAS), "eps": EPS}),
    "asgd": st.fixed_dictionaries({"lambd": LR_DECAYS, "alpha": ALPHAS, "t0": STARTS}),
    "rprop": st.fixed_dictionaries(
        {"etas": st.tuples(ETAS_MINUS, ETAS_PLUS), "step_sizes": st.tuples(SMALLEST_STEPS, LARGEST_STEPS)}
    ),
    "ftrl": st.fixed_dictionaries({"beta": BETAS_OF_FTRL, "initial_accumulator_value": ACCUMULATORS}),
    "lion": st.fixed_dictionaries({"betas": st.tuples(BETAS, BETAS)}),
    "adadelta": st.fixed_dictionaries({"rho": ALPHAS, "eps": EPS}),
}
"""What a group may say to a rule alone."""


# What has kernels of its own: together, or not at all.
STAGES: dict[str, st.SearchStrategy[Any]] = {
    "mcp_gamma": mostly(st.sampled_from([math.inf, 0.3, 2.0, 50.0]), 1e-20, 1e-3, 1e20, 1e39),
    "lower": mostly(st.sampled_from([-math.inf, -1.0, -0.02, 0.0]), -1e-40, -1e20, -1e39),
    "upper": mostly(st.sampled_from([math.inf, 1.0, 0.02]), 0.0, 1e-40, 1e20, 1e39),
    "l0": PENALTIES,
    "freeze_zeros": st.booleans(),
}


@st.composite
def optimizer_options(draw: st.DrawFn, cls: type, has_complex: bool) -> dict[str, Any]:
    """Everything that a group can say, but max_grad_norm, which all groups share."""
    options: dict[str, Any] = {
        "lr": draw(STEPS_AT_FIRST if cls.spec.name == "rprop" else LRS),
        **({"weight_decay": draw(PENALTIES)} if "weight_decay" in inspect.signature(cls).parameters else {}),
        "maximize": draw(st.booleans()),
        "l1": 0.0 if has_complex else draw(PENALTIES),
        "l2": draw(PENALTIES),
        # the first, "proximal" where the rule has it, twice as often
        "penalty_mode": draw(st.sampled_from((*cls.spec.modes, cls.spec.modes[0]))),
        "clip_value": draw(CLIP_VALUES),
    }
    options |= {penalty.name: penalty.option.default for penalty in PENALTY_SPECS if penalty.name in STAGES}
    if not has_complex and draw(st.booleans()):
        options |= {name: draw(strategy) for name, strategy in STAGES.items()}
        if options["penalty_mode"] == "subgradient":
            options |= {"mcp_gamma": math.inf, "l0": 0.0}
    if draw(st.integers(0, 4)) == 0:
        # Without a twin an lr that float32 cannot hold is refused.
        dtypes = [torch.float64] if cls.spec.twin is None else [torch.float32, torch.float64]
        options["lr"] = torch.tensor(options["lr"], dtype=draw(st.sampled_from(dtypes)))
    options |= draw(OWN_OPTIONS[cls.spec.name])
    if "decoupled_weight_decay" in inspect.signature(cls).parameters:
        options["decoupled_weight_decay"] = draw(st.booleans())
    return options


SABOTAGE = (
    "l1=-1",
    "l0=inf",
    "mcp_gamma=0",
    "lower=inf",
    "l2=nan",
    "clip_value=-1",
    "grad_scale=0",
    "sparse gradient",
    "norms disagree",
    "l1 on complex",
)


@st.composite
def scenarios(draw: st.DrawFn, classes: list[type]) -> Scenario:
    cls = draw(st.sampled_from(classes))
    groups = []
    large = draw(st.sampled_from([False] * 9 + [True]))
    for _ in range(draw(st.integers(1, 3))):
        group = []
        for _ in range(draw(st.integers(1, 3))):
            shape = draw(LARGE_SHAPES if large else SMALL_SHAPES)
            large = False
            dtype = draw(st.sampled_from(["fp32", "fp32", "bf16", "fp64", "fp16", "complex64", "complex128"]))
            group.append(Param(shape, draw(st.sampled_from(LAYOUTS)), dtype, draw(VALUES)))
        groups.append(group)
    has_complex = [any(param.dtype.startswith("complex") for param in group) for group in groups]
    steps = []
    for _ in range(draw(st.sampled_from([3, 2, 4, 1]))):
        gradients = [
            draw(st.one_of(st.none(), *[st.builds(Gradient, st.sampled_from(GRADIENT_LAYOUTS), VALUES)] * 4))
            for group in groups
            for _ in group
        ]
        steps.append(
            Step(
                options=[
                    draw(optimizer_options(cls, is_complex)) if steps and draw(st.booleans()) else {}
                    for is_complex in has_complex
                ],
                gradients=gradients,
                max_grad_norm=draw(NORMS),
                grad_scale=draw(GRAD_SCALES),
                found_inf=draw(FOUND_INF),
                sabotage=draw(st.one_of(*[st.none()] * 6, st.sampled_from(SABOTAGE))),
            )
        )
    return Scenario(
        optimizer=cls,
        params=groups,
        options=[draw(optimizer_options(cls, is_complex)) for is_complex in has_complex],
        max_grad_norm=draw(NORMS),
        steps=steps,
    )
