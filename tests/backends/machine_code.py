"""The machine code of CUDA kernels (SASS), as cuobjdump prints it: instructions, and the loops that walk packs."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    address: int
    name: str
    """With its modifiers: LDG.E.128."""
    operands: str


class Loop(tuple[Instruction, ...]):
    """From the target of a branch backwards to the branch."""

    def count(self, pattern: str = "") -> int:
        """The instructions whose names begin so: a regular expression."""
        return sum(re.match(pattern, each.name) is not None for each in self)


LOAD, STORE = (rf"{way}\.E(?:\.\w+)*\.128\b" for way in ("LDG", "STG"))

DOUBLE = r"D(?:FMA|ADD|MUL|SETP|MNMX)\b|[FI]2F\.F64|F2F\.F32\.F64"


@functools.cache
def cuobjdump() -> str | None:
    """nvcc's, or the one that Triton's package brings."""
    triton = importlib.util.find_spec("triton")
    beside_triton = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(beside_triton) if beside_triton and beside_triton.exists() else None)


def functions(cubin: Path) -> dict[str, str]:
    """The code of each kernel, by its mangled name."""
    disassembler = cuobjdump()
    assert disassembler is not None
    done = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    names_and_bodies = re.split(r"Function : (\w+)", done.stdout)[1:]
    return dict(zip(names_and_bodies[::2], names_and_bodies[1::2], strict=True))


def instructions(body: str) -> list[Instruction]:
    return [Instruction(int(found[1], 16), found[2], found[3]) for found in INSTRUCTION.finditer(body)]


def calls(code: Iterable[Instruction]) -> list[Instruction]:
    """Of routines. Code for sm_80 also leaves a loop by a "call" of what comes next, which is no routine."""
    found = [each for each in code if each.name.startswith("CALL")]
    return [each for each in found if not 0 < target(each) - each.address <= 32]


def target(branch: Instruction) -> int:
    """Where it goes; -1 where a register says it."""
    found = re.search(r"0x([0-9a-f]+)", branch.operands)
    return int(found[1], 16) if found else -1


def loops_of(body: str) -> list[Loop]:
    """As they lie in the code."""
    code = instructions(body)
    ends: dict[int, int] = {}
    for each in code:
        if each.name.startswith("BRA") and 0 <= target(each) < each.address:
            ends[target(each)] = each.address
    return [Loop(each for each in code if begin <= each.address <= end) for begin, end in sorted(ends.items())]


def loops_over_packs(body: str) -> list[Loop]:
    """Those that load 16 bytes at a time."""
    return [loop for loop in loops_of(body) if loop.count(LOAD)]


def innermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(other != loop and set(other) <= set(loop) for other in loops)]
