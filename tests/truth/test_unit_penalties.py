"""Proves where full-batch descents end with penalties on units, and what one step of them does.

The group lasso with and without l2 against scikit-learn's MultiTaskLasso and MultiTaskElasticNet, whose units are the
features of a problem with many targets; with l1 besides, and with a largest norm, against the conditions of optimality.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
from conftest import EMULATED_CUDA, EXTENSION, INTERPRETING, TARGETS
from figures import at_most
from helpers import (
    FusedRegAdam,
    FusedRegSGD,
    assert_same_bits,
    make_params,
    one_thread,
    random,
    run,
    set_grads,
    snapshot,
)
from sklearn.linear_model import MultiTaskElasticNet
from solvers import SOLVERS, Array, Solver, diabetes

import fusedreg
from fusedreg.backends import device_units
from fusedreg.parity import TOLERANCE_IN_EPS, known
from fusedreg.penalties.units import as_units, count_units
from fusedreg.rules.registry import OPTIMIZERS

# Each backend has a stage 7 of its own.
ALL = TARGETS if INTERPRETING else [*TARGETS, EMULATED_CUDA]
on_all = pytest.mark.parametrize("backend", ALL, indirect=True)
on_all_but_the_reference = pytest.mark.parametrize(
    "backend", [target for target in ALL if target.values[0][0] != "reference"], indirect=True
)
WITH_UNITS = [cls for cls in OPTIMIZERS if not cls.spec.why_no_units]
STRENGTHS = [(20.0, 0.0), (6.0, 0.0), (20.0, 0.3), (2.0, 0.05)]  # group_l1, l2


@cache
def targets() -> Array:
    """Four, of which each feature is of use for some or for none."""
    rng = np.random.default_rng(3)
    X = diabetes().X
    of_use = rng.normal(size=(4, X.shape[1])) * 20 * (rng.random(X.shape[1]) < 0.6)
    Y = X @ of_use.T + 30 * rng.normal(size=(len(X), 4))
    return Y - Y.mean(0)


def gradient(W: torch.Tensor) -> torch.Tensor:
    """Of 1 / (2n) * |Y - X W'|^2, (targets, features)."""
    X, Y = torch.from_numpy(diabetes().X), torch.from_numpy(targets())
    return (W @ X.T - Y.T) @ X / len(X)


