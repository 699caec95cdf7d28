"""Whatever is drawn, the fast backend and the reference take the step that the formulas describe, or refuse it alike.

A scenario (scenarios.py) is run by both backends. After each step, every weight and every state tensor must lie in the
interval that rounding allows (spans.py), computed from that optimizer's own tensors before the step; so must the
reference's formulas in float64. There is no tolerance to choose. Besides: gradients keep their bits, and so does all
memory around a view, a parameter without gradient and its state, and everything where a step is skipped or refused.

`make fuzz` runs many random scenarios of each rule, plain `pytest` a few fixed ones (profiles in tests/conftest.py).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import EXTENSION, FAST, needs_cpp
from helpers import IDS, OPTIMIZER_VARIANTS, OPTIMIZERS, regularized
from hypothesis import event, given, note
from hypothesis import strategies as st
from scenarios import CHUNK, DTYPES, OWN_OPTIONS, Gradient, Param, Scenario, Step, Values, lay_out, scenarios
from spans import RULES, Bounds, Span, clipped_by_value, coefficient_bounds, norm_bounds, step_bounds
from torch import Tensor

from fusedreg.backends import reference
from fusedreg.penalties import PENALTY_MODES
from fusedreg.rules.spec import RuleSpec, Scalars

pytestmark = needs_cpp


def bits(tensor: Tensor) -> bytes:
    """Of every element, NaNs' payloads and the signs of zeros included."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype)
    plain.copy_(tensor.detach().reshape(-1))
    return plain.view(torch.uint8).numpy().tobytes()


def real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclasses.dataclass
class Before:
    """A parameter that is about to be stepped: its inputs, as they were."""

    group: dict[str, Any]
    param: Tensor
    w: Tensor
    state: dict[str, Tensor]
    """The tensor states that the rule needs; what they begin with, where they have not begun."""
    scalars: dict[str, float]
    """The scalar states that it needs: what they begin with where they have not begun, NaN where nobody counted."""
    dtypes: dict[str, torch.dtype]
    """What these are stored in."""

    def both_scalars(self, spec: RuleSpec) -> Scalars:
        return Scalars(self.scalars, spec.next_scalars(self.scalars, self.options(), self.dtypes))

    def looked_at(self) -> Tensor:
        """Which elements are compared: all, or of a large tensor those around its chunks' borders and every 29th."""
        index = torch.arange(real(self.w).numel())
        place = index % CHUNK
        near = (index % 29 == 0) | (place < 70) | (place >= CHUNK - 70) | (index >= len(index) - 70)
        return index[near] if len(index) > 10_000 else index

    def options(self) -> dict[str, Any]:
        group = {k: v for k, v in self.group.items() if k != "params"}
        return {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}

    @classmethod
    def of(cls, spec: RuleSpec, group: dict[str, Any], param: Tensor, own: dict[str, Tensor]) -> Before:
        state, scalars, dtypes = {}, {}, {}
        for declared in spec.states:
            if declared.needed(group):
                state[declared.name] = own.get(declared.name, torch.zeros_like(param)).detach().clone()
                if declared.name not in own:
                    real_view(state[declared.name]).fill_(declared.initial(group))
        for scalar in spec.scalar_states:
            if scalar.needed(group):
                not_begun = scalar.accompanies is None or scalar.accompanies not in own
                initial = scalar.initial(group) if not_begun else math.nan
                kept_in = torch.float32 if scalar.is_step else torch.float64
                dtypes[scalar.name] = own[scalar.name].dtype if scalar.name in own else kept_in
                initial = torch.tensor(initial, dtype=dtypes[scalar.name]).item()
                scalars[scalar.name] = float(own.get(scalar.name, initial))
        return cls(group, param, param.detach().clone(), state, scalars, dtypes)


