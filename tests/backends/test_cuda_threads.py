"""The CUDA kernels as they are, launches and barriers included, on real threads: each thread of a block is one of the
CPU's, and ThreadSanitizer looks for races among them (emulator/at_once.cpp).

It goes by what orders two accesses, not by which of them came first: a race is found whenever its code runs. What it
does not show is warps, and a GPU's memory model, of which kernels without atomics need no more than their barriers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RACE = 66
THREADS = 64  # of a block, see SMALL in cuda_emulation.py


def thread_sanitizer() -> str | None:
    """Its library, which a process must load before all else."""
    if not sys.platform.startswith("linux") or shutil.which("c++") is None:
        return None
    found = subprocess.run(["c++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(found) if os.path.isabs(found) else None


pytestmark = pytest.mark.skipif(thread_sanitizer() is None, reason="needs GCC with ThreadSanitizer")

Run = Callable[..., tuple[int, str]]


@contextmanager
def process_with_thread_sanitizer(names_functions: bool) -> Iterator[Run]:
    """Runs a scenario of cuda_threads.py: its exit status, and what it printed.

    Args:
        names_functions: in reports. It takes a while to find their names in torch's libraries.
    """
    # It keeps its notes at fixed addresses, which a random layout may have taken.
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:
        fixed = []
    options = {"halt_on_error": 1, "exitcode": RACE, "atexit_sleep_ms": 0, "symbolize": int(names_functions)}
    settings = {
        "LD_PRELOAD": str(thread_sanitizer()),
        "TSAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [*fixed, sys.executable, str(Path(__file__).with_name("cuda_threads.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def run(scenario: str, **fault: Any) -> tuple[int, str]:
            print(json.dumps({"scenario": scenario, **fault}), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            return answer["status"], answer["output"]

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with process_with_thread_sanitizer(names_functions=False) as run:
        yield run


@pytest.mark.parametrize(
    "scenario",
    [
        "sgd",
        "adam",
        "amp",
        "units",
        "units of sgd",
        "several panels an item",
        "units in parts",
        "units that one block finishes",
    ],
)
def test_no_race_and_the_references_numbers(scenario, run) -> None:
    """And the same bits, in whatever order the blocks run."""
    status, output = run(scenario)
    if status == RACE:
        with process_with_thread_sanitizer(names_functions=True) as run:
            output = run(scenario)[1]
    assert status == 0, output
    assert "ThreadSanitizer" not in output


# Of a tree over all threads: one behind each halving.
TREE = THREADS.bit_length() - 1


@pytest.mark.parametrize(
    ("scenario", "kernel", "hidden"),
    [
        # Behind the threads' own sums, and within the tree; the last sum is read by the thread that has made it.
        *(("a step", "squares_kernel", [i]) for i in range(TREE)),
        ("a step", "prepare_kernel", [0]),  # behind the scalars
        ("a step", "prepare_kernel", [1 + TREE]),  # behind the tree
        ("a step without a norm", "prepare_kernel", [1]),  # behind the scalar states' next values
        ("a step", "update_kernel", [0]),  # behind the constants
        # Behind the constants, the roots that begin, and the first vote, which stand for each other.
        ("a step with units", "units_kernel", [0, 1, 2]),
        ("a step with units", "units_kernel", [3]),  # behind the threads' own sums
        *(("a step with units", "units_kernel", [4 + i]) for i in range(TREE - 1)),  # two units share the threads
        ("a step with units", "units_kernel", [3 + TREE, 4 + TREE]),  # behind the roots that move, and the second vote
        ("a step with units in parts", "units_kernel", [2]),  # behind the sums over parts
        ("a step with units in parts", "units_kernel", [1 + TREE]),  # behind their tree
    ],
)
def test_a_barrier_that_is_taken_away_is_missed(scenario, kernel, hidden, run) -> None:
    status, output = run(scenario, kernel=kernel, hidden=hidden)
    assert status == RACE, output
    assert "ThreadSanitizer: data race" in output


def test_a_panel_waits_for_the_one_before(run) -> None:
    """What the last barrier of a panel is for: other threads still read the roots."""
    scenario, kernel = "a step with two panels an item", "units_kernel"
    status, output = run(scenario, kernel=kernel)
    assert status == 0, output
    barriers = int(output)  # one behind the constants, then those of two panels
    status, output = run(scenario, kernel=kernel, hidden=[(barriers - 1) // 2])
    assert status == RACE, output


@pytest.mark.parametrize(
    ("scenario", "kernel"),
    [
        ("a step", "squares_kernel"),
        ("a step", "prepare_kernel"),
        ("a step", "update_kernel"),
        ("a step with units", "units_kernel"),
        ("a step with units in parts", "units_kernel"),
    ],
)
def test_blocks_that_meet_are_seen(scenario, kernel, run) -> None:
    """Where two take the same share at once."""
    status, output = run(scenario, kernel=kernel, twice=True)
    assert status == RACE, output
