"""C++, Python and the reference agree on every rule, its state names and its scalars, and each file is in its place."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from conftest import EXTENSION, needs_cpp
from helpers import IDS, OPTIMIZER_FLAGS, OPTIMIZERS, TWINS, flags_of, make_params, run

import fusedreg
from fusedreg import backends, reference
from fusedreg.backends.triton import why_not_triton
from fusedreg.groups import L1_MODES, REGULARIZERS
from fusedreg.optimizer import COMMON_SCALARS, FusedRegOptimizer

needs_triton = pytest.mark.skipif(why_not_triton() is not None, reason=why_not_triton() or "")
CSRC = Path(__file__).parents[1] / "csrc"


def test_every_public_optimizer_is_tested() -> None:
    public = {getattr(fusedreg, name) for name in fusedreg.__all__ if inspect.isclass(getattr(fusedreg, name))}
    concrete = {cls for cls in public if issubclass(cls, FusedRegOptimizer)} - {FusedRegOptimizer}
    assert concrete == set(OPTIMIZERS) == set(TWINS)


def test_python_and_the_reference_have_the_same_rules() -> None:
    assert {cls.rule for cls in OPTIMIZERS} == set(reference.RULES)


@needs_cpp
def test_python_and_cpp_have_the_same_rules_states_and_scalars() -> None:
    python = {
        cls.rule: {"state_names": list(cls.state_names), "scalars": [*COMMON_SCALARS, *cls.scalars]}
        for cls in OPTIMIZERS
    }
    assert EXTENSION.rules() == python


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_FLAGS, ids=IDS)
def test_the_scalars_and_the_groups_keys_are_there(cls, flags) -> None:
    params = make_params()
    optimizer = cls(params, **flags_of(cls, flags))
    group = optimizer.param_groups[0]
    assert len(cls._read_scalars(group)) == len(COMMON_SCALARS) + len(cls.scalars)
    assert set(REGULARIZERS) < set(group)
    # every option of the twin that changes a step is watched for changes
    inert = {"params", "foreach", "fused", "capturable", "differentiable", *REGULARIZERS}
    assert set(group) - inert == set(cls.group_keys)
    run(optimizer, params, 1)
    kept = {name for name in optimizer.state[params[0]] if name != "step"}
    assert kept == set(cls.states_of(group)) <= set(cls.state_names)


@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_FLAGS, ids=IDS)
def test_the_reference_returns_the_states_that_the_class_names(cls, flags) -> None:
    optimizer = cls(make_params(), **flags_of(cls, flags))
    group = optimizer.param_groups[0]
    state = {name: torch.ones(2) for name in cls.states_of(group)}
    step = reference.RULES[cls.rule](torch.ones(2), torch.ones(2), state, 1.0, group)
    assert set(step.state) == set(state)


@pytest.mark.parametrize("rule", reference.RULES)
def test_every_rule_has_its_header(rule) -> None:
    assert (CSRC / "rules" / f"{rule}.h").exists()
    assert f'#include "{rule}.h"' in (CSRC / "rules" / "registry.h").read_text()


@needs_triton
def test_triton_has_every_rule_its_states_and_its_scalars() -> None:
    from fusedreg.triton import kernels, scalars
    from fusedreg.triton.rules import RULES

    python = {cls.rule: (cls.state_names, cls.scalars) for cls in OPTIMIZERS}
    assert {name: (rule.state_names, rule.scalar_names) for name, rule in RULES.items()} == python
    common = [getattr(scalars, name.upper()).value for name in COMMON_SCALARS]
    assert common == list(range(scalars.RULE_SCALARS))
    assert [getattr(scalars, mode.upper()).value for mode in L1_MODES] == list(range(len(L1_MODES)))
    for rule in RULES.values():
        assert len(rule.state_names) <= kernels.MAX_STATES == kernels.NUMEL.value - kernels.STATE.value
        assert kernels.HYPER_FIELDS.value + rule.step_scalars <= kernels.HYPER_WIDTH.value


@needs_triton
@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_FLAGS, ids=IDS)
def test_triton_counts_states_as_the_class_does(cls, flags) -> None:
    from fusedreg.triton.rules import RULES

    group = cls(make_params(), **flags_of(cls, flags)).param_groups[0]
    values = dict(zip((*COMMON_SCALARS, *cls.scalars), cls._read_scalars(group), strict=True))
    assert RULES[cls.rule].state_count(values) == len(cls.states_of(group))


def test_the_l1_modes_have_the_order_of_the_cpp_enum() -> None:
    line = next(line for line in (CSRC / "hyper.h").read_text().splitlines() if line.startswith("enum class L1Mode"))
    assert [f"k{mode.capitalize()} = {i}" for i, mode in enumerate(L1_MODES)] == line[
        line.index("{") + 1 : line.index("}")
    ].strip().split(", ")


def test_the_maths_headers_know_nothing_of_torch() -> None:
    for header in [*CSRC.glob("*.h"), *CSRC.glob("rules/*.h")]:
        for line in header.read_text().splitlines():
            if line.startswith("#include"):
                assert not any(name in line for name in ("torch", "ATen", "c10", "pybind")), f"{header}: {line}"


def test_backends_are_registered_under_their_names() -> None:
    assert all(name == backend.name for name, backend in backends.BACKENDS.items())
    assert list(backends.BACKENDS)[-1] == "reference"  # what everything falls back to