@one_thread()
def minimise(solver: Solver, shape: tuple[int, int], is_transposed: bool, **options: object) -> Array:
    """From zero; the parameter's rows are targets, or features where it is transposed."""
    param = torch.nn.Parameter(torch.zeros(shape[::-1] if is_transposed else shape, dtype=torch.float64))
    W = param.detach().T if is_transposed else param.detach()
    X, Y = torch.from_numpy(diabetes().X), torch.from_numpy(targets())
    gram, correlation = X.T @ X / len(X), Y.T @ X / len(X)
    optimizer = solver.make([{"params": [param], **options}])
    for i in range(solver.steps):
        if i % max(10, solver.steps // 50) == 0 and solver.lr_falls:
            optimizer.param_groups[0]["lr"] = solver.lr(i, solver.steps)
        found = W @ gram - correlation
        param.grad = found.T.contiguous() if is_transposed else found
        optimizer.step()
    return W.numpy().copy()


@cache
def scikit_learns(group_l1: float, l2: float) -> Array:
    share = group_l1 / (group_l1 + l2)
    model = MultiTaskElasticNet(group_l1 + l2, l1_ratio=share, fit_intercept=False, tol=1e-15, max_iter=10**6)
    return model.fit(diabetes().X, targets()).coef_


def distance(W: Array, units: str, group_l1: float, l1: float = 0.0, l2: float = 0.0, most: float = math.inf) -> float:
    """Of 0 to the objective's subdifferential, unit by unit: with l1, of Friedman, Hastie and Tibshirani's conditions;
    at the largest norm, of the normal cone as well."""
    w, g = torch.from_numpy(W), gradient(torch.from_numpy(W))
    worst = 0.0
    for its, slope in zip(as_units(w, units), as_units(g + l2 * w, units), strict=True):
        norm = its.norm()
        if norm == 0:
            outside = (slope.abs() - l1).clamp(min=0).norm() - group_l1
            worst = max(worst, outside.item())
            continue
        rest = slope + group_l1 * its / norm
        if norm > most * (1 - 1e-12):
            pull = -((rest + l1 * its.sign()) * its).sum() / norm  # outwards, as far as there is one
            rest = rest + pull.clamp(min=0) * its / norm
            assert norm <= most * (1 + 1e-12)
        off = torch.where(its != 0, (rest + l1 * its.sign()).abs(), (rest.abs() - l1).clamp(min=0))
        worst = max(worst, off.max().item())
    return worst


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.cls in WITH_UNITS])
def test_group_lasso_is_scikit_learns(solver) -> None:
    """By columns, and by rows of the transposed problem. Adadelta's stage 7 sees steps that its stage 5 did not."""
    bar, chosen = 1e-8, SOLVERS[solver]
    if solver == "adadelta":
        bar, chosen = 1e-3, dataclasses.replace(chosen, steps=16_000)
    shape = scikit_learns(*STRENGTHS[0]).shape
    for i, (group_l1, l2) in enumerate(STRENGTHS[:2] if solver not in ("adam", "momentum") else STRENGTHS):
        truth = scikit_learns(group_l1, l2)
        assert 0 < (truth[0] == 0).sum() < truth.shape[1] or group_l1 < 5
        assert distance(truth, "columns", group_l1, l2=l2) < 1e-10
        is_transposed = i % 2 == 1
        unit = "rows" if is_transposed else "columns"
        fit = minimise(chosen, shape, is_transposed, group_l1=group_l1, l2=l2, unit=unit)
        at_most(bar, np.abs(fit - truth).max(), f"group lasso{', Adadelta' * (bar > 1e-8)}: beside scikit-learn's")
        np.testing.assert_array_equal(fit != 0, truth != 0)


CONDITIONS = {
    "sparse group lasso": dict(group_l1=8.0, l1=3.0, l2=0.1),
    "one unit": dict(group_l1=30.0, l2=0.05),
    "largest norm": dict(max_unit_norm=12.0, l2=0.05),
    "all of it": dict(group_l1=4.0, l1=2.0, l2=0.05, max_unit_norm=12.0),
}


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("solver", ["adam", "momentum", "rmsprop-centered", "adagrad"])
def test_the_conditions_of_optimality_hold(solver, name) -> None:
    options = CONDITIONS[name]
    unit = "tensor" if name == "one unit" else "columns"
    fit = minimise(SOLVERS[solver], (4, 9), False, unit=unit, **options)
    most = options.get("max_unit_norm", math.inf)
    at_most(
        1e-8,
        distance(fit, unit, options.get("group_l1", 0.0), options.get("l1", 0.0), options["l2"], most),
        "penalties on units: optimality conditions",
    )
    assert name == "one unit" or most < math.inf or (fit == 0).any()


