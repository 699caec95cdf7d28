"""The Triton backend without a GPU: tables, scalar sets, launches, index arithmetic and maths, in Triton's interpreter.

``make test-triton`` runs it, test_without_gpu.py, which has the tests that the CUDA backend passes too, and suites that
take the fixture ``backend``. What they do not show is what only a device has: layouts, reductions over warps, streams
and graphs. test_triton_compile.py compiles the kernels for devices.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import INTERPRETING, needs_cpp
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegRMSprop,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    variant_of,
)

from fusedreg import backends
from fusedreg.backends import tables
from fusedreg.backends.tables import CompiledTables, PythonTables
from fusedreg.backends.triton import why_not_triton
from fusedreg.parity import TOLERANCE_IN_EPS, Case, cases, error_in_eps
from fusedreg.penalties import PENALTY_MODES

if not INTERPRETING:
    pytest.skip("runs in Triton's interpreter: make test-triton", allow_module_level=True)
if (REASON := why_not_triton()) is not None:
    pytest.skip(REASON, allow_module_level=True)

from fusedreg.backends.triton.rules import RULES


@pytest.fixture
def scalars_on_host(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.TritonBackend(scalars_on_host=True))


@pytest.fixture
def scalars_on_device(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.TritonBackend(scalars_on_host=False))


@pytest.fixture(params=["scalars_on_host", "scalars_on_device"])
def interpreted(request):
    request.getfixturevalue(request.param)


def steps_before(case: Case) -> int:
    """The interpreter's pow is numpy's, which may be an ulp off the C library's. In the first of RAdam's rectified
    steps a small difference of large numbers makes many of it."""
    return 60 if case.optimizer.spec.name == "radam" else 6


@pytest.mark.parametrize("case", list(cases("triton")), ids=str)
def test_one_step(case: Case, scalars_on_host) -> None:
    assert error_in_eps(case, steps_before=steps_before(case)) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.parametrize("case", [c for c in cases("triton") if c.dtype == torch.float64], ids=str)
def test_one_step_with_scalar_states_on_the_device(case: Case, scalars_on_device) -> None:
    assert error_in_eps(case, shapes=((17, 3), (5,)), steps_before=steps_before(case)) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.99, 0.999999)])
def test_bias_corrections(t, betas, scalars_on_device) -> None:
    """beta^t comes from exp2 and log2, and 1 - beta^t loses leading digits where t is small."""
    results = []
    for backend in ("triton", "reference"):
        params = make_params(((50,),), torch.float64)
        optimizer = FusedRegAdam(params, lr=1.0, betas=betas, backend=backend)
        run(optimizer, params, 1)
        optimizer.state[params[0]]["step"].fill_(t - 1)
        run(optimizer, params, 1, first_seed=7)
        results.append(params[0].detach())
    # One rounding of beta^t, seen through 1 - beta^t, as a power function has it too.
    noise = torch.finfo(torch.float64).eps / min(1 - betas[1] ** t, 1 - betas[0] ** t)
    torch.testing.assert_close(*results, rtol=0, atol=8 * max(noise, 1e-15))


@pytest.mark.parametrize("off", ["weight_decay", "l1", "l2", "clip_value", "max_grad_norm"])
@pytest.mark.parametrize("mode", PENALTY_MODES)
@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
def test_with_one_regularizer_off(cls, variant, mode, off, scalars_on_host) -> None:
    options = {**regularized(cls, variant), "penalty_mode": mode}
    options[off] = None if off in ("clip_value", "max_grad_norm") else 0.0
    results = []
    for backend in ("triton", "reference"):
        params = make_params(((7, 13), ()), torch.float64)
        run(cls(params, backend=backend, **options), params, steps=2)
        results.append(params)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def test_the_momentums_gain(interpreted, both_tables) -> None:
    """It is moved by the host or by the kernel, to the same number; NaN is a buffer that nobody counted."""
    for cls, dampening in ((FusedRegSGD, 0.3), (FusedRegRMSprop, 0.0)):
        options = {"dampening": dampening} if dampening else {}
        params = make_params(((3,), (4,)), torch.float64)
        optimizer = cls(params, momentum=0.8, backend="triton", **options)

        def gains(optimizer=optimizer, params=params) -> list[float]:
            return [optimizer.state[param]["momentum_gain"].item() for param in params]

        expected = 0.0
        for i in range(4):
            run(optimizer, params, 1, first_seed=i)
            expected = 1.0 if i == 0 else 0.8 * expected + 1 - dampening
            assert gains() == pytest.approx([expected] * 2, rel=1e-15)
        for param in params:
            optimizer.state[param]["momentum_gain"].fill_(math.nan)
        run(optimizer, params, 1)
        assert gains() == pytest.approx([(1 - dampening) / 0.2] * 2, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_are_two_reals(dtype, scalars_on_host, both_tables) -> None:
    results = []
    for backend in ("triton", "reference"):
        params = make_params(((5, 3), ()), dtype)
        optimizer = FusedRegAdam(params, backend=backend, lr=0.1, l2=0.1, weight_decay=0.1, max_grad_norm=1.0)
        for step in range(3):
            torch.manual_seed(step)
            for param in params:
                param.grad = torch.randn_like(param) if step < 2 else torch.randn_like(param).conj()
            optimizer.step()
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results)


def test_the_norm_has_the_same_bits_in_every_run(scalars_on_host) -> None:
    norms = set()
    for _ in range(3):
        params = make_params(((200, 301), (77,)), torch.float32)
        optimizer = FusedRegSGD(params, max_grad_norm=1.0, backend="triton")
        run(optimizer, params, 1)
        norms.add(optimizer._measured["grad_norm"].item())
    assert len(norms) == 1


@pytest.fixture
def launches(monkeypatch):
    """What each launch is compiled for, if it is not compiled already."""
    from fusedreg.backends.triton import compilation

    seen = []
    launch = compilation.Launcher.__call__

    def recorded(launcher, programs, arguments, stream):
        kinds = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in arguments]
        constants_of = sorted(
            (name, getattr(value, "__name__", str(value))) for name, value in launcher.constants.items()
        )
        seen.append((launcher.kernel.__name__, tuple(kinds), tuple(constants_of), launcher.warps))
        launch(launcher, programs, arguments, stream)

    monkeypatch.setattr(compilation.Launcher, "__call__", recorded)
    return seen


def test_hyperparameters_steps_and_tensors_compile_nothing_new(launches, scalars_on_host) -> None:
    params = make_params([(5, 3)] * 5)
    optimizer = FusedRegAdam(params[:2], backend="triton", **REGULARIZED)
    run(optimizer, params[:2], 1)
    first = set(launches)
    assert {name for name, *_ in first} == {"squares_kernel", "prepare_kernel", "update_kernel"}
    for i, mode in enumerate(PENALTY_MODES):
        optimizer.param_groups[0].update(
            lr=0.1 / (i + 1), l1=0.01 * i, l2=0.0, eps=1e-7, betas=(0.8, 0.9), penalty_mode=mode
        )
        run(optimizer, params[:2], 2)
    optimizer.add_param_group({"params": params[2:], "clip_value": None})
    run(optimizer, params, 2)
    assert set(launches) == first


def test_one_launch_for_all_groups_of_a_dtype(launches, scalars_on_host) -> None:
    params = make_params([(5, 3)] * 6)
    groups = [{"params": [p], "l1": 0.1 * (i % 2), "penalty_mode": PENALTY_MODES[i % 3]} for i, p in enumerate(params)]
    optimizer = FusedRegAdam(groups, backend="triton", weight_decay=0.1, max_grad_norm=1.0)
    run(optimizer, params, 1)
    assert [name for name, *_ in launches] == ["squares_kernel", "prepare_kernel", "update_kernel"]


def test_only_what_is_aligned_is_taken_for_aligned(launches, scalars_on_host, both_tables) -> None:
    """The interpreter minds no alignment; a device does not forgive a wide load from the wrong place."""
    buffer = torch.zeros(200)
    first = (16 - buffer.data_ptr() % 16) % 16 // 4
    params = [buffer[first : first + 64].requires_grad_(), buffer[first + 65 : first + 129].requires_grad_()]
    optimizer = FusedRegAdam(params, backend="triton")
    run(optimizer, params, 1)
    constants = [dict(constants) for name, _, constants, _ in launches if name == "update_kernel"]
    assert sorted(c["ALIGNED"] for c in constants) == ["False", "True"]


def test_a_nan_in_the_largest_second_moment_stays(scalars_on_host) -> None:
    params = make_params(((50,),))
    optimizer = FusedRegAdam(params, amsgrad=True, backend="triton", **{**REGULARIZED, "max_grad_norm": None})
    run(optimizer, params, 1)
    optimizer.state[params[0]]["max_exp_avg_sq"][17] = math.nan
    run(optimizer, params, 1)
    assert params[0].isnan().nonzero().flatten().tolist() == [17]


def test_tables_are_made_once(scalars_on_host, both_tables) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend="triton", **REGULARIZED)
    set_grads(params, 1)
    optimizer.step()
    (plan,) = optimizer._plans.plans
    before = dict(plan._tables._on_device)
    optimizer.step()
    changed = {name for name, table in plan._tables._on_device.items() if table is not before[name]}
    assert len(before) > 1
    assert optimizer._plans.plans == [plan]
    assert changed == {"sets"}  # the step count
    before = dict(plan._tables._on_device)
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    changed = {name for name, table in plan._tables._on_device.items() if table is not before[name]}
    assert optimizer._plans.plans == [plan]
    assert changed == {"rows", "sets"}


def test_a_replaced_state_dict_is_seen(scalars_on_host, both_tables) -> None:
    """opt.state[p] = {...} leaves the plan alone with the old one."""
    params = make_params()
    optimizer = FusedRegAdam(params, backend="triton")
    run(optimizer, params, 1)
    optimizer.state[params[0]] = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    optimizer.state[params[0]]["exp_avg"].fill_(5.0)
    run(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 2
    assert optimizer.state[params[0]]["exp_avg"].mean() > 4


def test_autograd_sees_the_in_place_change(scalars_on_host, both_tables) -> None:
    weight = make_params(((4, 4),))[0]
    loss = (weight**3).sum()
    weight.grad = torch.ones_like(weight)
    FusedRegAdam([weight], backend="triton").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- the tables' numbers


class BothTables:
    """Compares C++ with Python in every answer. The scalar states and what was staged are C++'s to move."""

    def __init__(self, *arguments) -> None:
        self.both = CompiledTables(*arguments), PythonTables(*arguments)

    def same(self, name: str, *arguments):
        cpp, python = (getattr(made_by, name)(*arguments) for made_by in self.both)
        assert cpp == python, name
        return cpp

    def set_groups(self, groups, numbers) -> None:
        self.same("set_groups", groups, numbers)

    def refresh(self, gradients) -> bool:
        return self.same("refresh", gradients)

    def tables(self):
        rows, sets = self.same("tables")
        assert len(rows) % (8 * tables.ROW_COLUMNS) == len(sets) % (8 * tables.SET_WIDTH) == 0
        self.last = rows, sets
        return rows, sets

    def move_scalar_states(self) -> None:
        cpp, python = self.both
        scalars = [scalar for entry in python._active for scalar in entry.scalar_states if scalar is not None]
        before = [scalar.clone() for scalar in scalars]
        python.move_scalar_states()
        moved = [scalar.clone() for scalar in scalars]
        for scalar, value in zip(scalars, before, strict=True):
            scalar.copy_(value)
        cpp.move_scalar_states()
        for scalar, value in zip(scalars, moved, strict=True):  # the oracle adds up a gain in another order
            torch.testing.assert_close(scalar, value, rtol=1e-15, atol=0, equal_nan=True)

    def finish_update(self) -> None:
        self.both[0].finish_update()
        self.both[1]._staged.clear()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
