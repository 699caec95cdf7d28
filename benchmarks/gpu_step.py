"""How long one optimizer step takes on a GPU, beside torch's own, by hand, and what else is installed.

    python benchmarks/gpu_step.py [--output benchmarks/results] [--smoke]

Contenders are timed in alternation, in one process, after a warm-up and a check against the reference. They share
weights and gradients and keep their own state. Large cases: CUDA events around a step. Cases of many small tensors: the
time of a step in a row of steps, and the time that the host takes to hand one over. What is printed is written to
OUTPUT as JSON and Markdown, under the GPU's name. `--smoke` runs tiny sizes, on the CPU too, to see that all runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusedreg
from fusedreg import FusedRegAdamW, backends

LR, DECAY, L1, L2 = 1e-3, 0.01, 1e-4, 1e-4
GATE_TOLERANCE = 1e-5
# fp32 Adam reads w, g, m, v and writes w, m, v; the norm clip reads g once more.
STEP_BYTES, CLIP_BYTES = 28, 4
PLAIN = "torch AdamW(fused=True)"

# GPT-2 of 125M parameters: embeddings, then 12 blocks.
WIDTH, BLOCKS = 768, 12
GPT2_BLOCK = [
    *[(WIDTH,)] * 4,
    (3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,),
    (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,),
]  # fmt: skip
GPT2 = [(50257, WIDTH), (1024, WIDTH), *GPT2_BLOCK * BLOCKS, (WIDTH,), (WIDTH,)]

CASES: dict[str, list[tuple[int, ...]]] = {
    "1B in 20 tensors": [(50_000_000,)] * 20,
    "GPT-2 125M": GPT2,
    "300 tensors, 125M": [(417_000,)] * 300,
    "1000 of 64x64": [(64, 64)] * 1000,
    "20 tiny": [(50, 10), (50,)] * 10,
}
SMOKE_CASES = {"smoke": [(1000, 33), (7,)] * 4}


def by_hand(params: list[Tensor], optimizer: torch.optim.Optimizer, max_norm: float) -> Callable[[], None]:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        shrink(params)

    return step


@torch.no_grad()
def shrink(params: list[Tensor]) -> None:
    for param in params:
        torch.ops.aten.softshrink.out(param, LR * L1, out=param)


def grad_scale_trick(params: list[Tensor], optimizer: Any, max_norm: float) -> Callable[[], None]:
    """torch's fused step divides by ``grad_scale`` in passing: a clip without a pass of its own over the gradients."""
    optimizer.found_inf = torch.zeros((), device=params[0].device)

    def step() -> None:
        norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
        optimizer.step()
        shrink(params)

    return step


def contenders(params: list[Tensor], max_norm: float) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (step, bytes an element that the job takes at the least)."""

    def twin(**options: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, **options)

    clipped = STEP_BYTES + CLIP_BYTES
    found: dict[str, tuple[Callable[[], Any], int]] = {
        PLAIN: (twin(fused=True).step, STEP_BYTES),
        "torch AdamW(foreach=True)": (twin(foreach=True).step, STEP_BYTES),
        "by hand: clip, fused, shrink": (by_hand(params, twin(fused=True), max_norm), clipped),
        "grad_scale trick, shrink": (grad_scale_trick(params, twin(fused=True), max_norm), clipped),
    }
    for name in usable_backends(params[0]):
        for what, limit, size in (("decay, l1, l2", None, STEP_BYTES), ("decay, l1, l2, clip", max_norm, clipped)):
            optimizer = FusedRegAdamW(
                params, lr=LR, weight_decay=DECAY, l1=L1, l2=L2, max_grad_norm=limit, backend=name
            )
            found[f"fusedreg {name}: {what}"] = (optimizer.step, size)
    for name, module, cls in (
        ("apex", "apex.optimizers", "FusedAdam"),
        ("transformer_engine", "transformer_engine.pytorch.optimizers", "FusedAdam"),
    ):
        try:
            peer = getattr(importlib.import_module(module), cls)(params, lr=LR, weight_decay=DECAY)
        except Exception as error:
            print(f"{name} is not here: {type(error).__name__}: {error}")
        else:
            found[f"{name}: plain"] = (peer.step, STEP_BYTES)
    return found


def usable_backends(param: Tensor) -> list[str]:
    return [
        name
        for name, backend in backends.BACKENDS.items()
        if name != "reference" and not (backend.unavailable_reason() or backend.rejection(param, []))
    ]


def make_params(shapes: list[tuple[int, ...]], device: str) -> tuple[list[Tensor], float]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.empty(shape, device=device).normal_(std=0.02, generator=generator).requires_grad_()
        param.grad = torch.empty(shape, device=device).normal_(std=1e-3, generator=generator)
        params.append(param)
    return params, 0.5 * float(torch.nn.utils.get_total_norm([param.grad for param in params]))


def gate(device: str) -> None:
    """No time is taken of a wrong result."""
    shapes = [(125, 501), (64, 64), (50,), ()]
    truth, limit = make_params(shapes, "cpu")
    options = dict(lr=LR, weight_decay=DECAY, l1=0.1, l2=0.1, max_grad_norm=limit)
    for name in usable_backends(truth[0].to(device)):
        params = [param.detach().to(device).requires_grad_() for param in truth]
        for param, other in zip(params, truth, strict=True):
            param.grad = other.grad.to(device)
        optimizer = FusedRegAdamW(params, backend=name, **options)
        own = [param.detach().clone().requires_grad_() for param in truth]
        for param, other in zip(own, truth, strict=True):
            param.grad = other.grad
        reference = FusedRegAdamW(own, backend="reference", **options)
        for _ in range(3):
            optimizer.step()
            reference.step()
        error = max(float((a.detach().cpu() - b.detach()).abs().max()) for a, b in zip(params, own, strict=True))
        if not error <= GATE_TOLERANCE * LR * 100:
            raise SystemExit(f"backend {name!r} is off by {error}: nothing is timed")


class Clock:
    """Seconds of device time where there is a device, of wall time elsewhere."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, step: Callable[[], Any], repeats: int = 1) -> float:
        self.wait()
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            return (time.perf_counter() - start) / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    def host_time(self, step: Callable[[], Any]) -> float:
        """What the host takes to hand a step over to an idle device."""
        self.wait()
        start = time.perf_counter()
        step()
        taken = time.perf_counter() - start
        self.wait()
        return taken


