"""The CUDA backend without a GPU: its tables, scalar sets, launches and kernels, on a CPU that emulates the GPU.

What this does not show: threads that run at once, which test_cuda_threads.py has, streams and graphs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import shutil

import pytest
import torch
from cuda_emulation import EmulatedCudaBackend, module_in_csrc
from cuda_emulation import build as build_emulation
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    OPTIMIZERS,
    REGULARIZED,
    FusedRegAdam,
    FusedRegSGD,
    assert_a_norm_has_the_whole_range,
    assert_same_bits,
    known,
    make_params,
    regularized,
    run,
    set_grads,
    snapshot,
    variant_of,
)

from fusedreg import backends
from fusedreg.backends import cuda, device_plan, device_units, tables
from fusedreg.hyperparameters import compiled_field_names
from fusedreg.parity import TOLERANCE_IN_EPS, Case, cases, error_in_eps

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(params=[True, False], ids=["scalars-on-host", "scalars-on-device"])
def emulated(request, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedCudaBackend(scalars_on_host=request.param))


@pytest.fixture
def scalars_on_device(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedCudaBackend(scalars_on_host=False))


def in_emulated_memory(value: object) -> bool:
    """In place of ``on_gpu``: every tensor is where only the kernels may read."""
    return isinstance(value, torch.Tensor)


def test_the_kernels_and_python_agree_on_the_tables() -> None:
    for name, number in build_emulation().FORMAT.items():
        declared = {
            getattr(module, name) for module in (tables, device_plan, device_units, cuda) if hasattr(module, name)
        }
        assert declared == {number}, name


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_kernels_and_python_agree_on_the_rule(cls) -> None:
    spec, known = cls.spec, build_emulation().rules()[cls.spec.name]
    assert known["fields"] == compiled_field_names(spec)
    assert known["states"] == [state.name for state in spec.states]
    assert known["scalar_states"] == [state.name for state in spec.scalar_states]


def test_a_rule_without_a_kernel_is_rejected_by_name(emulated) -> None:
    spec = dataclasses.replace(FusedRegAdam.spec, name="unheard-of")
    reason = backends.BACKENDS["cuda"].rejection(spec, torch.zeros(2), [])
    assert reason == "it has no kernel for the rule 'unheard-of'"


def test_states_without_a_kernel_raise() -> None:
    with pytest.raises(ValueError, match="'adam' has no kernel for these states together"):
        build_emulation().update("adam", 0, 0b101, True, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("listed", "visible", "older"),
    [
        ("6.1;7.0 8.6+PTX", [(8, 0)], "6.1"),
        ("Pascal;Ampere", [], "Pascal"),
        ("7.0;8.0;9.0a;12.0+PTX", [(6, 1)], None),
        ("Volta", [], None),
        (None, [(8, 6), (6, 1)], "6.1"),
        ("native", [(5, 2)], "5.2"),
        (None, [(9, 0)], None),
        (None, [], None),
    ],
)
def test_an_architecture_that_is_too_old_is_named_at_build(listed, visible, older) -> None:
    reason = module_in_csrc("cuda_architectures").reason_against(listed, visible)
    assert (reason is None) == (older is None)
    if older is not None:
        assert f"compute capability 7.0 or newer, and it was to be built for {older} too" in reason


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_an_error_that_somebody_left_behind_is_not_ours(max_grad_norm, emulated) -> None:
    params = make_params()
    optimizer = FusedRegAdam(params, backend="cuda", max_grad_norm=max_grad_norm)
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    ctypes.c_int.in_dll(ctypes.CDLL(build_emulation().__file__), "fusedreg_left_behind").value = 700
    with pytest.raises(RuntimeError, match=r"a CUDA call before fusedreg's has failed, .*: an emulated error"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


# Modes choose among the same kernels.
SOME = [c for c in cases("cuda") if c.dtype == torch.float32 or c.penalty_mode == c.optimizer.spec.modes[0]]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_one_step(case: Case, emulated) -> None:
    assert error_in_eps(case) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.parametrize("numel", [16383, 16384, 16385, 3 * 16384 + 5])
@pytest.mark.parametrize("offset", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE_IN_EPS, ids=str)
def test_chunks_tails_and_misalignment(numel, offset, dtype, emulated) -> None:
    """Against the reference, with sentinels around the views."""
    results = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(numel)
        buffer = torch.full((numel + 40,), 123.0, dtype=dtype)
        param = buffer[offset : offset + numel].normal_().requires_grad_()
        # No norm clip: gradients so small that a decay cancels them make a first step of Adam a matter of rounding.
        optimizer = FusedRegAdam([param], backend=backend, **{**REGULARIZED, "max_grad_norm": math.inf})
        gradient = torch.rand(numel + 8, dtype=torch.float64) + 0.5
        param.grad = gradient.mul(torch.randn(numel + 8).sign()).to(dtype)[8 - offset :][:numel]
        optimizer.step()
        assert (buffer.detach()[:offset] == 123.0).all()
        assert (buffer.detach()[offset + numel :] == 123.0).all()
        results.append((param.detach().double(), optimizer.grad_norm.double()))
    (ours, our_norm), (truth, norm) = results
    unit = torch.finfo(dtype).eps * truth.abs().max()
    # Two results of half precision, each rounded once, may be neighbours.
    assert (ours - truth).abs().max() <= max(TOLERANCE_IN_EPS[dtype], 1.0) * unit
    torch.testing.assert_close(our_norm, norm, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


def test_as_many_groups_as_parameters(emulated) -> None:
    """A group for every parameter, and parameters at their own steps."""
    results = []
    for backend in ("cuda", "reference"):
        params = make_params([(5, 3)] * 70, torch.float64)
        groups = [{"params": [p], "lr": 0.01 + 0.001 * i, "l1": 0.002 * (i % 3)} for i, p in enumerate(params)]
        optimizer = FusedRegAdam(groups, backend=backend, l2=0.1, weight_decay=0.1, max_grad_norm=3.0)
        for step in range(4):
            set_grads(params, step)
            for i, param in enumerate(params):
                if i % 4 == step:
                    param.grad = None
            optimizer.step()
        results.append(([p.detach() for p in params], [optimizer.state[p]["step"] for p in params]))
    for ours, truth in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
    assert results[0][1] == results[1][1]


def test_dtypes_side_by_side(emulated) -> None:
    results = []
    for backend in ("cuda", "reference"):
        params = [p for i, dtype in enumerate(TOLERANCE_IN_EPS) for p in make_params(((19, 3), (5,)), dtype, i)]
        optimizer = FusedRegAdam(params[::2] + params[1::2], backend=backend, **REGULARIZED)
        run(optimizer, params, 3)
        results.append(([p.detach() for p in params], optimizer.grad_norm))
    for ours, truth in zip(*(result[0] for result in results), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, truth, rtol=4 * max(eps, 1e-7), atol=4 * max(eps, 1e-7))
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, math.nan])
def test_amp_on_the_device(cls, variant, found_inf, scalars_on_device, monkeypatch) -> None:
    """Scale and found_inf are read by the kernels, and a skipped step moves nothing: no scalar state, no norm."""
    monkeypatch.setattr("fusedreg.optimizer.on_gpu", in_emulated_memory)
    results = []
    for backend in ("cuda", "cpp"):
        params = make_params(dtype=torch.float64)
        optimizer = cls(params, backend=backend, **{**regularized(cls, variant)})
        run(optimizer, params, 2)
        before = [*snapshot(optimizer), optimizer.grad_norm]
        set_grads(params, 50)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        optimizer.step()
        if found_inf != 0:
            assert_same_bits(before, [*snapshot(optimizer), optimizer.grad_norm])
        del optimizer.grad_scale, optimizer.found_inf
        run(optimizer, params, 2)
        results.append(snapshot(optimizer))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("cls", "variant"), OPTIMIZER_VARIANTS, ids=IDS)
def test_hyperparameters_on_the_device(cls, variant, scalars_on_device, monkeypatch) -> None:
    """As a CUDA graph needs it: moved in place between steps, read by the kernels."""
    for module in ("optimizer", "hyperparameters", "penalties", "penalties.spec", "rules.spec"):
        monkeypatch.setattr(f"fusedreg.{module}.on_gpu", in_emulated_memory)
    values = {"lr": 0.05, "l1": 0.03, "l2": 0.2, "weight_decay": 0.1, "clip_value": 0.8, "max_grad_norm": 2.0}
    values |= {"mcp_gamma": 9.0, "lower": -1.6, "upper": 1.3, "l0": 1e-3}
    values = known(cls, **values)
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    params, own = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    options = variant_of(cls, variant)
    ours = cls([{"params": params[:2]}, {"params": params[2:], "l2": 0.0}], backend="cuda", **options, **tensors)
    theirs = cls([{"params": own[:2]}, {"params": own[2:], "l2": 0.0}], backend="reference", **options, **values)
    for i in range(5):
        run(ours, params, 1, first_seed=i)
        run(theirs, own, 1, first_seed=i)
        for key, tensor in tensors.items():
            tensor.mul_(0.7)
            for group in theirs.param_groups:
                if key in group and not (key == "l2" and group is theirs.param_groups[1]):
                    group[key] = tensor.item()
        torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=1e-12, atol=0)
    for a, b in zip(params, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_more_chunks_than_partial_sums(emulated, monkeypatch) -> None:
    monkeypatch.setattr(device_plan, "MAX_PARTIAL_SUMS", 3)
    params = make_params([(7 * device_plan.CHUNK + 5,), (3, 5)], torch.float64)
    optimizer = FusedRegAdam(params, backend="cuda", max_grad_norm=1.0, clip_value=1.5)
    run(optimizer, params, 1)
    gradients = torch.cat([param.grad.flatten() for param in params])
    torch.testing.assert_close(optimizer.grad_norm, gradients.clamp(-1.5, 1.5).norm(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_has_the_whole_range(dtype, offset, scalars_on_device) -> None:
    assert_a_norm_has_the_whole_range("cuda", dtype, device_plan.CHUNK + 777, offset)


def test_squares_are_added_up_without_loss(scalars_on_device, monkeypatch) -> None:
    """In fp32: a pack's of these numbers are exact, and what the sum of packs loses by rounding is kept."""
    sums = []

    def record(kernels, launch, tables, partial_sums, squares=cuda.CudaKernels.squares) -> None:
        squares(kernels, launch, tables, partial_sums)
        sums.append(partial_sums.sum())

    monkeypatch.setattr(cuda.CudaKernels, "squares", record)
    param = torch.nn.Parameter(torch.zeros(3 * device_plan.CHUNK))
    param.grad = torch.randint(1024, 2048, param.shape).float()
    FusedRegSGD([param], lr=1e-3, backend="cuda", max_grad_norm=math.inf).step()
    assert sums == [param.grad.double().square().sum()]