def test_the_loop_of_the_tutorials_ends_at_the_same_weights() -> None:
    """``cost = loss + c * torch.norm(weight, p=2)`` by gradient descent, which never meets the corner at 0."""
    X, Y = torch.from_numpy(diabetes().X), torch.from_numpy(targets())
    theirs = torch.nn.Parameter(torch.zeros(4, 9, dtype=torch.float64))
    loop = torch.optim.LBFGS(
        [theirs], max_iter=3000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        loop.zero_grad()
        cost = (Y - X @ theirs.T).square().sum() / (2 * len(X)) + 15.0 * torch.norm(theirs, p=2)
        cost.backward()
        return cost

    with torch.no_grad():
        theirs.fill_(0.1)  # at 0 the norm has no gradient
    loop.step(closure)
    ours = minimise(SOLVERS["momentum"], (4, 9), False, group_l1=15.0, unit="tensor")
    at_most(1e-6, np.abs(ours - theirs.detach().numpy()).max(), "c * torch.norm(weight): weights beside the loop's")


# -- one step


LAYOUTS = {
    "rows in memory": ((37, 53), lambda w: w),
    "columns in memory": ((37, 53), lambda w: w.T.contiguous().T),
    "channels last": ((8, 6, 3, 5), lambda w: w.contiguous(memory_format=torch.channels_last)),
    "filters": ((6, 4, 3, 3), lambda w: w),
    "long rows": ((2, 20_011), lambda w: w),
    "long columns": ((20_011, 3), lambda w: w),
    "strided": ((64, 7), lambda w: torch.stack([w, w], -1)[..., 0]),
    "misaligned": ((6, 10), lambda w: torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape)),
    "one to a row": ((9, 1), lambda w: w),
    "one row": ((1, 9), lambda w: w),
    "one dimension": ((11,), lambda w: w),
    "without": ((0, 4), lambda w: w),
    "with empty rows": ((4, 0), lambda w: w),
}


def a_step(cls: type, backend: str, dtype: torch.dtype, layout: str, **options: object) -> torch.Tensor:
    shape, lay_out = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(list(LAYOUTS).index(layout))
    start, slope = random(shape, generator), random(shape, generator)
    slope *= torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=torch.float64, device="cpu") * 2
    start.transpose(0, min(1, start.ndim - 1))[:1] = 0
    its = dtype if backend != "reference" or dtype.itemsize == 2 else torch.float64
    device = torch.get_default_device()
    param = torch.nn.Parameter(lay_out(start.to(device, dtype)).to(its))
    param.grad = lay_out(slope.to(device, dtype)).to(its)
    others = known(cls, lr=0.05, weight_decay=0.1, clip_value=1.5, max_grad_norm=9.0)
    cls([param], backend=backend, **others, **options).step()
    return param.detach().double()


# The loops over long units know nothing of rules, and those over other layouts little.
STEPS = [
    (cls, layout, dtype)
    for cls in WITH_UNITS
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if not layout.startswith("long") or (dtype == torch.float32 and cls in (FusedRegAdam, FusedRegSGD))
    if dtype != torch.float16 or cls in (FusedRegAdam, FusedRegSGD)
    if layout in ("channels last", "columns in memory", "filters") or cls in (FusedRegAdam, FusedRegSGD)
]
if INTERPRETING:  # which pays for each operation
    STEPS = [
        (cls, layout, dtype)
        for cls, layout, dtype in STEPS
        if not layout.startswith("long")
        if cls is FusedRegAdam or (dtype == torch.float32 and (cls is FusedRegSGD or layout == "filters"))
    ]


def sizes(backend: str, layout: str) -> list[dict[str, object]]:
    """On a GPU: as they are; with panels in parts, so that each pass is a launch; and with so few passes that one
    program finishes what they have left."""
    if backend == "cpp":
        return [{}]
    if layout.startswith("long"):
        return [dict(ITEM=8), dict(PANEL=1024, PART=512)]
    few = (0, 1, device_units.PASSES, device_units.PASSES + 1)
    small = dict(PANEL=32, PART=16)
    if INTERPRETING:
        small = dict(PANEL=256, PART=256)
        return [[{}, dict(ITEM=8), small, dict(**small, IN_PARTS=few)][list(LAYOUTS).index(layout) % 4]]
    return [{}, dict(ITEM=8), small, dict(**small, IN_PARTS=few)]


