"""One step of each fast backend equals the reference in float64, within the rounding of its dtype.

Every case has decay, l1, l2, value clip and norm clip on at once; see fusedreg/parity.py for the tolerances.
"""

from __future__ import annotations

import pytest
import torch
from conftest import EXTENSION
from helpers import (
    IDS,
    OPTIMIZER_VARIANTS,
    REGULARIZED,
    FusedRegAdam,
    make_params,
    regularized,
    run,
    set_grads,
)

from fusedreg import backends
from fusedreg.parity import TOLERANCE_IN_EPS, Case, cases, error_in_eps
from fusedreg.penalties import PENALTY_MODES

FAST = [case for case in cases("cpp")] if EXTENSION else []
ON_CUDA = [case for name in ("cuda", "triton") for case in cases(name, "cuda")]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_one_step(case: Case) -> None:
    assert error_in_eps(case) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_CUDA, ids=str)
def test_one_step_on_cuda(case: Case) -> None:
    reason = backends.BACKENDS[case.backend].unavailable_reason()
    if reason is not None:
        pytest.skip(f"backend {case.backend!r}: {reason}")
    assert error_in_eps(case) <= TOLERANCE_IN_EPS[case.dtype]


# Modes and options choose among the same loops.
OF_EACH_KIND = [
    case
    for case in FAST
    if case.dtype in (torch.float32, torch.bfloat16) and case.penalty_mode == case.optimizer.spec.modes[0]
]


@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_one_step_on_every_instruction_set(case: Case, instruction_set: str) -> None:
    assert error_in_eps(case, seed=1) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.parametrize("case", [c for c in cases("reference") if c.dtype != torch.float64], ids=str)
def test_the_reference_in_lower_precision(case: Case) -> None:
    assert error_in_eps(case) <= TOLERANCE_IN_EPS[case.dtype]


@pytest.mark.parametrize("off", ["weight_decay", "l1", "l2", "clip_value", "max_grad_norm"])
@pytest.mark.parametrize("mode", PENALTY_MODES)
@pytest.mark.parametrize(("cls", "flags"), OPTIMIZER_VARIANTS, ids=IDS)
def test_with_one_regularizer_off(cls, flags, mode, off) -> None:
    """Each switch has a path of its own through the kernels."""
    if EXTENSION is None:
        pytest.skip("no compiled extension")
    options = {**regularized(cls, flags), "penalty_mode": mode}
    options[off] = None if off in ("clip_value", "max_grad_norm") else 0.0
    results = []
    for backend in ("cpp", "reference"):
        params = make_params(dtype=torch.float64)
        run(cls(params, backend=backend, **options), params, steps=5)
        results.append(params)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def test_groups_with_other_strengths_dtypes_and_modes() -> None:
    if EXTENSION is None:
        pytest.skip("no compiled extension")
    results = []
    for backend in ("cpp", "reference"):
        a, b, c = (
            make_params(((19, 3), (5,)), dtype, seed)
            for seed, dtype in enumerate((torch.float64,) * 2 + (torch.float32,))
        )
        groups = [
            {"params": a, "l1": 0.1, "lr": 0.01},
            {"params": b, "l2": 0.3, "weight_decay": 0.2, "penalty_mode": "decoupled", "betas": (0.8, 0.9)},
            {"params": c, "l1": 0.0, "amsgrad": True, "clip_value": 0.3, "penalty_mode": "subgradient"},
        ]
        optimizer = FusedRegAdam(groups, lr=0.02, l1=0.05, max_grad_norm=2.0, backend=backend)
        run(optimizer, [*a, *b, *c], steps=4)
        results.append(([*a, *b], c, optimizer.grad_norm))
    (cpp64, cpp32, cpp_norm), (ref64, ref32, ref_norm) = results
    for ours, truth in zip(cpp64, ref64, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-7)  # the norm couples them to float32 roundings
    for ours, truth in zip(cpp32, ref32, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cpp_norm, ref_norm)


def test_schedules_of_every_hyperparameter() -> None:
    """What a scheduler moves between steps reaches the kernels."""
    if EXTENSION is None:
        pytest.skip("no compiled extension")
    results = []
    for backend in ("cpp", "reference"):
        params = make_params(dtype=torch.float64)
        optimizer = FusedRegAdam(params, backend=backend, **REGULARIZED)
        for i in range(1, 8):
            group = optimizer.param_groups[0]
            group.update(
                lr=0.1 / i, l1=0.01 * (i % 3), l2=0.02 * (i % 2), weight_decay=0.1 / i, betas=(0.8 + 0.01 * i, 0.9)
            )
            group.update(eps=1e-8 * i, clip_value=1.0 / i if i % 2 else None, max_grad_norm=3.0 if i % 3 else None)
            group.update(penalty_mode=PENALTY_MODES[i % 3], amsgrad=i > 4, maximize=i % 4 == 0)
            set_grads(params, i)
            optimizer.step()
        results.append(params)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