def test_cpp_and_python_make_the_same_tables(cls, variant, dtype, interpreted, monkeypatch) -> None:
    """Through all that a plan must notice: gradients that move, come and go, state that is replaced, other options."""
    monkeypatch.setattr("fusedreg.backends.device_plan.make_tables", BothTables)
    monkeypatch.setattr("fusedreg.backends.triton.compilation.Launcher.__call__", lambda *arguments: None)
    params = make_params([(4, 3)] * 6, dtype)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    optimizer = cls(groups, backend="triton", max_grad_norm=1.0, **variant_of(cls, variant))

    def step(i: int) -> None:
        for param in params:
            param.grad = None if i == 2 and param is params[3] else torch.ones_like(param)
        optimizer.step()

    for i in range(4):
        step(i)
    (kept,) = optimizer._plans.plans
    optimizer.step()
    assert optimizer._plans.plans == [kept]
    state = optimizer.state[params[1]]
    for name, value in state.items():
        state[name] = value.clone()
    step(4)
    optimizer.state.pop(params[4], None)
    step(5)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key in cls.spec.keys}
    for options in (*cls.spec.variants.values(), before):
        optimizer.param_groups[0].update(options)
        step(6)
    for name, value in optimizer.state[params[0]].items():
        value.data = value.data.clone()
        assert name
    step(8)
    optimizer.load_state_dict(optimizer.state_dict())
    step(9)


