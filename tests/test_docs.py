"""Every Python snippet in the README runs as it is printed, and docs/triton.md prints the kernels as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
# The loop that a reader comes with is a fragment; what replaces it must run.
RUNNABLE = [snippet for snippet in SNIPPETS if "import" in snippet]


def test_there_are_snippets() -> None:
    assert len(RUNNABLE) == len(SNIPPETS) - 1 == 2


@pytest.mark.parametrize("snippet", RUNNABLE, ids=lambda snippet: snippet.splitlines()[1])
def test_readme(snippet: str, capsys) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_lines_of_the_triton_walk_stand_in_the_kernels() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "fusedreg" / "triton").glob("*.py"))
    lines = {line.split("  #")[0].strip() for line in sources.splitlines()}
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "triton.md").read_text(), flags=re.DOTALL)
    printed = [line.split(" #")[0].strip().removesuffix("...").strip() for line in "".join(blocks).splitlines()]
    assert len(printed) > 10
    assert [line for line in printed if line not in lines] == []
