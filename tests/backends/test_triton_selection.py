"""When the Triton backend is taken, and what it says when it cannot be."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from helpers import FusedRegAdam, make_params

from fusedreg import backends
from fusedreg.backends.triton import why_not_triton


@pytest.fixture
def gpu(monkeypatch):
    """As far as the question goes whether there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fusedreg.backends.triton.why_not_triton", why_not_triton.__wrapped__)
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.TritonBackend())


def asked_by_name() -> str:
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: ") as error:
        FusedRegAdam(make_params(), backend="triton")
    return str(error.value)


def test_the_order() -> None:
    assert list(backends.BACKENDS) == ["cpp", "cuda", "triton", "reference"]


def test_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.TritonBackend())
    assert "there is no GPU" in asked_by_name()


def test_without_triton(gpu, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in asked_by_name()


def test_an_old_triton_is_named(gpu, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: type("module", (), {"__version__": "3.1.0"}))
    assert "needs Triton 3.4 or newer, and this is 3.1.0" in asked_by_name()


def test_a_broken_triton_is_named(gpu, monkeypatch) -> None:
    def broken(name):
        raise OSError("libtriton.so: no such file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    assert "Triton does not load (OSError: libtriton.so: no such file)" in asked_by_name()


def test_a_triton_that_does_not_take_the_kernels_is_named(gpu, monkeypatch) -> None:
    def incompatible(name):
        if name == "triton":
            return type("module", (), {"__version__": "9.0.0"})
        raise AttributeError("no div_rn")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", incompatible)
    assert "Triton 9.0.0 does not take the kernels (AttributeError: no div_rn)" in asked_by_name()


@pytest.mark.skipif(why_not_triton() is not None, reason=why_not_triton() or "")
def test_the_interpreter_comes_too_late(gpu, monkeypatch) -> None:
    monkeypatch.setattr("fusedreg.backends.triton.interpreter.has_the_kernels", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET was set after the kernels were loaded" in asked_by_name()


@pytest.mark.skipif(why_not_triton() is not None, reason=why_not_triton() or "")
def test_a_rule_that_it_does_not_have_is_named() -> None:
    spec = dataclasses.replace(FusedRegAdam.spec, name="toy")
    assert backends.TritonBackend().rejection(spec, torch.zeros(3), []) == "it has no kernel for the rule 'toy'"


@pytest.mark.parametrize("broken", [None, "Triton 9.0.0 does not take the kernels (AttributeError: no div_rn)"])
def test_what_auto_takes_on_a_gpu_without_the_compiled_backend(gpu, broken, monkeypatch, caplog) -> None:
    """As far as that can be asked without one: the parameter is no more than its device."""
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends.BACKENDS["cuda"], "unavailable_reason", lambda: "it is not built", raising=False)
    monkeypatch.setattr("fusedreg.backends.triton.why_not_triton", lambda: broken)
    monkeypatch.setattr(backends.BACKENDS["triton"], "rejection", lambda *_: None, raising=False)
    param = SimpleNamespace(device=torch.device("cuda"))
    taken = backends.choose("auto", FusedRegAdam.spec, param, [], differentiable=False).name
    assert taken == ("triton" if broken is None else "reference")
    said = [f"backend 'cuda' is not used: it is not built. Using backend {taken!r}."]
    said += [f"backend 'triton' is not used: {broken}. Using backend 'reference'."] if broken else []
    assert [record.message for record in caplog.records] == said


@pytest.mark.gpu
def test_auto_takes_it_where_the_compiled_backend_is_missing(monkeypatch) -> None:
    backend = backends.BACKENDS["triton"]
    if backend.unavailable_reason() is not None:
        pytest.skip(backend.unavailable_reason())
    monkeypatch.setattr(backends.BACKENDS["cuda"], "unavailable_reason", lambda: "not built", raising=False)
    param = torch.zeros(3, device="cuda")
    assert backends.choose("auto", FusedRegAdam.spec, param, [], differentiable=False).name == "triton"