@needs_cpp
def test_scalar_sets_part_and_meet_again(scalars_on_host, monkeypatch) -> None:
    """C++ asks first whether parameters share their sets as in the last step, Python begins anew."""
    monkeypatch.setattr("fusedreg.backends.device_plan.make_tables", BothTables)
    monkeypatch.setattr("fusedreg.backends.triton.compilation.Launcher.__call__", lambda *arguments: None)
    params = make_params([(4, 3)] * 6)
    optimizer = FusedRegAdam([{"params": params[:4]}, {"params": params[4:], "lr": 0.1}], backend="triton")
    set_grads(params, 0)
    optimizer.step()
    counts = [optimizer.state[param]["step"] for param in params]
    (plan,) = optimizer._plans.plans

    def sets_after(*written: int) -> list[int]:
        for count, number in zip(counts, written, strict=False):
            count.fill_(number)
        optimizer.step()
        assert optimizer._plans.plans == [plan]
        rows, sets = plan._made_by.last
        columns = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(tables.ROW_COLUMNS, -1)
        assert len(sets) == 8 * tables.SET_WIDTH * (columns[tables.SET].max() + 1)
        return columns[tables.SET].tolist()

    assert sets_after() == [0, 0, 0, 0, 1, 1]
    assert sets_after(5, 5, 9, 9) == [0, 0, 1, 1, 2, 2]
    assert sets_after() == [0, 0, 1, 1, 2, 2]
    assert sets_after(7, 7, 8, 7) == [0, 0, 1, 0, 2, 2]
    assert sets_after(4, 4, 4, 4) == [0, 0, 0, 0, 1, 1]
    assert sets_after(4, 4, 4, 4, 1, 2) == [0, 0, 0, 0, 1, 2]
    assert sets_after(6, 5) == [0, 1, 1, 1, 2, 3]
    optimizer.state[params[0]]["step"].data = torch.tensor(6.0, dtype=torch.float64)
    assert sets_after(6, 6, 6, 6) == [0, 1, 1, 1, 2, 3]