def test_a_norm_has_as_many_programs_as_a_gpu_runs_at_once(monkeypatch) -> None:
    monkeypatch.setattr(device_plan, "multiprocessors", lambda device: 132)
    assert device_plan.most_partial_sums(torch.device("cuda", 1)) == 4 * 132
    assert device_plan.most_partial_sums(torch.device("cpu")) == device_plan.MAX_PARTIAL_SUMS


def test_the_update_goes_the_other_way_than_the_norm(emulated, monkeypatch) -> None:
    """So that it finds the last gradients in a cache."""
    launched: dict[str, list[torch.dtype]] = {"squares": [], "update": []}
    for name, launches in launched.items():
        launch = getattr(cuda.CudaKernels, name)

        def record(kernels, which, *rest, launch=launch, launches=launches):
            launches.append(which.dtype)
            launch(kernels, which, *rest)

        monkeypatch.setattr(cuda.CudaKernels, name, record)
    params = [torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.bfloat16)]
    optimizer = FusedRegAdam(params, backend="cuda", max_grad_norm=1.0)
    run(optimizer, params, 1)
    assert launched["squares"] == launched["update"][::-1] == [torch.float32, torch.bfloat16]


def test_empty_parameters_alone_move_their_scalar_states(emulated) -> None:
    param = torch.nn.Parameter(torch.empty(0, 3))
    param.grad = torch.empty(0, 3)
    optimizer = FusedRegAdam([param], backend="cuda", max_grad_norm=1.0)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    assert optimizer.grad_norm == 0
