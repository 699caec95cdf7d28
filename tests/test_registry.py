"""What is declared once in Python, the kernels know too; and what is declared is tested by being declared."""

from __future__ import annotations

import ast
import graphlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXTENSION, needs_cpp
from helpers import IDS, OPTIMIZER_VARIANTS, OPTIMIZERS, make_params, run, set_grads, variant_of

import fusedreg
from fusedreg import backends, hyperparameters
from fusedreg.backends.triton import why_not_triton
from fusedreg.hyperparameters import Hyperparameters, compiled_field_names, read_numbers
from fusedreg.optimizer import FusedRegOptimizer
from fusedreg.penalties import OPTIONS, PENALTIES, PENALTY_MODES
from fusedreg.rules.spec import COMMON, Scalars

needs_triton = pytest.mark.skipif(why_not_triton() is not None, reason=why_not_triton() or "")
ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SPECS = {cls.spec.name: cls.spec for cls in OPTIMIZERS}
every_rule = pytest.mark.parametrize("rule", SPECS)
every_variant = pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)


def mask(spec, group) -> int:
    needed = spec.needed_states(group)
    return sum(1 << i for i, state in enumerate(spec.states) if state.name in needed)


def masks(spec) -> set[int]:
    """The combinations of states that the variants of all classes of a rule need."""
    found = set()
    for cls, variant in OPTIMIZER_VARIANTS:
        if cls.spec.name == spec.name:
            found.add(mask(spec, cls(make_params(), **variant_of(cls, variant)).param_groups[0]))
    return found


def test_every_public_optimizer_is_in_the_registry() -> None:
    public = {getattr(fusedreg, name) for name in fusedreg.__all__ if inspect.isclass(getattr(fusedreg, name))}
    concrete = {cls for cls in public if issubclass(cls, FusedRegOptimizer)} - {FusedRegOptimizer}
    assert concrete == set(OPTIMIZERS), "an optimizer is missing in fusedreg/rules/registry.py, or not public"


# -- C++


@needs_cpp
@every_rule
def test_cpp_has_the_rule_with_its_states_and_fields(rule) -> None:
    """A name that only one side has would be a number that nobody reads, or one that stays at its default."""
    spec, known = SPECS[rule], EXTENSION.rules()
    assert rule in known, f"the rule {rule!r} has no line in csrc/rules/registry.h, or the extension is not rebuilt"
    names = [state.name for state in spec.states]
    assert known[rule]["states"] == names, f"csrc/rules/{rule}.h and fusedreg/rules/{rule}.py differ in their states"
    scalars = [state.name for state in spec.scalar_states]
    assert known[rule]["scalar_states"] == scalars, f"csrc/rules/{rule}.h and the spec differ in their scalar states"
    fields = compiled_field_names(spec)
    assert known[rule]["fields"] == fields, f"csrc/rules/{rule}.h and the spec differ in the numbers of a group"
    assert set(known[rule]["variants"]) == masks(spec), f"csrc/rules/{rule}.h has kernels for other states than needed"


@needs_cpp
def test_cpp_has_no_rule_that_python_lacks() -> None:
    assert set(EXTENSION.rules()) == set(SPECS)


@needs_cpp
def test_a_rule_or_field_that_cpp_lacks_is_an_error() -> None:
    def plan(rule, fields):
        columns = (fields, [], [], [], [], [], [], [], {}, False, ())
        return EXTENSION.Plan(rule, columns)

    plan("adam", ["lr", "beta1"])
    with pytest.raises(ValueError, match="there is no kernel for the rule 'nonsense'"):
        plan("nonsense", ["lr"])
    with pytest.raises(ValueError, match="the kernel of the rule 'adam' has no field 'momentum'"):
        plan("adam", ["lr", "momentum"])
    param = torch.zeros(2)
    states, scalars = (torch.zeros(2), None, None), (torch.zeros(()),)
    with pytest.raises(ValueError, match="no kernel for these states together"):
        EXTENSION.Plan("adam", (["lr"], [param], [0], [{}], [states], [(None,) * 3], [scalars], [None], {}, False, ()))
    states = (torch.zeros(2, dtype=torch.int8), torch.zeros(2, dtype=torch.uint8), None)
    for scales, message in [(None, "has no scales"), (torch.zeros(2), "not as many as its blocks")]:
        with pytest.raises(ValueError, match=message):
            EXTENSION.Plan(
                "adam", (["lr"], [param], [0], [{}], [states], [(scales,) * 3], [scalars], [None], {}, False, ())
            )


@every_rule
def test_every_rule_has_its_header(rule) -> None:
    assert (CSRC / "rules" / f"{rule}.h").exists(), f"there is no csrc/rules/{rule}.h"
    assert f"RULE({rule}, " in (CSRC / "rules" / "registry.h").read_text(), f"csrc/rules/registry.h has no {rule}"