@needs_cpp
def test_cpp_and_python_notice_the_same_layouts(scalars_on_host, monkeypatch) -> None:
    """One after the other, as what is staged stands at an address of its own: the answers, and the parameters."""
    results = []
    for made_by in (CompiledTables, PythonTables):
        monkeypatch.setattr("fusedreg.backends.device_plan.make_tables", made_by)
        base = torch.linspace(-1, 1, 96, dtype=torch.float64)
        params = [base[:24].view(4, 6)[:, ::2], base[24:36].view(4, 3), base[48:60].view(3, 4).t()]
        params = [param.detach().requires_grad_() for param in params]
        optimizer = FusedRegAdam(params, backend="triton", **REGULARIZED)
        for i in range(3):
            set_grads(params, i)
            if i == 1:
                params[1].grad = torch.ones(3, 4, dtype=torch.float64).t()
            if i == 2:
                params[2].data = params[2].data.contiguous()
            optimizer.step()
        results.append([*snapshot(optimizer), base])
    assert_same_bits(*results)


# -- what changes between steps, beyond tests/hostile


def test_a_refused_step_leaves_no_tables_behind(scalars_on_host, both_tables, monkeypatch) -> None:
    """Those of its norm pass: the next step has other gradients, and no norm to take."""
    params = make_params(((4, 3),), torch.float64)
    optimizer = FusedRegAdam(params, backend="triton", max_grad_norm=1.0)
    run(optimizer, params, 1)
    other = make_params(((4, 3),), torch.float64)
    twin = torch.optim.Adam(other)
    run(twin, other, 1)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("fusedreg.step.norm.DeviceNorm", fail)
        set_grads(params, 3)
        with pytest.raises(MemoryError):
            optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = None
    params[0].data.copy_(other[0].data)
    for key, value in twin.state[other[0]].items():
        optimizer.state[params[0]][key].copy_(value)
    run(optimizer, params, 1, first_seed=9)
    run(twin, other, 1, first_seed=9)
    torch.testing.assert_close(params[0], other[0], rtol=1e-14, atol=0)


