"""The penalties, and every other keyword that a fusedreg optimizer takes beside its twin's."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .box import LOWER, UPPER
from .freeze_zeros import FREEZE_ZEROS
from .l0 import L0
from .l1 import L1
from .l2 import L2
from .mcp import MCP_GAMMA
from .spec import PENALTY_MODES, Group, Option, Penalty, Prox, UnitPenalty, as_python, on_gpu
from .units import GROUP_L1, MAX_UNIT_NORM, UNIT, unit_code

__all__ = [
    "MAX_GRAD_NORM",
    "MODE_DOCS",
    "OF_STORAGE",
    "OPTIONS",
    "PENALTIES",
    "PENALTY_MODE",
    "PENALTY_MODES",
    "REGULARIZE_MIN_NDIM",
    "ROUNDING_SEED",
    "STATE_DTYPE",
    "STOCHASTIC_ROUNDING",
    "TARGETS",
    "UNIT_PENALTIES",
    "Option",
    "Penalty",
    "Prox",
    "Regularizers",
    "UnitPenalty",
    "as_python",
    "check_together",
    "compiled_fields",
    "has_stages",
    "has_units",
    "of_the_weights",
    "off",
    "on_gpu",
    "state_dtype_of",
]

# In the order in which their proxes are applied. The L0 penalty is behind the box: what it weighs against zero is what
# the box has left.
PENALTIES: tuple[Penalty, ...] = (L1, L2, MCP_GAMMA, LOWER, UPPER, L0, FREEZE_ZEROS)

# Behind them, on the norms of units.
UNIT_PENALTIES: tuple[UnitPenalty, ...] = (GROUP_L1, MAX_UNIT_NORM)

MODE_DOCS = {
    "proximal": """a proximal step in the optimizer's own metric, which ends at the exact minimiser of ``loss +
    penalty``, with exact zeros.""",
    "decoupled": """a proximal step of size ``lr``, scale-free as AdamW's decay, with exact zeros, but not the
    Lasso.""",
    "subgradient": """the penalties as gradients, as ``loss += l1 * w.abs().sum() + l2 / 2 * w.square().sum()``; no
    exact zeros.""",
}
PENALTY_MODE = Option(
    "penalty_mode",
    "proximal",
    "str",
    "how the penalties act.",
    ", ".join(map(repr, PENALTY_MODES)),
    lambda value: value in PENALTY_MODES,
)
CLIP_VALUE = Option(
    "clip_value",
    None,
    "float, optional",
    """clamps every gradient element to ``[-clip_value, clip_value]``, as ``clip_grad_value_``, without writing
    ``p.grad``.""",
    "None or a number >= 0",
    lambda value: value is None or (isinstance(value, (int, float)) and value >= 0.0),
)
# One number for the whole optimizer; it stands in every group so that state dicts carry it.
MAX_GRAD_NORM = Option(
    "max_grad_norm",
    None,
    "float, optional",
    """scales all gradients down to this total norm, as ``clip_grad_norm_`` after ``clip_grad_value_``, without writing
    ``p.grad``. One number for the whole optimizer; ``inf`` only measures.""",
    "None or a number > 0",
    lambda value: value is None or (isinstance(value, (int, float)) and value > 0.0),
)

# What no step acts on, and SparsitySchedule does.
SPARSITY = Option(
    "sparsity",
    None,
    "float, optional",
    """the share of exact zeros that ``fusedreg.SparsitySchedule`` brings this group to; without a schedule it does
    nothing.""",
    "None or a number in [0, 1)",
    lambda value: value is None or (isinstance(value, (int, float)) and 0.0 <= value < 1.0),
)
SPARSITY_UNIT = Option(
    "sparsity_unit",
    None,
    "str or int, optional",
    """what ``sparsity`` is a share of. None (default): single weights. ``"rows"``: indices of a parameter's first
    dimension, its output units. ``"columns"``: of its second, its input units. n: so many neighbouring rows
    together.""",
    "None, 'rows', 'columns' or a whole number > 0",
    lambda value: (
        value is None
        or value in ("rows", "columns")
        or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
    ),
)
TARGETS = (SPARSITY, SPARSITY_UNIT)

# For groups that a framework makes, of all parameters. It decides who is meant by what stands in a group; nothing below
# the optimizer knows of it (hyperparameters.spare_small).
REGULARIZE_MIN_NDIM = Option(
    "regularize_min_ndim",
    0,
    "int",
    """spares parameters of fewer dimensions every penalty, constraint, target and decay: 2 spares biases and the scales
    of norm layers, where a framework makes the groups and ``fusedreg.param_groups`` does not. Default: 0, none.""",
    "a whole number >= 0",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
)

# How state is stored, which no kernel is told: it sees the tensors.
STATE_DTYPE = Option(
    "state_dtype",
    None,
    "torch.dtype or str, optional",
    """the dtype that tensor states (``exp_avg``, ``momentum_buffer``) are made in, and kept in when they are loaded;
    step counts and other numbers are not meant. A step is computed in float32, in float64 for float64 parameters,
    and rounds a state once. ``"int8"``: 8 bits, and a scale for each 256 elements. None (default): the parameter's
    dtype, as torch.""",
    "None, torch.bfloat16, torch.float16, torch.float32, torch.float64 or 'int8'",
    lambda value: value in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, "int8"),
)
STOCHASTIC_ROUNDING = Option(
    "stochastic_rounding",
    False,
    "bool",
    """rounds parameters and tensor states that are stored in bfloat16, and states in 8 bits, up or down at random, so
    that small changes are kept in the mean; to the nearest, they are lost. Exact zeros stay. float32 and float64 are
    stored as they are; float16 is refused. Default: False, to the nearest.""",
    "True or False",
    lambda value: isinstance(value, bool),
)
# Moved on by each step: no number that a plan is made for.
ROUNDING_SEED = Option(
    "rounding_seed",
    0,
    "int",
    """of ``stochastic_rounding``. It moves on with each step, and state dicts carry it. Ranks must have the same.
    Default: 0, whatever torch's own seeds are.""",
    "a whole number >= 0 and < 2 ** 63",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63,
)