def stream_bandwidth(clock: Clock, device: str, smoke: bool) -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.empty(10_000 if smoke else 1_000_000_000, device=device).normal_()
    target = torch.empty_like(source)
    seconds = [clock.time(lambda: target.copy_(source)) for _ in range(3 if smoke else 30)][1:]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def measure(name: str, shapes: list[tuple[int, ...]], clock: Clock, device: str, smoke: bool) -> list[dict[str, Any]]:
    params, limit = make_params(shapes, device)
    numel = sum(map(math.prod, shapes))
    steps = contenders(params, limit)
    small = numel < 50_000_000
    rounds, repeats = (2, 2) if smoke else (30, 50) if small else (15, 1)
    seconds: dict[str, list[float]] = {contender: [] for contender in steps}
    host: dict[str, list[float]] = {contender: [] for contender in steps}
    for round_number in range(-2, rounds):  # two rounds of warm-up
        for contender, (step, _) in steps.items():
            for param in params:  # a clip in place has shrunk them; denormals would be slow
                param.grad.normal_(std=1e-3)
            step()
            taken = clock.time(step, repeats)
            handed_over = clock.host_time(step)
            if round_number >= 0:
                seconds[contender].append(taken)
                host[contender].append(handed_over)
    plain = statistics.median(seconds[PLAIN])
    return [
        {
            "case": name,
            "contender": contender,
            "parameters": numel,
            "tensors": len(shapes),
            "milliseconds": statistics.median(taken) * 1e3,
            "host_microseconds": statistics.median(host[contender]) * 1e6,
            "ratio_to_plain": statistics.median(taken) / plain,
            "gigabytes_per_second": numel * steps[contender][1] / statistics.median(taken) / 1e9,
        }
        for contender, taken in seconds.items()
    ]


def stamp(device: str) -> dict[str, Any]:
    about = {
        "fusedreg": fusedreg.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        about |= {"gpu": torch.cuda.get_device_name(), "driver": driver.stdout.strip().splitlines()[0]}
    try:
        about["triton"] = importlib.import_module("triton").__version__
    except ImportError:
        about["triton"] = None
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--cases", nargs="*", help=f"any of: {', '.join(CASES)}")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("there is no CUDA device; --smoke runs tiny sizes on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    console, clock, about = Console(width=120), Clock(device), stamp(device)
    gate(device)
    bandwidth = stream_bandwidth(clock, device, options.smoke)
    console.print(about, f"copy: {bandwidth / 1e9:.0f} GB/s", sep="\n")
    results = []
    for name, shapes in (SMOKE_CASES if options.smoke else CASES).items():
        if options.cases and name not in options.cases:
            continue
        rows = measure(name, shapes, clock, device, options.smoke)
        results += rows
        table = Table("contender", "ms", "GB/s", "of copy", "ratio", "host us", title=name)
        for row in rows:
            rate = row["gigabytes_per_second"]
            table.add_row(
                row["contender"], f"{row['milliseconds']:.3f}", f"{rate:.0f}", f"{rate * 1e9 / bandwidth:.0%}",
                f"{row['ratio_to_plain']:.2f}", f"{row['host_microseconds']:.0f}",
            )  # fmt: skip
        console.print(table)
        if device == "cuda":
            torch.cuda.empty_cache()

    options.output.mkdir(parents=True, exist_ok=True)
    stem = "smoke" if options.smoke else re.sub(r"\W+", "-", about["gpu"].lower())
    everything = {"about": about, "copy_gigabytes_per_second": bandwidth / 1e9, "results": results}
    (options.output / f"{stem}.json").write_text(json.dumps(everything, indent=1) + "\n")
    (options.output / f"{stem}.md").write_text(markdown(about, bandwidth, results))
    print(f"written to {options.output / stem}.json and .md")


def markdown(about: dict[str, Any], bandwidth: float, results: list[dict[str, Any]]) -> str:
    lines = [f"# {about.get('gpu', 'CPU')}", "", ", ".join(f"{key} {value}" for key, value in about.items())]
    lines += ["", f"A copy on the device moves {bandwidth / 1e9:.0f} GB/s. Written by `benchmarks/gpu_step.py`.", ""]
    for case in dict.fromkeys(row["case"] for row in results):
        lines += [
            f"## {case}",
            "",
            "| contender | ms | GB/s | of copy | ratio | host us |",
            "|---|---|---|---|---|---|",
        ]
        for row in results:
            if row["case"] == case:
                rate = row["gigabytes_per_second"]
                lines.append(
                    f"| {row['contender']} | {row['milliseconds']:.3f} | {rate:.0f} | {rate * 1e9 / bandwidth:.0%} "
                    f"| {row['ratio_to_plain']:.2f} | {row['host_microseconds']:.0f} |"
                )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