class Driver:
    """One backend's optimizer on its own copy of a scenario's parameters."""

    def __init__(self, scenario: Scenario, backend: str) -> None:
        self.buffers: list[Tensor] = []
        self.gradient_buffers: list[Tensor] = []
        groups = [
            {"params": [self.make(spec) for spec in specs], **options}
            for specs, options in zip(scenario.params, scenario.options, strict=True)
        ]
        self.params = [param for group in groups for param in group["params"]]
        self.optimizer = scenario.optimizer(groups, max_grad_norm=scenario.max_grad_norm, backend=backend)

    def make(self, spec: Param) -> Tensor:
        buffer, view = lay_out(spec.values.tensor(spec.shape, DTYPES[spec.dtype]), spec.layout)
        self.buffers.append(buffer)
        return view.requires_grad_()

    def prepare(self, step: Step) -> None:
        """Sets gradients and hyperparameters."""
        self.gradient_buffers = []
        for param, gradient in zip(self.params, step.gradients, strict=True):
            param.grad = None
            if gradient is not None:
                layout = "contiguous" if gradient.layout == "conjugated" and not param.is_complex() else gradient.layout
                buffer, view = lay_out(gradient.values.tensor(tuple(param.shape), param.dtype), layout)
                self.gradient_buffers.append(buffer)
                param.grad = view
        for group, options in zip(self.optimizer.param_groups, step.options, strict=True):
            group.update(options, max_grad_norm=step.max_grad_norm)
        self.set_amp(grad_scale=step.grad_scale, found_inf=step.found_inf)

    def set_amp(self, **values: float | None) -> None:
        for name, value in values.items():
            self.optimizer.__dict__.pop(name, None)
            if value is not None:
                setattr(self.optimizer, name, torch.tensor(value))

    def sabotage(self, what: str) -> None:
        group, param = self.optimizer.param_groups[-1], self.params[-1]
        if what == "grad_scale=0":
            self.set_amp(grad_scale=0.0)
        elif what == "sparse gradient":
            nowhere, nothing = torch.zeros(param.ndim, 0, dtype=torch.int64), torch.zeros(0, dtype=param.dtype)
            param.grad = torch.sparse_coo_tensor(nowhere, nothing, param.shape, check_invariants=True)
        elif what == "norms disagree":
            group["max_grad_norm"] = 0.123
        elif what == "l1 on complex":
            group["l1"] = 0.123
        else:
            key, _, value = what.partition("=")
            group[key] = float(value)

    def record(self) -> dict[Any, Any]:
        """Every bit that this test holds a step responsible for."""
        everything: dict[Any, Any] = {("weight", i): bits(buffer) for i, buffer in enumerate(self.buffers)}
        everything |= {("gradient", i): bits(buffer) for i, buffer in enumerate(self.gradient_buffers)}
        for i, param in enumerate(self.params):
            for name, value in self.optimizer.state.get(param, {}).items():
                everything["state", i, name] = bits(value)
        for i, group in enumerate(self.optimizer.param_groups):
            everything |= {("group", i, k): bits(v) for k, v in group.items() if isinstance(v, Tensor)}
        return everything

    def before(self) -> list[Before]:
        optimizer = self.optimizer
        return [
            Before.of(optimizer.spec, group, param, optimizer.state.get(param, {}))
            for group in optimizer.param_groups
            for param in group["params"]
            if param.grad is not None
        ]

    def step(self, step: Step) -> None:
        """Takes the step, and compares every tensor with what it may be."""
        old, befores, i_of = self.record(), self.before(), {param: i for i, param in enumerate(self.params)}
        self.optimizer.step()
        new = self.record()
        if step.found_inf is not None and step.found_inf != 0:
            assert new == old
            return
        stepped = {i_of[before.param] for before in befores}
        for key, value in old.items():
            if key[0] == "gradient" or (key[0] != "group" and key[1] not in stepped):
                assert new[key] == value, f"{key} was written"
        assert not [key for key in new if key[0] == "state" and key not in old and key[1] not in stepped]
        for buffer, param in zip(self.buffers, self.params, strict=True):
            outside = torch.ones(buffer.shape, dtype=torch.bool)
            outside.as_strided(param.shape, param.stride(), param.storage_offset()).fill_(False)
            untouched, _ = lay_out(torch.zeros(0, dtype=buffer.dtype), "misaligned")
            assert (buffer[outside] == untouched[0]).all(), "memory outside of a view was written"
        self.compare(step, befores)

    def compare(self, step: Step, befores: list[Before]) -> None:
        optimizer = self.optimizer
        inv = 1.0 if step.grad_scale is None else 1.0 / torch.tensor(step.grad_scale).item()
        clipped = [clipped_by_value(before.param.grad, before.group, inv) for before in befores]
        coefficient = None
        if step.max_grad_norm is not None:
            norm = norm_bounds(clipped, [before.param.grad for before in befores], inv)
            assert norm.holds(optimizer.grad_norm), f"grad_norm {optimizer.grad_norm.item()}, {norm.lo} to {norm.hi}"
            coefficient = coefficient_bounds(norm, step.max_grad_norm)
        else:
            assert optimizer.grad_norm is None
        truths = float64_truths(optimizer.spec, step, befores, inv)

        for before, span, truth in zip(befores, clipped, truths, strict=True):
            index = before.looked_at()
            state = {name: real(value).reshape(-1)[index] for name, value in before.state.items()}
            w, group = real(before.w).reshape(-1)[index], before.options()
            rule = optimizer.spec.name
            weight, bounds = step_bounds(rule, w, span.at(index), state, before.scalars, group, coefficient)
            self.check_scalar_states(before, bounds)
            results = {"weight": before.param} | {name: optimizer.state[before.param][name] for name in before.state}
            for name, result in results.items():
                allowed = weight if name == "weight" else bounds.state[name]
                assert_held(f"{name} of the backend", allowed, result, index, before)
                assert_held(f"{name} of the reference in float64", allowed, truth[name], index, before)
            if group["l1"] > 0 and group["penalty_mode"] != "subgradient" and group["lr"] > 0:
                cut = real(before.param).reshape(-1)[index[weight.is_point(0.0)]]
                assert not torch.signbit(cut).any(), "a threshold's zero is -0.0"

    def check_scalar_states(self, before: Before, bounds: Bounds) -> None:
        assert bounds.scalars.keys() == before.scalars.keys()
        for name, expected in bounds.scalars.items():
            old, result = before.scalars[name], self.optimizer.state[before.param][name].item()
            if before.dtypes[name] == torch.float32:
                expected = torch.tensor(expected, dtype=torch.float32).item()  # it may overflow
            # A gain is a product and a sum in double, which may cancel; a count is exact.
            slack = 0.0 if name == "step" or old != old else 2.0**-52 * max(1.0, abs(old), abs(expected))
            if name != "step" and before.dtypes[name] == torch.float32:
                slack += 2.0**-23 * abs(expected) + 2.0**-149
            is_same = result == expected or (math.isnan(result) and math.isnan(expected))
            assert is_same or abs(result - expected) <= slack, f"{name} is {result}, not {expected}"


