"""Checks fusedreg on a machine with a GPU, part by part: builds in place, runs the tests marked ``gpu``, times a step.

    python tools/gpu_check.py [--within SECONDS] [--list] [WORDS ...]

A part is done in a process of its own, in at most 8 minutes. One that has passed is not done again until what it rests
on has changed: its sources, torch, the GPU. So a run that was cut off goes on where it was; ``--within`` stops in time,
and WORDS choose the parts whose names have one of them. What was done stands in build/gpu-check/; the times in
benchmarks/results/, each case as soon as it is there. With the Python and torch that are there; it asks no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DONE = ROOT / "build" / "gpu-check"
LONGEST = 480.0  # seconds of a part

BUILT_FROM = ("setup.py", "csrc")
TESTED = (*BUILT_FROM, "fusedreg", "tests")
TIMED = (*BUILT_FROM, "fusedreg", "benchmarks")


class Part(NamedTuple):
    name: str
    command: list[str]
    rests_on: tuple[str, ...]
    """Files and folders."""
    may_be_empty: bool = False
    """Whether pytest may find no test."""
    makes: str = ""
    """The pattern of a file that must be there then."""

    @property
    def file(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name) + ".json"


def digest(paths: Iterable[str], about: str, root: Path = ROOT) -> str:
    """Of the text of all sources there, and of what else a part rests on."""
    found = hashlib.sha256(about.encode())
    for path in paths:
        files = [root / path] if (root / path).is_file() else sorted((root / path).rglob("*"))
        for file in files:
            if file.suffix in (".py", ".h", ".cpp", ".cu") and file.name != "_built_with.py":
                found.update(str(file.relative_to(root)).encode())
                found.update(file.read_bytes())
    return found.hexdigest()


def about_this_machine() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, {gpus}"


def all_parts() -> list[Part]:
    python = sys.executable
    parts = [
        Part("build", [python, "setup.py", "-q", "build_ext", "--inplace"], BUILT_FROM, makes="fusedreg/_cuda*.so"),
        Part("info", [python, "-m", "fusedreg", "info"], BUILT_FROM),
    ]
    # The GPU's own tests first, then every file that has one with the mark, or takes it from a fixture.
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.name != "test_gpu.py", str(path)))
    for file in files:
        if re.search(r"\bgpu\b|\bTARGETS\b|\bbackend\b|twin_pairs", file.read_text()):
            name = str(file.relative_to(ROOT))
            parts.append(Part(name, [python, "-m", "pytest", "-q", "-m", "gpu", name], TESTED, may_be_empty=True))
    cases = re.search(r"GPU_CASES.*?\{(.*?)\}", (ROOT / "benchmarks" / "gpu_step.py").read_text(), re.DOTALL)
    assert cases is not None
    for case in re.findall(r'^    "([^"]+)":', cases[1], re.MULTILINE):
        parts.append(Part(f"time {case}", [python, "benchmarks/gpu_step.py", "--cases", case], TIMED))
    return parts


def state_of(part: Part, about: str, folder: Path, root: Path = ROOT) -> dict[str, object] | None:
    """What is known of a part that has passed and rests on what it did then, or None."""
    try:
        known = json.loads((folder / part.file).read_text())
    except (OSError, ValueError):
        return None
    if part.makes and not any(root.glob(part.makes)):
        return None
    return known if known.get("digest") == digest(part.rests_on, about, root) else None


def do(part: Part, about: str, folder: Path, seconds: float, root: Path = ROOT) -> str | None:
    """Does a part, and remembers that it has passed; why it has not, or None."""
    before, begin = digest(part.rests_on, about, root), time.monotonic()
    process = subprocess.Popen(part.command, cwd=root, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"it was not done in {seconds:.0f} s"
    finally:
        if process.poll() is None:  # with the compilers that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0 and not (code == 5 and part.may_be_empty):
        return f"it ended with {code}"
    if part.makes and not any(root.glob(part.makes)):
        return f"there is no {part.makes}"
    folder.mkdir(parents=True, exist_ok=True)
    known = {"name": part.name, "digest": before, "seconds": round(time.monotonic() - begin, 1), "about": about}
    (folder / part.file).write_text(json.dumps(known) + "\n")
    return None


def check(parts: list[Part], about: str, folder: Path = DONE, within: float | None = None, root: Path = ROOT) -> int:
    """Does what is not done; 0 where all parts have passed."""
    end = None if within is None else time.monotonic() + within
    missing: dict[str, str] = {}
    for part in parts:
        known = state_of(part, about, folder, root)
        if known is not None:
            print(f"gpu-check: {part.name}: passed before, in {known['seconds']} s", flush=True)
            continue
        seconds = LONGEST if end is None else min(LONGEST, end - time.monotonic())
        if seconds <= 0:
            missing[part.name] = "there was no time left"
            continue
        print(f"gpu-check: {part.name}", flush=True)
        reason = do(part, about, folder, seconds, root)
        if reason is not None:
            missing[part.name] = reason
            if part.name == "build":  # what follows would test another build
                break
    for name, reason in missing.items():
        print(f"gpu-check: {name}: {reason}", flush=True)
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORDS")
    parser.add_argument("--within", type=float, metavar="SECONDS")
    parser.add_argument("--list", action="store_true", help="name the parts, and which have passed")
    options = parser.parse_args()
    parts = [part for part in all_parts() if not options.words or any(word in part.name for word in options.words)]
    about = about_this_machine()
    if options.list:
        for part in parts:
            print(f"{'passed' if state_of(part, about, DONE) else '':8}{part.name}")
        return 0
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: there is no CUDA device")
    print(f"gpu-check: {about}", flush=True)
    return check(parts, about, within=options.within)


if __name__ == "__main__":
    sys.exit(main())