def test_the_penalty_modes_have_the_order_of_the_cpp_enum() -> None:
    lines = (CSRC / "maths" / "hyperparameters.h").read_text().splitlines()
    line = next(line for line in lines if line.startswith("enum class PenaltyMode"))
    assert [f"k{mode.capitalize()} = {i}" for i, mode in enumerate(PENALTY_MODES)] == line[
        line.index("{") + 1 : line.index("}")
    ].strip().split(", ")


def test_the_maths_headers_know_nothing_of_torch() -> None:
    for header in [*CSRC.glob("maths/*.h"), *CSRC.glob("rules/*.h")]:
        for line in header.read_text().splitlines():
            if line.startswith("#include"):
                assert not any(name in line for name in ("torch", "ATen", "c10", "pybind")), f"{header}: {line}"


# -- Triton


@needs_triton
@every_rule
def test_triton_has_the_rule_with_its_states_and_fields(rule) -> None:
    from fusedreg.backends.triton.rules import RULES

    spec = SPECS[rule]
    assert rule in RULES, f"the rule {rule!r} has no line in fusedreg/backends/triton/rules/__init__.py"
    names = tuple(state.name for state in spec.states)
    assert RULES[rule].state_names == names, f"Triton's {rule} and its spec differ in their states"
    scalars = tuple(state.name for state in spec.scalar_states)
    assert RULES[rule].scalar_state_names == scalars, f"Triton's {rule} and its spec differ in their scalar states"
    own = tuple(name for each in spec.hyperparameters for name in each.field_names)
    assert RULES[rule].field_names == own, f"Triton's {rule} and its spec differ in the numbers of a group"
    has_metric = RULES[rule].metric is not None
    assert has_metric == (spec.metric is not None), f"Triton's {rule} and its spec differ in whether there is a metric"


# -- specs


@every_variant
def test_what_is_declared_is_there(cls, variant) -> None:
    params = make_params()
    optimizer = cls(params, **variant_of(cls, variant))
    spec, group = cls.spec, optimizer.param_groups[0]
    assert len(read_numbers(spec, group)) == len(compiled_field_names(spec))
    assert {option.name for option in OPTIONS} < set(group)
    # every option of the twin that changes a step is watched for changes
    inert = {"params", "foreach", "fused", "capturable", "differentiable", *(option.name for option in OPTIONS)}
    own = {each.name for each in spec.hyperparameters} - {"l1_of_step"}  # FTRL's, which says what others do
    assert own <= set(group) - inert <= own | {each.name for each in COMMON}
    run(optimizer, params, 1)
    kept = set(optimizer.state[params[0]])
    assert kept == {*spec.needed_states(group), *spec.needed_scalar_states(group)}


@every_variant
def test_the_oracle_returns_the_states_that_the_spec_names(cls, variant) -> None:
    spec, group = cls.spec, cls(make_params(), **variant_of(cls, variant)).param_groups[0]
    states = {name: torch.ones(2) for name in spec.needed_states(group)}
    before = dict.fromkeys(spec.needed_scalar_states(group), 1.0)
    after = spec.next_scalars(before, group, dict.fromkeys(before, torch.float32))
    step = spec.step(torch.ones(2), torch.ones(2), states, Scalars(before, after), group)
    assert {*step.state, *step.finish(step.w, step.w)} == set(states)


@every_rule
def test_variants_need_every_state(rule) -> None:
    """A state that no variant needs is a state that no suite sees."""
    spec = SPECS[rule]
    seen = 0
    for each in masks(spec):
        seen |= each
    assert seen == (1 << len(spec.states)) - 1, f"no variant of {rule!r} needs some of its states"


def test_penalties_are_options_with_an_identity_at_the_default() -> None:
    names = [option.name for option in OPTIONS]
    assert len(names) == len(set(names))
    off = {option.name: option.default for option in OPTIONS}
    for penalty in PENALTIES:
        assert penalty.name in names
        assert not penalty.is_on(off)