def assert_held(what: str, span: Span, result: Tensor, index: Tensor, before: Before) -> None:
    result = real(result).reshape(-1)
    held = span.holds(result[index])
    if held.all():
        return
    first = int((~held).nonzero()[0])
    i = int(index[first])
    lo, hi, nan = (part[first].item() for part in (span.lo, span.hi, span.nan))
    inputs = {"w": before.w, "g": before.param.grad, **before.state}
    note(f"{tuple(before.param.shape)} {before.param.dtype}, strides {before.param.stride()}, {before.options()}")
    note(f"{before.scalars}, { {name: real(value).reshape(-1)[i].item() for name, value in inputs.items()} }")
    raise AssertionError(f"{what}: element {i} is {result[i].item()!r}, not in {lo!r} to {hi!r} (NaN: {nan})")


def float64_truths(spec: RuleSpec, step: Step, befores: list[Before], inv: float) -> list[dict[str, Tensor]]:
    """The reference's formulas in float64, from the same inputs."""
    gradients = [real(before.param.grad).double() for before in befores]
    coefficient: Any = 1.0
    if step.max_grad_norm not in (None, math.inf):
        clipped = [
            reference.clip_gradient_value(g, before.options(), inv)
            for g, before in zip(gradients, befores, strict=True)
        ]
        norm = sum((g.square().sum() for g in clipped), torch.zeros((), dtype=torch.float64)).sqrt()
        coefficient = reference.clip_coefficient(norm, step.max_grad_norm)
    truths = []
    for g, before in zip(gradients, befores, strict=True):
        state = {name: real(value).double() for name, value in before.state.items()}
        w, group = real(before.w).double(), before.options()
        result = reference.update(spec, w, g, state, before.both_scalars(spec), group, inv, coefficient)
        truths.append({"weight": result.w, **result.state})
    return truths