def test_the_norm_where_a_scale_has_no_inverse_in_float32(scalars_on_host) -> None:
    """1 / 1e-40 is infinite there, and times the zeros that fill up a block NaN: the norm is that of the elements."""
    param = torch.zeros(5).requires_grad_()
    param.grad = torch.full((5,), 1e-3)
    optimizer = FusedRegSGD([param], max_grad_norm=math.inf, backend="triton")
    optimizer.grad_scale = torch.tensor(1e-40)
    optimizer.step()
    assert optimizer.grad_norm == math.inf


@pytest.mark.parametrize(
    ("rule", "states"), [(name, mask) for name, rule in RULES.items() for mask in rule.variants], ids=str
)
def test_a_trial_is_one_update_of_its_own_memory(rule, states, monkeypatch) -> None:
    from fusedreg.backends.triton import tuning

    monkeypatch.setattr(tuning, "TRIAL_CHUNKS", 2)
    monkeypatch.setattr(tuning, "read", lambda what: None)
    monkeypatch.setattr(tuning, "write", lambda what, config: None)
    update = tuning.run_update
    configs = []

    def watched(launcher, launch, tables) -> None:
        memory = tables.kept
        assert memory.shape == (2 + states.bit_count(), 2 * tuning.CHUNK)
        for tensor in memory:
            tensor.copy_(torch.linspace(2, 3, tensor.numel()))  # the constants, bounds among them, are 1
        before = memory.clone()
        update(launcher, launch, tables)
        assert (memory[0] != before[0]).all()
        assert memory[1].equal(before[1])  # the gradient
        configs.append((launcher.constants["BLOCK"], launcher.warps))

    def timer(trial) -> float:
        trial()
        return len(configs)

    monkeypatch.setattr(tuning, "run_update", watched)
    tuner = tuning.Tuner(timer)
    kernel = tuning.Kernel(rule, torch.bfloat16, states, True, True)
    possible = tuning.candidates(torch.bfloat16)
    assert tuner.config(kernel, torch.device("cpu"), capturing=False) == possible[0]
    assert configs == list(possible)


def test_whoever_asks_for_it_by_name_gets_the_interpreter_and_is_told_once(monkeypatch, caplog) -> None:
    """As a user has it, who has set TRITON_INTERPRET and no more; "auto" still takes the fastest."""
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.TritonBackend())
    params = make_params()
    for _ in range(2):
        run(FusedRegAdam(params, backend="triton"), params, 1)
    assert [record.message for record in caplog.records] == [
        "TRITON_INTERPRET is set: backend 'triton' runs in Triton's interpreter, to be read and not to train"
    ]
    assert backends.choose("auto", FusedRegAdam.spec, params[0], [], differentiable=False).name != "triton"