@on_all_but_the_reference
@pytest.mark.parametrize(("cls", "layout", "dtype"), STEPS)
def test_a_step_is_the_references(cls, layout, dtype, backend, monkeypatch) -> None:
    """With everything on, so that some units are zero, some are cut to the largest norm, some only shrink."""
    variants = list(cls.spec.variants.values())
    # Stage 7 has as many roundings again as the others. 16-bit numbers are stored twice, and either may go to the
    # other side.
    tolerance = (4 if dtype.itemsize == 2 else 2) * TOLERANCE_IN_EPS[dtype] * torch.finfo(dtype).eps
    units = ("rows", "columns", "tensor", 2)
    if layout.startswith("long"):
        units = ("tensor", layout.removeprefix("long "))
    shift = STEPS.index((cls, layout, dtype)) if INTERPRETING else len(layout)
    is_each_tried = cls is FusedRegAdam and not INTERPRETING
    for i, unit in enumerate(units if is_each_tried else units[shift % len(units) :][:1]):
        shape, _ = LAYOUTS[layout]
        if (unit == 2 and shape[0] % 2) or (unit == "columns" and len(shape) < 2):
            continue
        size = math.prod(shape) / max(count_units(shape, unit, "unit", "a layout"), 1)
        most = 0.9 * math.sqrt(max(size, 1))
        options = dict(group_l1=6.0, max_unit_norm=most, l1=0.3, l2=0.2, unit=unit, freeze_zeros=i % 2 == 0)
        options |= dict(variants[i % len(variants)])
        for mode in cls.spec.modes[: 1 + (layout == "filters")]:
            if mode == "subgradient":
                continue
            theirs = a_step(cls, "reference", dtype, layout, penalty_mode=mode, **options)
            for its_sizes in sizes(backend, layout):
                with monkeypatch.context() as patch:
                    for name, value in its_sizes.items():
                        patch.setattr(device_units, name, value)
                    ours = a_step(cls, backend, dtype, layout, penalty_mode=mode, **options)
                if ours.numel() > 0:
                    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()  # some start above 1
                    assert error <= tolerance


@on_all_but_the_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", WITH_UNITS)
def test_every_strength_is_the_references(cls, dtype, backend) -> None:
    """From those that move no weight by a rounding to those that leave nothing: weak ones may be solved by a series."""
    if backend != "cpp" and (cls is not FusedRegAdam or INTERPRETING):
        return
    generator = torch.Generator().manual_seed(0)
    start, slope = random((5, 77), generator), random((5, 77), generator)
    start[1, ::2], slope[2] = 0, slope[2] * 10 ** torch.linspace(-6, 1, 77, dtype=torch.float64, device="cpu")
    most = torch.finfo(dtype).eps * 2 * TOLERANCE_IN_EPS[dtype]
    for strength in 10 ** torch.linspace(-9, 3, 25, dtype=torch.float64, device="cpu"):
        results = []
        for its in (backend, "reference"):
            its_start = start.to(torch.get_default_device(), dtype, copy=True)
            param = torch.nn.Parameter(its_start.double() if its == "reference" else its_start)
            param.grad = slope.to(dtype).to(param)
            cls([param], lr=0.02, group_l1=strength.item(), backend=its, **known(cls, weight_decay=0.0)).step()
            results.append(param.detach().double())
        ours, theirs = results
        assert ((ours - theirs).abs() <= most * theirs.abs().clamp(min=0.02)).all()


@pytest.mark.skipif(EXTENSION is None, reason="no compiled extension")
@pytest.mark.parametrize("unit", ["rows", "columns", "tensor"])
def test_any_number_of_threads_makes_the_same_bits(unit) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            a_step(FusedRegAdam, "cpp", torch.float32, "long columns", group_l1=3.0, unit=unit, max_unit_norm=9.0)
        )
        torch.set_num_threads(before)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@on_all