def run(scenario: Scenario) -> None:
    drivers = [Driver(scenario, backend) for backend in (FAST, "reference")]
    for step in scenario.steps:
        errors = []
        for driver in drivers:
            driver.prepare(step)
            if step.sabotage is not None:
                errors.append(refusal(driver, step.sabotage))
                driver.prepare(dataclasses.replace(step, options=[{}] * len(step.options)))
            driver.step(step)
        assert len(set(errors)) <= 1, f"the backends refuse differently: {errors}"
        if errors:
            event(f"{step.sabotage}: {errors[0].__name__ if errors[0] else 'nothing wrong here'}")


def refusal(driver: Driver, sabotage: str) -> type[Exception] | None:
    """The error of a step with one thing wrong, after which nothing has changed; then it is put right."""
    group = driver.optimizer.param_groups[-1]
    saved = dict(group)
    driver.set_amp(found_inf=None)
    driver.sabotage(sabotage)
    before = driver.record()
    try:
        driver.optimizer.step()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        assert driver.record() == before, f"{sabotage}: refused, and yet something has changed"
        return type(error)
    else:
        return None
    finally:
        group.update(saved)


@pytest.mark.parametrize("rule", sorted({cls.spec.name for cls in OPTIMIZERS}))
def test_any_step(rule) -> None:
    classes = [cls for cls in OPTIMIZERS if cls.spec.name == rule]

    instruction_sets = EXTENSION.instruction_sets() if EXTENSION else [None]

    @given(scenarios(classes), st.sampled_from(instruction_sets), st.sampled_from([1, 2]))
    def any_step(scenario: Scenario, instruction_set: str, threads: int) -> None:
        before = EXTENSION.instruction_set(), torch.get_num_threads()
        EXTENSION.use_instruction_set(instruction_set)
        torch.set_num_threads(threads)
        try:
            run(scenario)
        finally:
            EXTENSION.use_instruction_set(before[0])
            torch.set_num_threads(before[1])

    any_step()


def test_every_rule_is_fuzzed() -> None:
    for rule in {cls.spec.name for cls in OPTIMIZERS}:
        assert rule in OWN_OPTIONS, (
            f"nobody draws the rule {rule!r}'s own hyperparameters: give it a line in OWN_OPTIONS, in "
            "tests/hostile/scenarios.py"
        )
        assert rule in RULES, (
            f"nobody knows how far rounding may carry a step of the rule {rule!r}: write its formulas on intervals, "
            "and give them a line in RULES, in tests/hostile/spans.py"
        )


@pytest.mark.parametrize("mode", PENALTY_MODES)
@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
def test_the_intervals_are_narrow(cls, variant, mode) -> None:
    """An interval that holds everything would prove nothing: with everything on, it is a few roundings wide."""
    values = [Values(seed, 0, (), 0.0) for seed in range(5)]
    options = {**regularized(cls, variant), "penalty_mode": mode}
    bound = options.pop("max_grad_norm")
    steps = [Step([{}], [Gradient("contiguous", values[i])], bound, 2.0, None, None) for i in range(1, 5)]
    params = [[Param((500,), "contiguous", "fp32", values[0])]]
    driver = Driver(Scenario(cls, params, [options], bound, steps), FAST)
    for step in steps:
        driver.prepare(step)
        (before,) = driver.before()
        driver.step(step)
    g = clipped_by_value(before.param.grad, before.group, 0.5)
    coefficient = coefficient_bounds(norm_bounds([g], [before.param.grad], 0.5), bound)
    weight, bounds = step_bounds(
        cls.spec.name, before.w, g, before.state, before.scalars, before.options(), coefficient
    )
    names = set(bounds.state) - {"held_back"}  # a difference of larger numbers, or nothing
    for span, old in ((weight, before.w), *((bounds.state[name], before.state[name]) for name in names)):
        largest = max(old.abs().max(), span.hi.abs().max())  # before or after: a state may begin small
        width = (span.hi - span.lo) / (largest * torch.finfo(torch.float32).eps)
        assert not span.nan.any()
        assert 0.01 < width.max() < 24  # in eps; a state that is all zeros in between would be a mistake too
