"""Times the working tree against another revision: old, new, ratio.

    python tools/bench_compare.py REVISION [--rounds 3] [pytest arguments, as -k tiny]

The revision is built in a folder of its own, with this Python and torch. Both run benchmarks/test_step.py as it stands
in the working tree, in turn, so that a machine that slows down or speeds up does so for both; per benchmark the
smallest median of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def built(revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of a revision with its extension in place."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, revision], cwd=ROOT, check=True)
    try:
        environment = {**os.environ, "FUSEDREG_NO_CUDA": "1"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def medians(tree: Path, json_file: Path, pytest_arguments: list[str]) -> dict[str, float]:
    """Seconds by benchmark, with the package that stands in ``tree``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    command += [f"--benchmark-json={json_file}", ROOT / "benchmarks" / "test_step.py", *pytest_arguments]
    # `python -m` looks in the current folder first.
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    found = {}
    for result in json.loads(json_file.read_text())["benchmarks"]:
        used = Path(result["extra_info"]["fusedreg"])
        if tree not in used.parents:
            raise SystemExit(f"{used} was timed, not what is in {tree}")
        found[result["name"].removeprefix("test_")] = result["stats"]["median"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=3)
    options, pytest_arguments = parser.parse_known_args()
    old: dict[str, float] = {}
    new: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, built(options.revision, Path(scratch).resolve() / "base") as base:
        for _ in track(range(options.rounds), "rounds"):
            for tree, best in ((base, old), (ROOT, new)):
                for name, median in medians(tree, Path(scratch) / "run.json", pytest_arguments).items():
                    best[name] = min(median, best.get(name, median))
    table = Table("benchmark", f"{options.revision}, us", "working tree, us", "ratio")
    for name, before in old.items():
        table.add_row(escape(name), f"{before * 1e6:.1f}", f"{new[name] * 1e6:.1f}", f"{new[name] / before:.3f}")
    Console(width=max(Console().width, 100)).print(table)


if __name__ == "__main__":
    main()
