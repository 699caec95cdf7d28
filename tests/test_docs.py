"""Every Python snippet in README.md and docs/ runs as it is printed, and prints what stands behind it.

A page's snippets run one after the other, in one namespace. A comment before a snippet may say otherwise:
``<!-- not run: REASON -->``, ``<!-- needs CUDA -->``, ``<!-- needs torch.optim.Muon -->``, ``<!-- on two ranks -->``.
``<!-- needs timm -->`` and the like run where the framework is there, as in `make test-frameworks`.
After ``<!-- prints -->`` its output is compared.
docs/triton.md prints the kernels as they are, and every script that a page names exists.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN, NEEDS_CUDA, NEEDS_MUON = "not run: ", "needs CUDA", "needs torch.optim.Muon"
ON_TWO_RANKS, PRINTS = "on two ranks", "prints"
FRAMEWORKS = ("transformers", "accelerate", "lightning", "timm", "skorch", "fastai", "ignite", "peft", "opacus")
NEEDS_A_FRAMEWORK = {f"needs {name}": name for name in FRAMEWORKS}
SNIPPET = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*) -->\n+)?^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```\n)?",
    flags=re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    code: str
    mark: str
    output: str

    def run(self, namespace: dict[str, Any]) -> None:
        # The empty lines give a traceback the page's own line numbers.
        exec(compile("\n" * (self.line - 1) + self.code, str(self.page), "exec"), namespace)


def snippets_of(page: Path) -> Iterator[Snippet]:
    text = page.read_text()
    for match in SNIPPET.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Snippet(page, line, match["code"], match["mark"] or "", match["output"] or "")


SNIPPETS = {page: list(snippets_of(page)) for page in PAGES}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def assert_same_output(printed: str, expected: str) -> None:
    """The same words; numbers may differ as rounding on another machine makes counts and losses differ."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", expected).split()
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=0.1, abs=2 if "." not in theirs else 0.02)


@pytest.fixture(autouse=True)
def _as_a_reader(tmp_path, monkeypatch):
    """In a folder of its own, as snippets may write; on one thread, as their tensors are tiny."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPETS[page]], ids=page_id)
def test_snippets_run(page: Path, capsys) -> None:
    namespace: dict[str, Any] = {}
    for snippet in SNIPPETS[page]:
        if snippet.mark.startswith(NOT_RUN) or snippet.mark in (NEEDS_CUDA, ON_TWO_RANKS):
            continue
        if snippet.mark == NEEDS_MUON and not hasattr(torch.optim, "Muon"):  # before torch 2.9
            continue
        if snippet.mark in NEEDS_A_FRAMEWORK and importlib.util.find_spec(NEEDS_A_FRAMEWORK[snippet.mark]) is None:
            continue
        capsys.readouterr()
        snippet.run(namespace)
        if snippet.mark == PRINTS:
            assert_same_output(capsys.readouterr().out, snippet.output)


def run_on_a_rank(snippets: list[Snippet]) -> None:
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        snippet.run(namespace)


RANKED = {page: [each for each in some if each.mark == ON_TWO_RANKS] for page, some in SNIPPETS.items()}


@pytest.mark.parametrize("page", [page for page in PAGES if RANKED[page]], ids=page_id)
def test_snippets_run_on_two_ranks(page: Path) -> None:
    worlds.run(2, run_on_a_rank, RANKED[page])


CUDA_SNIPPETS = [snippet for some in SNIPPETS.values() for snippet in some if snippet.mark == NEEDS_CUDA]


@pytest.mark.gpu
@pytest.mark.parametrize("snippet", CUDA_SNIPPETS, ids=lambda snippet: f"{page_id(snippet.page)}:{snippet.line}")
def test_cuda_snippets_run(snippet: Snippet) -> None:
    snippet.run({})


def test_snippets_are_found_and_their_marks_known() -> None:
    for page, snippets in SNIPPETS.items():
        assert len(snippets) == page.read_text().count("```python"), page_id(page)
        for snippet in snippets:
            marks = ("", NEEDS_CUDA, NEEDS_MUON, ON_TWO_RANKS, PRINTS, *NEEDS_A_FRAMEWORK)
            is_known = snippet.mark in marks or len(snippet.mark) > len(NOT_RUN)
            assert is_known, f"{page_id(page)}:{snippet.line}: {snippet.mark}"
            assert (snippet.mark == PRINTS) == bool(snippet.output), f"{page_id(page)}:{snippet.line}"
    assert len(SNIPPETS[ROOT / "README.md"]) >= 2
    assert CUDA_SNIPPETS
    assert {each.mark for each in SNIPPETS[ROOT / "docs" / "frameworks.md"]} >= set(NEEDS_A_FRAMEWORK)
    assert len(RANKED[ROOT / "docs" / "distributed.md"]) >= 9


def test_outputs_are_compared() -> None:
    assert_same_output("loss 0.061\n1009 of 1101", "loss 0.06\n1012 of 1101")
    for wrong in ("loss 0.06\n500 of 1101", "a loss 0.06\n1012 of 1101", "loss 0.06", "loss 0.1\n1012 of 1101"):
        with pytest.raises(AssertionError):
            assert_same_output("loss 0.061\n1009 of 1101", wrong)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_are_there(page: Path) -> None:
    """A script, test or example that a page names exists: `python benchmarks/...`, `examples/...`, `tests/...`."""
    named = re.findall(r"\b((?:benchmarks|docs|examples|experiments|tests|tools)/[\w/-]+(?:\.\w+)?)", page.read_text())
    written_by_a_script = ("benchmarks/results",)
    missing = [name for name in named if not (ROOT / name).exists() and not name.startswith(written_by_a_script)]
    assert not missing


def test_the_lines_of_the_triton_walk_stand_in_the_kernels() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "fusedreg" / "backends" / "triton").rglob("*.py"))
    lines = {line.split("  #")[0].strip() for line in sources.splitlines()}
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "triton.md").read_text(), flags=re.DOTALL)
    printed = [line.split(" #")[0].strip().removesuffix("...").strip() for line in "".join(blocks).splitlines()]
    assert len(printed) > 10
    assert [line for line in printed if line not in lines] == []
