"""``fusedreg info`` and ``fusedreg parity``, or ``python -m fusedreg info``."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fusedreg

from . import backends, parity
from .backends.cpp import load_extension


def info(console: Console) -> int:
    """Prints versions, the instruction set in use, and each backend with the reason if it cannot be used."""
    extension, _ = load_extension()
    versions = Table("what", "version", title="Versions")
    versions.add_row("fusedreg", fusedreg.__version__)
    versions.add_row("torch", torch.__version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("CUDA of torch", str(torch.version.cuda))
    versions.add_row("threads", str(torch.get_num_threads()))
    if extension is not None:
        others = [name for name in extension.instruction_sets() if name != extension.instruction_set()]
        versions.add_row(
            "instruction set", f"{extension.instruction_set()} (usable too: {', '.join(others) or 'none'})"
        )
        built_with = importlib.import_module("fusedreg._built_with")
        size = Path(str(extension.__file__)).stat().st_size / 2**20
        versions.add_row("extension", f"{size:.1f} MiB, compiled in {built_with.SECONDS} s")
    console.print(versions)

    table = Table("backend", "usable", "why not", title="Backends, the fastest first")
    for name, backend in backends.BACKENDS.items():
        reason = backend.unavailable_reason()
        table.add_row(name, "yes" if reason is None else "no", reason or "")
    console.print(table)
    return 0


def check_parity(console: Console) -> int:
    """Compares every backend that can run here with the reference in float64; 1 if an error is out of tolerance."""
    table = Table(
        "optimizer", "backend", "device", "dtype", "steps", "largest error", "allowed", "", title="One step, in eps"
    )
    failed = False
    for name, device in parity.usable_backends():
        worst: dict[tuple[str, torch.dtype], list[float]] = {}
        for case in parity.cases(name, device):
            worst.setdefault((case.optimizer.__name__, case.dtype), []).append(parity.error_in_eps(case))
        for (optimizer, dtype), errors in worst.items():
            allowed = parity.TOLERANCE_IN_EPS[dtype]
            good = max(errors) <= allowed
            failed |= not good
            verdict = "[green]ok[/]" if good else "[red]FAILED[/]"
            short = str(dtype).removeprefix("torch.")
            table.add_row(
                optimizer, name, device, short, str(len(errors)), f"{max(errors):.3g}", f"{allowed:g}", verdict
            )
    console.print(table)
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusedreg", description="What fusedreg can do on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in (("info", info), ("parity", check_parity)):
        commands.add_parser(name, help=command.__doc__).set_defaults(command=command)
    # Wide enough for a table that is piped into a file
    console = Console() if sys.stdout.isatty() else Console(width=120)
    return parser.parse_args(arguments).command(console)


if __name__ == "__main__":
    sys.exit(main())