def test_no_import_goes_in_a_circle() -> None:
    """Each module of fusedreg imports, where it begins, only modules that do not import it in turn."""
    package = Path(fusedreg.__file__).parent
    modules = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = inside.rsplit(".", node.level - 1)[0] if node.level > 1 else inside
                base = f"{base}.{node.module}" if node.module else base
                for alias in node.names:
                    graph[name].add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    graph.pop("fusedreg")  # it imports all
    try:
        order = list(graphlib.TopologicalSorter({name: its & set(graph) for name, its in graph.items()}).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")
    assert order.index("fusedreg.rules.spec") < order.index("fusedreg.optimizer") < order.index("fusedreg.rules.adam")


def test_backends_are_registered_under_their_names() -> None:
    assert all(name == backend.name for name, backend in backends.BACKENDS.items())
    assert list(backends.BACKENDS)[-1] == "reference"  # what everything falls back to


# -- a rule from outside


def with_the_toy(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "tests" / "toy"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-p", "toy_rule", "-p", "no:cacheprovider", "-q", "-k", "Toy or toy"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=300,
    )


def test_a_registered_rule_is_tested_by_every_suite() -> None:
    """A toy rule, which only tests/toy knows, runs through parity and its twin's suites and passes them."""
    run_suites = ("tests/test_parity.py", "tests/test_edges.py", "tests/dropin/test_twins.py")
    done = with_the_toy(*run_suites, "-k", "(Toy or toy) and reference")
    assert done.returncode == 0, done.stdout
    others = ("tests/dropin/test_checkpoints.py", "tests/hostile/test_lifetime.py", "tests/hostile/test_bad_input.py")
    collected = with_the_toy("--collect-only", *others).stdout
    for suite in others:
        assert f"{suite}::" in collected, f"{suite} does not follow the registry"


def test_what_a_registered_rule_lacks_is_said() -> None:
    """Kernels, a solver for the truth suite: each is asked for by a test, in a sentence."""
    done = with_the_toy("tests/test_registry.py")
    assert "the rule 'toy' has no line in csrc/rules/registry.h" in done.stdout
    assert "there is no csrc/rules/toy.h" in done.stdout


def test_a_rule_without_kernels_is_stepped_by_the_reference() -> None:
    script = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout)
import toy_rule
param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)
toy_rule.FusedRegToy([param], lr=0.5, l1=0.1).step()
assert torch.allclose(param, torch.full((3,), 0.45)), param
assert "power (float): the learning rate falls" in toy_rule.FusedRegToy.__doc__
optimizer = toy_rule.FusedRegToy([param])
optimizer.param_groups[0]["power"] = 1.5
for wrong in lambda: toy_rule.FusedRegToy([param], power=-1), optimizer.step:
    try:
        wrong()
    except ValueError as error:
        assert "(allowed: a number in [0, 1])" in str(error)
    else:
        raise AssertionError("a power that is not allowed was taken")
try:
    toy_rule.FusedRegToy([param], backend="cpp").step()
except RuntimeError as error:
    print(error)
"""
    paths = os.pathsep.join([str(ROOT / "tests" / "toy"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    reason = EXTENSION and "it has no kernel for the rule 'toy'"
    assert not reason or done.stdout.count(reason) == 2


def test_a_state_that_came_from_elsewhere_keeps_its_dtype() -> None:
    """torch casts what it loads to the parameter's dtype; a gain in bfloat16 would be another prox."""
    params = make_params(((4, 3),), torch.bfloat16)
    options = {"lr": 0.1, "momentum": 0.9, "l1": 0.1}
    optimizer = fusedreg.FusedRegSGD(params, **options)
    run(optimizer, params, 3)
    resumed = fusedreg.FusedRegSGD(params, **options)
    resumed.load_state_dict(optimizer.state_dict())
    gain = resumed.state[params[0]]["momentum_gain"]
    assert (gain.dtype, gain.item()) == (torch.float64, 1 + 0.9 + 0.81)
    set_grads(params, 9)
    resumed.step()


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_a_learning_rate_is_followed_without_all_else(cls, monkeypatch) -> None:
    """As schedulers change it; together with anything else, everything is checked and read again."""
    opt = cls([{"params": make_params()}, {"params": make_params(), "lr": 0.25}], l1=0.1)
    followed = Hyperparameters(opt.spec, opt.defaults)
    checked = []
    monkeypatch.setattr(hyperparameters, "check_group", lambda spec, group: checked.append(group))
    first, second = opt.param_groups

    def refresh() -> tuple[bool, int]:
        checked.clear()
        changed = followed.refresh(opt.param_groups)
        assert followed.numbers == [list(read_numbers(opt.spec, group)) for group in followed.as_read(opt.param_groups)]
        return changed, len(checked)

    assert refresh() == (True, 2)
    assert refresh() == (False, 0)
    first["lr"] = 0.125
    assert refresh() == (True, 0)
    first["lr"], second["lr"] = 0.5, 0.75
    assert refresh() == (True, 0)
    assert refresh() == (False, 0)
    first["lr"], second["l1"] = 0.25, 0.2
    assert refresh() == (True, 2)
    first["lr"] = torch.tensor(0.5)
    assert refresh() == (True, 2)
    first["lr"] = 0.5
    assert refresh() == (True, 2)  # a tensor may have been written to
    first["lr"] = 1
    assert refresh() == (True, 2)
    assert followed.numbers[0][0] == 1.0


def test_a_learning_rate_that_is_not_allowed_is_not_followed() -> None:
    (cls,) = [each for each in OPTIMIZERS if each.spec.name == "lion"]
    opt = cls([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    opt.step()
    before = opt.param_groups[0]["params"][0].detach().clone()
    opt.param_groups[0]["lr"] = -0.1
    for _ in range(2):
        with pytest.raises(ValueError, match="lr"):
            opt.step()
        assert opt.param_groups[0]["params"][0].equal(before)
