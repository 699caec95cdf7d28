"""The choice of the update kernel's block and warps, with a clock of the test's own: nothing is launched here."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETING

from fusedreg.backends.triton import why_not_triton

if INTERPRETING:
    pytest.skip("the interpreter has one config; it runs a trial in test_triton.py", allow_module_level=True)
if (REASON := why_not_triton()) is not None:
    pytest.skip(REASON, allow_module_level=True)

from triton.runtime.errors import OutOfResources

from fusedreg.backends.triton import tuning
from fusedreg.backends.triton.tuning import CANDIDATES, DEFAULT, Kernel, Tuner

CPU = torch.device("cpu")  # whose memory stands in for a device's
ADAM = Kernel("adam", torch.float32, 0b011, True, False)
FASTEST = CANDIDATES[-1]


class Clock:
    """Its times, one a trial in the order of CANDIDATES; it counts what it was asked."""

    def __init__(self, *times: float | Exception) -> None:
        self.times, self.trials = times, 0

    def __call__(self, trial) -> float:
        time = self.times[self.trials % len(self.times)]
        self.trials += 1
        if isinstance(time, Exception):
            raise time
        return time


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "TRIAL_CHUNKS", 1)
    return tmp_path / "cache"


def fastest_last() -> Clock:
    return Clock(*range(len(CANDIDATES), 0, -1))


def test_the_default_is_a_candidate() -> None:
    assert DEFAULT in CANDIDATES
    assert len(set(CANDIDATES)) == len(CANDIDATES)


def test_the_fastest_is_taken_and_each_is_timed_once(monkeypatch) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        possible = tuning.candidates(dtype)
        for best, config in enumerate(possible):
            clock = Clock(*(0.5 if i == best else 1.0 for i in range(len(possible))))
            kernel = Kernel("sgd", dtype, 1, is_aligned=best % 2 == 0, has_stages=best < 2)
            tuner = Tuner(clock)
            assert tuner.config(kernel, CPU, capturing=False) == config
            assert clock.trials == len(possible)
            with monkeypatch.context() as patch:  # from then on it is in memory
                patch.setattr(tuning, "read", None)
                assert tuner.config(kernel, CPU, capturing=False) == config
                assert tuner.config(kernel, CPU, capturing=True) == config


def test_a_thread_has_a_widest_load_of_every_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        possible = tuning.candidates(dtype)
        assert DEFAULT in possible
        for block, warps in possible:
            assert block * dtype.itemsize % (16 * 32 * warps) == 0


def test_trials_are_of_normal_numbers(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(tuning, "run_update", lambda launcher, launch, tables: seen.append(tables.kept))
    tuning.make_trial(ADAM, CPU)(DEFAULT)
    (memory,) = seen
    assert bool((memory.abs() > torch.finfo(memory.dtype).tiny).all())


def test_each_kernel_is_timed_for_itself() -> None:
    kernels = [
        ADAM,
        ADAM._replace(is_aligned=False),
        ADAM._replace(has_stages=True),
        ADAM._replace(states=0b111),
        ADAM._replace(dtype=torch.bfloat16),
    ]
    kernels.append(Kernel("sgd", torch.float32, 0b1, True, False))
    clock = fastest_last()
    tuner = Tuner(clock)
    for _ in range(2):
        for kernel in kernels:
            tuner.config(kernel, CPU, capturing=False)
    assert clock.trials == sum(len(tuning.candidates(kernel.dtype)) for kernel in kernels)


def test_each_kind_of_device_is_timed_for_itself(monkeypatch) -> None:
    clock = fastest_last()
    for name in ("one", "another", "one"):
        monkeypatch.setattr(tuning, "device_name", lambda device, name=name: name)
        assert Tuner(clock).config(ADAM, CPU, capturing=False) == FASTEST
    assert clock.trials == 2 * len(CANDIDATES)


def test_another_process_reads_the_choice() -> None:
    assert Tuner(fastest_last()).config(ADAM, CPU, capturing=False) == FASTEST
    clock = Clock(1.0)
    assert Tuner(clock).config(ADAM, CPU, capturing=False) == FASTEST
    assert clock.trials == 0
    assert Tuner(clock).config(ADAM, CPU, capturing=True) == FASTEST  # reading is no trial


def test_another_source_is_timed_anew(monkeypatch) -> None:
    clock = fastest_last()
    Tuner(clock).config(ADAM, CPU, capturing=False)
    monkeypatch.setattr(tuning, "CHUNK", tuning.CHUNK // 2)
    Tuner(clock).config(ADAM, CPU, capturing=False)
    assert clock.trials == 2 * len(CANDIDATES)


def test_nothing_is_timed_while_a_graph_is_captured() -> None:
    clock = fastest_last()
    tuner = Tuner(clock)
    assert tuner.config(ADAM, CPU, capturing=True) == DEFAULT
    assert clock.trials == 0
    assert tuner.config(ADAM, CPU, capturing=False) == FASTEST
    assert tuner.config(ADAM, CPU, capturing=True) == FASTEST


@pytest.mark.parametrize("content", ["", "{", "[3, 4]", "[1024]", '"x"', "null", "[[1], 2]"])
def test_a_file_that_makes_no_sense_is_not_believed(content, folder) -> None:
    Tuner(fastest_last()).config(ADAM, CPU, capturing=False)
    (file,) = folder.rglob("*.json")
    file.write_text(content)
    clock = fastest_last()
    assert Tuner(clock).config(ADAM, CPU, capturing=False) == FASTEST
    assert clock.trials == len(CANDIDATES)


def test_a_cache_that_cannot_be_written_keeps_nobody_from_a_step(folder) -> None:
    folder.write_text("a file, where a folder should be")
    assert Tuner(fastest_last()).config(ADAM, CPU, capturing=False) == FASTEST


def test_a_candidate_that_the_device_cannot_run_is_passed_over(folder) -> None:
    clock = Clock(OutOfResources(300, 200, "registers"), 3.0, 2.0, 4.0)
    assert Tuner(clock).config(ADAM, CPU, capturing=False) == CANDIDATES[2]
    assert list(folder.rglob("*.json")) == []


def test_without_memory_for_trials_the_default_is_taken(folder) -> None:
    tuner = Tuner(Clock(torch.OutOfMemoryError("not now")))
    assert tuner.config(ADAM, CPU, capturing=False) == DEFAULT
    assert tuner.config(ADAM, CPU, capturing=False) == DEFAULT
    assert list(folder.rglob("*.json")) == []
    assert Tuner(fastest_last()).config(ADAM, CPU, capturing=False) == FASTEST


def test_a_fault_in_the_kernel_is_not_hidden() -> None:
    with pytest.raises(AssertionError, match="broken"):
        Tuner(Clock(AssertionError("broken"))).config(ADAM, CPU, capturing=False)
