"""What the suites share. Random data is seeded per test; devices and backends come from what this machine has."""

from __future__ import annotations

import pytest
import torch

from fusedreg import backends
from fusedreg.backends.cpp import load_extension

EXTENSION, NO_EXTENSION_REASON = load_extension()

needs_cpp = pytest.mark.skipif(EXTENSION is None, reason=f"no compiled extension: {NO_EXTENSION_REASON}")
CPU_BACKENDS = [pytest.param(name, marks=needs_cpp if name == "cpp" else ()) for name in backends.BACKENDS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=EXTENSION.instruction_sets() if EXTENSION else [])
def instruction_set(request):
    before = EXTENSION.instruction_set()
    EXTENSION.use_instruction_set(request.param)
    yield request.param
    EXTENSION.use_instruction_set(before)
