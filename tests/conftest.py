"""What the suites share. Random data is seeded per test; devices and backends come from what this machine has."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# Before torch is loaded. Threads that wait by spinning take the cores of the other test, and of themselves where the
# machine is busy: what shares its work out is ten times as long then.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from helpers import one_thread

from fusedreg import backends
from fusedreg.backends.cpp import load_extension
from fusedreg.backends.tables import CompiledTables, PythonTables
from fusedreg.backends.triton import is_interpreting, why_not_triton

# For the programs in experiments/. Behind all else: what is tested is the fusedreg that is installed.
sys.path.append(str(Path(__file__).parents[1]))

EXTENSION, NO_EXTENSION_REASON = load_extension()

needs_cpp = pytest.mark.skipif(EXTENSION is None, reason=f"no compiled extension: {NO_EXTENSION_REASON}")
# (backend, device), for every suite that takes the fixture `backend`
TARGETS = [
    pytest.param(("cpp", "cpu"), marks=needs_cpp, id="cpp"),
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu, id="cuda"),
    pytest.param(("reference", "cuda"), marks=pytest.mark.gpu, id="reference-on-cuda"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="triton"),
]
# The CUDA kernels without a GPU, for suites of what only the backend's own kernels do.
EMULATED_CUDA = pytest.param(
    ("cuda", "emulated"),
    marks=pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    id="cuda-emulated",
)
# The fast backend on the CPU, for suites that name theirs.
FAST = "cpp"
INTERPRETING = is_interpreting()
if INTERPRETING:  # make test-triton
    FAST = "triton"
    TARGETS = [pytest.param(("triton", "cpu"), id="triton")]
    if why_not_triton() is None:
        backends.BACKENDS["triton"] = backends.TritonBackend(scalars_on_host=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETING:  # numpy warns of NaN and infinity, which some tests are about
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


def left_out(config: pytest.Config) -> dict[str, str]:
    """The marks whose tests this run leaves out, and why. They are half of all: to skip one by one takes a minute."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "there is no CUDA device"
    if not config.getoption("slow"):
        reasons["slow"] = "no --slow"
    return reasons


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"tests marked {mark} are left out: {reason}" for mark, reason in left_out(config).items()]


def suits_the_rule(callspec: Any) -> bool:
    """Whether a test's class has the penalty mode, and a decay, that the test is about."""
    chosen = {} if callspec is None else callspec.params
    cls = chosen.get("cls")
    if not hasattr(cls, "spec"):
        return True
    has_decay = "weight_decay" not in chosen.values() or "weight_decay" in inspect.signature(cls).parameters
    return has_decay and chosen.get("mode", cls.spec.modes[0]) in cls.spec.modes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = left_out(config)
    without = [item for item in items if any(item.get_closest_marker(mark) for mark in marks)]
    config.hook.pytest_deselected(items=without)
    without += [item for item in items if not suits_the_rule(getattr(item, "callspec", None))]
    gone = set(without)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=TARGETS)
def backend(request, monkeypatch):
    """The name of a backend; the device that it runs on is torch's default device meanwhile."""
    name, device = request.param
    if device == "emulated":
        from cuda_emulation import EmulatedCudaBackend

        monkeypatch.setitem(backends.BACKENDS, name, EmulatedCudaBackend(scalars_on_host=False))
        device = "cpu"
    reason = backends.BACKENDS[name].unavailable_reason()
    if reason is not None:
        pytest.skip(f"backend {name!r}: {reason}")
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield name


@pytest.fixture
def everything_on_device(backend, monkeypatch):
    """As far as the question goes where a tensor is: what the host then reads of one is a fault."""
    if torch.get_default_device().type != "cpu":
        return  # it is
    for module in ("optimizer", "hyperparameters", "penalties", "penalties.spec", "rules.spec"):
        monkeypatch.setattr(f"fusedreg.{module}.on_gpu", lambda value: isinstance(value, torch.Tensor))


TABLES = [pytest.param(CompiledTables, marks=needs_cpp), PythonTables]


@pytest.fixture(params=TABLES, ids=lambda made_by: made_by.__name__)
def both_tables(request, monkeypatch):
    """The tables' numbers from C++, and from Python."""
    monkeypatch.setattr("fusedreg.backends.device_plan.make_tables", request.param)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# In the interpreter nothing depends on it.
@pytest.fixture
def in_one_thread():
    with one_thread():
        yield


@pytest.fixture(params=EXTENSION.instruction_sets()[: 1 if INTERPRETING else None] if EXTENSION else [])
def instruction_set(request):
    before = EXTENSION.instruction_set()
    EXTENSION.use_instruction_set(request.param)
    yield request.param
    EXTENSION.use_instruction_set(before)


# "ci": the same examples in every run. "fuzz", for `make fuzz` or --hypothesis-profile=fuzz: new ones, and many.
SLOW_EXAMPLES = (hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large)
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=30, database=None, suppress_health_check=SLOW_EXAMPLES
)
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")),
    print_blob=True,
    suppress_health_check=SLOW_EXAMPLES,
)
hypothesis.settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "ci")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = sys.modules.get("figures")
    if figures is not None and figures.FIGURES:
        terminalreporter.section("measured: the worst of each claim, and its bar")
        for claim, (worst, bar) in sorted(figures.FIGURES.items()):
            terminalreporter.write_line(f"{worst:9.1e}  {bar:7.0e}  {claim}")