@pytest.mark.parametrize("cls", [FusedRegAdam, FusedRegSGD])
def test_a_unit_that_no_gradient_has_met_does_not_vanish_at_once(cls, backend) -> None:
    """Adam's metric is eps there: without the safeguard any strength would take all of it in one step."""
    param = torch.nn.Parameter(torch.ones(3, 8, dtype=torch.float64))
    optimizer = cls([param], lr=1e-3, group_l1=1.0, backend=backend)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    moved = (1 - param.detach()).max()
    assert 0 < moved <= 2e-3 * (1 + 1e-9)


@on_all
def test_what_is_not_finite_is_to_be_seen(backend) -> None:
    param = torch.nn.Parameter(torch.ones(4, 5, dtype=torch.float64))
    optimizer = FusedRegAdam([param], lr=0.1, group_l1=1.0, max_unit_norm=1.5, backend=backend)
    param.grad = torch.ones_like(param)
    param.grad[1, 2] = math.nan
    with torch.no_grad():
        param[2, 3] = math.inf
    optimizer.step()
    assert param[1, 2].isnan()
    assert param[2, 3].isinf()
    assert param[[0, 3]].isfinite().all()
    assert param[[0, 3]].norm(dim=1).max() <= 1.5 * (1 + 1e-12)


@on_all
def test_off_and_at_lr_zero_no_bit_changes(backend) -> None:
    def end(**options: object) -> torch.Tensor:
        (param,) = make_params([(7, 9)])
        optimizer = FusedRegAdam([param], backend=backend, **{"lr": 0.1, "l1": 0.1, **options})
        set_grads([param], 1)
        optimizer.step()
        return param.detach()

    assert end().equal(end(group_l1=0.0, max_unit_norm=math.inf, unit="columns"))
    assert end().equal(end(max_unit_norm=1e3))  # nobody comes near it
    assert end(lr=0.0).equal(end(lr=0.0, group_l1=5.0, max_unit_norm=0.1))
    assert not end().equal(end(group_l1=1.0))


@on_all
@pytest.mark.parametrize("unit", ["rows", "columns", "tensor", 2])
def test_units_become_zero_as_a_whole_and_stay_there(unit, backend) -> None:
    """Exactly, and +0.0; what is zero before is no unit to shrink."""
    params = make_params([(8, 6), (4, 2, 3, 3)])
    with torch.no_grad():
        params[0][2:4] = 0
    optimizer = FusedRegAdam(params, lr=0.5, group_l1=40.0, unit=unit, backend=backend)
    for i in range(8):
        set_grads(params, i)
        params[0].grad[2:4] = 0
        optimizer.step()
        assert (params[0][2:4] == 0).all()
    for param in params:
        assert (param == 0).all()
        assert not param.signbit().any()


@on_all
@pytest.mark.parametrize("in_parts", [False, True])
def test_nothing_beside_a_view_is_written(in_parts, backend, monkeypatch) -> None:
    if in_parts:
        monkeypatch.setattr(device_units, "PANEL", 16)
        monkeypatch.setattr(device_units, "PART", 32)
    for unit, offset in zip(("rows", "columns", "tensor", 3), (1, 4, 3, 2), strict=True):
        buffer = torch.full((100,), 123.0)
        param = torch.nn.Parameter(buffer[offset : offset + 54].view(9, 6))
        assert param.data_ptr() == buffer[offset:].data_ptr()
        optimizer = FusedRegAdam([param], lr=0.1, group_l1=1.0, max_unit_norm=5.0, unit=unit, backend=backend)
        run(optimizer, [param], 1)
        assert (param.norm() if unit == "tensor" else as_units(param.detach(), unit).norm(dim=1).max()) < 5.01
        assert (buffer[:offset] == 123.0).all()
        assert (buffer[offset + 54 :] == 123.0).all()


on_devices = pytest.mark.parametrize(
    "backend", [target for target in ALL if target.values[0][0] in ("cuda", "triton")], indirect=True
)


