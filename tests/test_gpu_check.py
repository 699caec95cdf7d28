"""`make gpu-check` goes on where it was cut off, and does nothing twice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_check"] = gpu_check
SPEC.loader.exec_module(gpu_check)


def part(name: str, code: str, **options) -> gpu_check.Part:
    """It notes its name in the file "done" first."""
    note = f"open('done', 'a').write('{name} ')\n"
    return gpu_check.Part(name, [sys.executable, "-c", note + code], ("source.py",), **options)


@pytest.fixture
def check(tmp_path):
    (tmp_path / "source.py").write_text("1")

    def check(*parts: gpu_check.Part, about: str = "a GPU", **options) -> tuple[int, list[str]]:
        (tmp_path / "done").write_text("")
        code = gpu_check.check(list(parts), about, tmp_path / "state", root=tmp_path, **options)
        return code, (tmp_path / "done").read_text().split()

    return check


def test_what_has_passed_is_done_again_only_where_it_rests_on_something_new(check, tmp_path) -> None:
    parts = part("a", ""), part("b", "")
    assert check(*parts) == (0, ["a", "b"])
    assert check(*parts) == (0, [])
    assert check(*parts, about="another GPU") == (0, ["a", "b"])
    assert check(*parts, about="another GPU") == (0, [])
    (tmp_path / "source.py").write_text("2")
    assert check(*parts, about="another GPU") == (0, ["a", "b"])


def test_what_fails_is_named_and_done_again_and_the_rest_goes_on(check, capfd) -> None:
    parts = part("a", "raise SystemExit(3)"), part("b", "")
    assert check(*parts) == (1, ["a", "b"])
    assert "gpu-check: a: it ended with 3" in capfd.readouterr().out
    assert check(*parts) == (1, ["a"])


def test_nothing_is_tested_on_a_build_that_failed(check) -> None:
    assert check(part("build", "raise SystemExit(1)"), part("b", "")) == (1, ["build"])


def test_a_build_without_its_result_has_not_passed(check, tmp_path, capfd) -> None:
    made = part("build", "open('made.so', 'w')", makes="made*.so")
    assert check(made) == (0, ["build"])
    (tmp_path / "made.so").unlink()
    assert check(made) == (0, ["build"])
    assert check(part("build", "", makes="no*.so")) == (1, ["build"])
    assert "build: there is no no*.so" in capfd.readouterr().out


def test_pytest_may_find_no_test_where_that_is_said(check) -> None:
    assert check(part("a", "raise SystemExit(5)", may_be_empty=True)) == (0, ["a"])
    assert check(part("b", "raise SystemExit(5)")) == (1, ["b"])


def test_a_part_that_takes_too_long_is_ended_and_no_other_begins_after_the_end(check, capfd) -> None:
    code, done = check(part("a", "import time; time.sleep(60)"), part("b", ""), within=2.0)
    assert (code, done) == (1, ["a"])
    said = capfd.readouterr().out
    assert "a: it was not done in 2 s" in said
    assert "b: there was no time left" in said


def test_the_parts_are_those_of_this_repository() -> None:
    names = [each.name for each in gpu_check.all_parts()]
    assert names[:3] == ["build", "info", "tests/backends/test_gpu.py"]
    assert {"tests/test_parity.py", "tests/test_edges.py", "tests/dropin/test_twins.py", "tests/test_docs.py"} < set(
        names
    )
    sys.path.append(str(ROOT / "benchmarks"))
    import gpu_step

    assert [name.removeprefix("time ") for name in names if name.startswith("time ")] == list(gpu_step.GPU_CASES)
    assert len(set(names)) == len(names)
