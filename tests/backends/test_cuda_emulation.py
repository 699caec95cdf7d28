"""The CUDA backend without a GPU: its tables, scalar sets, launches and kernels, on a CPU that emulates the GPU.

test_without_gpu.py has the tests that the Triton backend passes too.

What neither shows: threads that run at once, which test_cuda_threads.py has, streams and graphs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil

import pytest
import torch
from cuda_emulation import EmulatedCudaBackend, module_in_csrc
from cuda_emulation import build as build_emulation
from helpers import (
    OPTIMIZERS,
    FusedRegAdam,
    assert_same_bits,
    make_params,
    run,
    snapshot,
)

from fusedreg import backends
from fusedreg.backends import cuda, device_plan, device_units, tables
from fusedreg.hyperparameters import compiled_field_names
from fusedreg.parity import TOLERANCE_IN_EPS, Case, cases, error_in_eps

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(params=[True, False], ids=["scalars-on-host", "scalars-on-device"])
def emulated(request, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedCudaBackend(scalars_on_host=request.param))


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


def test_more_chunks_than_partial_sums(emulated, monkeypatch) -> None:
    monkeypatch.setattr(device_plan, "MAX_PARTIAL_SUMS", 3)
    params = make_params([(7 * device_plan.CHUNK + 5,), (3, 5)], torch.float64)
    optimizer = FusedRegAdam(params, backend="cuda", max_grad_norm=1.0, clip_value=1.5)
    run(optimizer, params, 1)
    gradients = torch.cat([param.grad.flatten() for param in params])
    torch.testing.assert_close(optimizer.grad_norm, gradients.clamp(-1.5, 1.5).norm(), rtol=1e-13, atol=0)


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