OPTIONS: tuple[Option, ...] = (
    *(each.option for each in (*PENALTIES, *UNIT_PENALTIES)),
    UNIT,
    PENALTY_MODE,
    CLIP_VALUE,
    MAX_GRAD_NORM,
    *TARGETS,
    REGULARIZE_MIN_NDIM,
    STATE_DTYPE,
    STOCHASTIC_ROUNDING,
    ROUNDING_SEED,
)

# How state is stored: for whoever makes an optimizer to say, and not for a checkpoint.
OF_STORAGE = (STATE_DTYPE, STOCHASTIC_ROUNDING)


class Regularizers(TypedDict, total=False):
    """The keywords as type checkers see them: ``OPTIONS``, and what is the optimizer's own."""

    l1: float | Tensor
    l2: float | Tensor
    mcp_gamma: float | Tensor
    lower: float | Tensor
    upper: float | Tensor
    l0: float | Tensor
    freeze_zeros: bool
    group_l1: float | Tensor
    max_unit_norm: float | Tensor
    unit: Literal["rows", "columns", "tensor"] | int
    penalty_mode: Literal["proximal", "decoupled", "subgradient"]
    clip_value: float | Tensor | None
    max_grad_norm: float | Tensor | None
    sparsity: float | None
    sparsity_unit: str | int | None
    regularize_min_ndim: int
    state_dtype: torch.dtype | Literal["int8"] | None
    stochastic_rounding: bool
    rounding_seed: int
    backend: str
    norm_group: torch.distributed.ProcessGroup | None


def state_dtype_of(group: Group) -> torch.dtype | None:
    """A group's ``state_dtype`` as a dtype."""
    value = group[STATE_DTYPE.name]
    return torch.int8 if value == "int8" else value


def check_together(group: Group) -> None:
    """Raises ValueError if options of a group are allowed one by one, and not together."""
    on = [penalty for penalty in PENALTIES if penalty.is_on(group)]
    of_units = [penalty for penalty in UNIT_PENALTIES if penalty.is_on(group)]
    if group["penalty_mode"] == "subgradient":
        for penalty in (*on, *of_units):
            if penalty.gradient is None and not penalty.is_constraint:
                raise ValueError(
                    f"Invalid {penalty.name} value: {group[penalty.name]} with penalty_mode='subgradient' (allowed: "
                    f"{penalty.option.default:g}, or another mode: its subgradient is not worth a step)"
                )
    lower, upper = group["lower"], group["upper"]
    for penalty in on if of_units else ():
        value = group[penalty.name]
        if penalty in (L0, MCP_GAMMA) or (penalty in (LOWER, UPPER) and not on_gpu(value) and value != 0):
            allowed = "0 or none" if penalty in (LOWER, UPPER) else f"{penalty.option.default:g}"
            raise ValueError(
                f"Invalid {penalty.name} value: {value} with {of_units[0].name}={group[of_units[0].name]} (allowed: "
                f"{allowed}; one after the other they would not be the minimiser of both)"
            )
    if on_gpu(lower) or on_gpu(upper):
        return
    if lower > upper:
        raise ValueError(f"Invalid lower value: {lower} with upper={upper} (allowed: lower <= upper)")
    about_zeros = [penalty.name for penalty in on if penalty.needs_zero]
    if group[SPARSITY.name] is not None:
        about_zeros.append(SPARSITY.name)
    if about_zeros and not lower <= 0 <= upper:
        name, value = ("lower", lower) if lower > 0 else ("upper", upper)
        raise ValueError(
            f"Invalid {name} value: {value} with {about_zeros[0]}={group[about_zeros[0]]} (allowed: lower <= 0 <= "
            "upper, so that a weight may be zero)"
        )


def has_stages(group: Group) -> bool:
    """Whether there is more to a group's prox than ``l1`` and ``l2``."""
    return any(penalty.is_on(group) for penalty in PENALTIES if penalty not in (L1, L2))


def has_units(group: Group) -> bool:
    """Whether a penalty is on the units of a group's parameters."""
    return any(penalty.is_on(group) for penalty in UNIT_PENALTIES)


def of_the_weights() -> tuple[Option, ...]:
    """The options that are about weights, so that biases and the like have none of them."""
    return (*(penalty.option for penalty in (*PENALTIES, *UNIT_PENALTIES)), UNIT, *TARGETS)


def off() -> dict[str, Any]:
    """What a group says of parameters that are spared: no decay, every option about weights at its default."""
    return {"weight_decay": 0.0, **{option.name: option.default for option in of_the_weights()}}


def compiled_fields(group: dict[str, Any]) -> dict[str, Any]:
    """What the kernels of every rule know of these options: numbers, by the names that they have there."""
    mode, clip_value = group["penalty_mode"], group["clip_value"]
    return {
        "clip_value": math.inf if clip_value is None else clip_value,
        "penalty_mode": PENALTY_MODES.index(mode),
        **{penalty.name: group[penalty.name] for penalty in (*PENALTIES, *UNIT_PENALTIES)},
        "unit": unit_code(group["unit"]),
    }