@on_devices
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, math.nan])
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_kernels_read_whether_a_step_is_skipped(found_inf, in_parts, backend, everything_on_device, monkeypatch):
    if in_parts:
        monkeypatch.setattr(device_units, "PANEL", 16)
        monkeypatch.setattr(device_units, "PART", 32)
    for unit in ("rows", "columns", "tensor"):
        params = make_params([(7, 5)])
        optimizer = FusedRegAdam(params, lr=0.1, group_l1=1.0, max_unit_norm=2.0, unit=unit, backend=backend)
        before = params[0].detach().clone()
        set_grads(params, 1)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert before.equal(params[0]) == (found_inf != 0)
        if found_inf != 0:
            before = snapshot(optimizer)
            optimizer.step()
            assert_same_bits(before, snapshot(optimizer))


@on_devices
@pytest.mark.parametrize(
    ("cls", "dtype"), [*((cls, torch.float64) for cls in WITH_UNITS), (FusedRegAdam, torch.float32)]
)
def test_strengths_on_the_device(cls, dtype, backend, everything_on_device) -> None:
    """Moved in place between steps, down to an lr of 0, and read by the kernels."""
    values = {"lr": 0.05, "l1": 0.03, "l2": 0.2, "group_l1": 1.5, "max_unit_norm": 2.5}
    tensors = {key: torch.tensor(value, dtype=dtype) for key, value in values.items()}
    values = {key: tensor.item() for key, tensor in tensors.items()}
    params, own = make_params([(7, 5), (6, 4)], torch.float64), make_params([(7, 5), (6, 4)], torch.float64)
    ours = cls([{"params": params[:1]}, {"params": params[1:], "unit": 2}], backend=backend, unit="columns", **tensors)
    theirs = cls([{"params": own[:1]}, {"params": own[1:], "unit": 2}], backend="reference", unit="columns", **values)
    for i in range(5):
        run(ours, params, 1, first_seed=i)
        run(theirs, own, 1, first_seed=i)
        for key, tensor in tensors.items():
            tensor.mul_(0.8 if i < 3 or key != "lr" else 0.0)
            for group in theirs.param_groups:
                group[key] = tensor.item()
    for a, b in zip(params, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@on_devices
def test_units_beside_others(backend) -> None:
    """Dtypes, groups with units and without, a parameter without a gradient: what has no units is as without them."""
    results = []
    for options in ({}, {"group_l1": 0.5, "max_unit_norm": 2.0}):
        params = [p for dtype in TOLERANCE_IN_EPS for p in make_params([(6, 5), (4,), (3, 7), (2, 2)], dtype)]
        groups = [{"params": params[::4] + params[1::4]}, {"params": params[2::4] + params[3::4], **options}]
        optimizer = FusedRegAdam(groups, lr=0.1, l1=0.01, backend=backend)
        for i in range(3):
            set_grads(params, i)
            params[3].grad = None
            if i == 1:
                params[4].grad = None
            optimizer.step()
        results.append([param.detach() for param in params])
    for i, (without, with_units) in enumerate(zip(*results, strict=True)):
        assert without.equal(with_units) == (i % 4 < 2 or i == 3)
        assert i % 4 != 2 or with_units.norm(dim=1).max() <= 2.02


@on_devices
def test_a_layout_that_changes_between_steps_is_seen(backend) -> None:
    """A gradient of other strides has the parameter staged: then its units lie otherwise."""
    results = []
    for name in (backend, "reference"):
        params = [torch.nn.Parameter(make_params([(8, 5)], torch.float64)[0].detach().T.contiguous().T)]
        optimizer = FusedRegAdam(params, lr=0.1, group_l1=2.0, max_unit_norm=1.5, backend=name)
        for i in range(6):
            set_grads(params, i)
            if i % 3 == 1:
                params[0].grad = params[0].grad.T.contiguous().T
            if i == 4:
                for group in optimizer.param_groups:
                    group["unit"] = "columns"
            optimizer.step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("unit", ["rows", "columns", "tensor", 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_units(layout, unit) -> None:
    """What device_units says of a dense tensor's memory, by the numbers that lie there."""
    shape, lay_out = LAYOUTS[layout]
    tensor = lay_out(torch.arange(math.prod(shape)).view(shape))
    if layout == "strided" or (unit == "columns" and len(shape) < 2) or (unit == 2 and shape[0] % 2):
        return
    count, outer, run = device_units.unit_layout(tuple(shape), tensor.stride(), unit)
    memory = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    units = memory.view(outer, count, run).transpose(0, 1).reshape(count, outer * run)
    truth = as_units(tensor, unit)
    if tensor.numel() > 0:
        assert units.sort(1).values.equal(truth.sort(1).values)


def test_the_value_of_the_penalties() -> None:
    param = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]]))
    optimizer = FusedRegSGD([param], lr=0.1, l1=1.0, group_l1=2.0)
    assert fusedreg.penalty(optimizer).item() == 24 + 2 * 18
    optimizer.param_groups[0].update(unit="tensor", l1=0.0)
    assert fusedreg.penalty(optimizer).item() == pytest.approx(2 * math.sqrt(194))
    optimizer.param_groups[0].update(unit="rows", max_unit_norm=12.0)
    assert fusedreg.penalty(optimizer).item() == math.inf


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group_l1=-1.0), "Invalid group_l1 value: -1.0"),
        (dict(max_unit_norm=0.0), "Invalid max_unit_norm value: 0.0"),
        (dict(group_l1=1.0, unit="diagonals"), "Invalid unit value: 'diagonals'"),
        (dict(group_l1=1.0, unit=0), "Invalid unit value: 0"),
        (dict(group_l1=1.0, penalty_mode="subgradient"), "Invalid group_l1 value: 1.0 with penalty_mode"),
        (dict(group_l1=1.0, l0=0.1), "Invalid l0 value: 0.1 with group_l1=1.0"),
        (dict(max_unit_norm=1.0, l1=0.1, mcp_gamma=3.0), "Invalid mcp_gamma value: 3.0 with max_unit_norm=1.0"),
        (dict(group_l1=1.0, upper=2.0), "Invalid upper value: 2.0 with group_l1=1.0"),
    ],
)
def test_what_is_not_allowed(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        FusedRegAdam([torch.nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize(
    ("param", "unit", "error", "message"),
    [
        (torch.ones(3), "columns", ValueError, "Invalid unit value: 'columns' for a parameter of shape"),
        (torch.ones(()), "rows", ValueError, "Invalid unit value: 'rows' for a parameter of shape"),
        (torch.ones(3, 2), 2, ValueError, "allowed: a number that divides 3"),
        (torch.ones(3, 2, dtype=torch.complex64), "rows", ValueError, "a group with complex parameters"),
    ],
)
def test_a_parameter_without_such_units_is_refused_before_anything_changes(param, unit, error, message) -> None:
    weights = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(param.clone())]
    for each in weights:
        each.grad = torch.ones_like(each)

    def construct_and_step() -> None:
        FusedRegAdam(weights, lr=0.1, group_l1=0.1, unit=unit).step()

    with pytest.raises(error, match=message):
        construct_and_step()
    assert weights[0].equal(torch.ones(4, 4))


@pytest.mark.parametrize("cls", [cls for cls in OPTIMIZERS if cls.spec.why_no_units])
def test_a_rule_that_takes_none_says_why(cls) -> None:
    with pytest.raises(ValueError, match=f"Invalid group_l1 value: 0.1 for the rule '{cls.spec.name}'.*its "):
        cls([torch.nn.Parameter(torch.ones(2, 2))], group_l1=0.1)


def test_differentiable_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones_like(param)
    optimizer = FusedRegAdam([param], differentiable=True, group_l1=0.1)
    with pytest.raises(RuntimeError, match="differentiable=True does not work with group_l1"):
        optimizer.step()
