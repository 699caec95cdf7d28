"""How long one optimizer step takes on a CPU, as a ratio to plain ``torch.optim.AdamW(fused=True)``.

    python benchmarks/cpu_step.py [--threads 2] [--quick] [--json FILE]

Absolute times mean nothing between machines, so what counts are the ratios. They are taken within one process, in
rounds: each round times one step of every contender, in a new random order, so that whatever else the machine does hits
all of them alike. Nothing is timed before the compiled backend has been checked against the reference.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fusedreg import FusedRegAdamW

LR = 1e-3
WEIGHT_DECAY = 0.01
L1 = 1e-4
L2 = 1e-4
WEIGHT_SCALE = 0.02
GRADIENT_SCALE = 1e-3
# The clip is set to this share of the gradients' norm, so that it really scales them down.
MAX_NORM_SHARE = 0.5

# fp32 Adam reads w, g, m, v and writes w, m, v: 7 * 4 bytes. A global norm must have read all of g before.
STEP_BYTES = 28
CLIPPED_STEP_BYTES = 32
STREAM_ELEMENTS = 100_000_000
STREAM_BYTES = 8

GATE_STEPS = 3
GATE_TOLERANCE = 1e-5

MIB = 1024 * 1024

Shape = tuple[int, ...]
Step = Callable[[], object]


# -- what is measured


@dataclass(frozen=True)
class Case:
    name: str
    shapes: list[Shape]
    gate_shapes: list[Shape]
    rounds: int
    quick_rounds: int
    is_memory_bound: bool = False
    """Whether GB/s and the memory of a step say something: the tensors do not fit in any cache."""

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


CASES = [
    Case(
        name="50M parameters: 10 tensors of 1000x5000",
        shapes=[(1000, 5000)] * 10,
        # 250 kB each, of a length that no vector width or chunk size divides.
        gate_shapes=[(125, 501)] * 10,
        rounds=30,
        quick_rounds=3,
        is_memory_bound=True,
    ),
    Case(
        name="1000 tensors of 64x64",
        shapes=[(64, 64)] * 1000,
        gate_shapes=[(64, 64)] * 1000,
        rounds=200,
        quick_rounds=10,
    ),
    Case(
        name="20 tiny tensors: 10 of 50x10, 10 of 50",
        shapes=[(50, 10), (50,)] * 10,
        gate_shapes=[(50, 10), (50,)] * 10,
        rounds=3000,
        quick_rounds=200,
    ),
]


@dataclass(frozen=True)
class Problem:
    """Weights and gradients that every contender gets its own copy of: two of them write into the gradients."""

    weights: list[Tensor]
    gradients: list[Tensor]
    max_norm: float

    @classmethod
    def random(cls, shapes: list[Shape], seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator).mul_(WEIGHT_SCALE) for shape in shapes]
        gradients = random_gradients(shapes, generator)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        return cls(weights, gradients, MAX_NORM_SHARE * norm)

    def parameters(self) -> list[Tensor]:
        params = [weight.clone().requires_grad_() for weight in self.weights]
        for param, gradient in zip(params, self.gradients, strict=True):
            param.grad = gradient.clone()
        return params


def random_gradients(shapes: list[Shape], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(shape, generator=generator).mul_(GRADIENT_SCALE) for shape in shapes]


# -- the shrink that a user writes by hand


@torch.no_grad()
def shrink_foreach(params: list[Tensor], threshold: float) -> None:
    signs = torch._foreach_sign(params)
    torch._foreach_abs_(params)
    torch._foreach_sub_(params, threshold)
    torch._foreach_clamp_min_(params, 0.0)
    torch._foreach_mul_(params, signs)


@torch.no_grad()
def shrink_copy(params: list[Tensor], threshold: float) -> None:
    for param in params:
        param.copy_(torch.nn.functional.softshrink(param, threshold))


@torch.no_grad()
def shrink_out(params: list[Tensor], threshold: float) -> None:
    # One pass and no temporary. `out` is not in the documentation of softshrink, but in its signature.
    for param in params:
        torch.ops.aten.softshrink.out(param, threshold, out=param)


Shrink = Callable[[list[Tensor], float], None]
SHRINKS: dict[str, Shrink] = {
    "torch._foreach_*": shrink_foreach,
    "copy_(softshrink)": shrink_copy,
    "softshrink(out=)": shrink_out,
}


def fastest_shrink(problem: Problem, repeats: int) -> str:
    """The name of the shrink that is fastest on these tensors: the hand-written contenders get that one."""
    params = [weight.clone() for weight in problem.weights]

    def bind(shrink: Shrink) -> Step:
        return lambda: shrink(params, LR * L1)

    seconds = time_in_rounds({name: bind(shrink) for name, shrink in SHRINKS.items()}, repeats)
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


# -- the contenders


@dataclass(frozen=True)
class Contender:
    name: str
    step: Step
    floor_bytes: int
    """Bytes an element that the job takes at least, if nothing is read or written twice."""


PLAIN = "torch AdamW(fused=True), decay"
OURS = {
    "FusedRegAdamW, nothing on": {"weight_decay": 0.0},
    "FusedRegAdamW, decay, l1, l2": {"weight_decay": WEIGHT_DECAY, "l1": L1, "l2": L2},
    "FusedRegAdamW, decay, l1, l2, clip": {"weight_decay": WEIGHT_DECAY, "l1": L1, "l2": L2, "clip": True},
}


def our_optimizer(params: list[Tensor], options: dict[str, Any], max_norm: float, backend: str) -> FusedRegAdamW:
    options = dict(options)
    max_grad_norm = max_norm if options.pop("clip", False) else None
    return FusedRegAdamW(params, lr=LR, max_grad_norm=max_grad_norm, backend=backend, **options)


def torch_optimizer(params: list[Tensor], weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, weight_decay=weight_decay, fused=True)


# The two steps below shrink by lr * l1, and leave L2 to the weight decay, where it costs nothing. FusedRegAdamW does
# more work: it divides l1 and l2 by Adam's own metric, for which a shrink by hand would have to read the second moment.


def by_hand_step(problem: Problem, shrink: Shrink) -> Step:
    params = problem.parameters()
    optimizer = torch_optimizer(params, WEIGHT_DECAY + L2)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, problem.max_norm)
        optimizer.step()
        shrink(params, LR * L1)

    return step


def grad_scale_step(problem: Problem, shrink: Shrink) -> Step:
    params = problem.parameters()
    optimizer = torch_optimizer(params, WEIGHT_DECAY + L2)
    # What GradScaler sets: a divisor of the gradients, and a flag that skips the step.
    optimizer.found_inf = torch.tensor(0.0)

    def step() -> None:
        norm = torch.nn.utils.get_total_norm([param.grad for param in params])
        optimizer.grad_scale = ((norm + 1e-6) / problem.max_norm).clamp_(min=1.0)
        optimizer.step()
        shrink(params, LR * L1)

    return step


def make_contenders(problem: Problem, shrink: Shrink) -> list[Contender]:
    contenders = [
        Contender(PLAIN, torch_optimizer(problem.parameters(), WEIGHT_DECAY).step, STEP_BYTES),
        Contender("by hand: clip + step + shrink", by_hand_step(problem, shrink), CLIPPED_STEP_BYTES),
        Contender("by hand: grad_scale trick + shrink", grad_scale_step(problem, shrink), CLIPPED_STEP_BYTES),
    ]
    for name, options in OURS.items():
        # By name, not "auto": it must raise rather than time the reference.
        optimizer = our_optimizer(problem.parameters(), options, problem.max_norm, backend="cpp")
        contenders.append(Contender(name, optimizer.step, CLIPPED_STEP_BYTES if "clip" in options else STEP_BYTES))
    return contenders


# -- the gate


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest error over the largest element, infinite where either has a NaN.

    Not element by element: beside a threshold a correct result may be as close to zero as it likes.
    """
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def tensors_after_steps(case: Case, options: dict[str, Any], backend: str) -> list[Tensor]:
    """The weights, then the moments, after GATE_STEPS steps with new gradients in each."""
    problem = Problem.random(case.gate_shapes, seed=1)
    params = problem.parameters()
    optimizer = our_optimizer(params, options, problem.max_norm, backend)
    generator = torch.Generator().manual_seed(2)
    for _ in range(GATE_STEPS):
        for param, gradient in zip(params, random_gradients(case.gate_shapes, generator), strict=True):
            param.grad = gradient
        optimizer.step()
    moments = [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq") for param in params]
    return [*(param.detach() for param in params), *moments]


def gate_failure(case: Case, name: str, options: dict[str, Any]) -> str | None:
    """What is wrong with the compiled backend on this case, or None."""
    ours = tensors_after_steps(case, options, backend="cpp")
    theirs = tensors_after_steps(case, options, backend="reference")
    error = max(map(relative_error, ours, theirs))
    if not error <= GATE_TOLERANCE:
        return f"{name} on {case.name}: cpp is {error:.1e} away from the reference (allowed: {GATE_TOLERANCE:.0e})"
    if "l1" in options and not any(bool((tensor == 0).any()) for tensor in ours[: len(case.gate_shapes)]):
        return f"{name} on {case.name}: L1 made no zero, so this check would not see an error in it"
    return None


def gate_failures() -> list[str]:
    failures = (gate_failure(case, name, options) for case in CASES for name, options in OURS.items())
    return [failure for failure in failures if failure is not None]


# -- clocks and memory


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_in_rounds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a warm-up that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = max(2, rounds // 10)
    order = list(steps)
    shuffle = random.Random(0).shuffle
    with no_garbage_collection():
        for i in range(warm_up + rounds):
            # A step may leave the caches as the next one likes them; a fixed order would favour one contender.
            shuffle(order)
            for name in order:
                begin = time.perf_counter()
                steps[name]()
                end = time.perf_counter()
                if i >= warm_up:
                    seconds[name].append(end - begin)
    return seconds


def status_mib(field_name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field_name} in the process status")


def return_freed_memory() -> None:
    """Gives the allocator's freed pages back: a step that got those again would seem to need no memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def peak_extra_mib(step: Step) -> float | None:
    """How far a step's peak of resident memory is above what stood there before it; None where Linux does not tell."""
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to what is resident now
        before = status_mib("VmHWM")
        step()
        return status_mib("VmHWM") - before
    except OSError:
        return None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# -- results


@dataclass
class Row:
    name: str
    median_s: float
    first_quartile_s: float
    third_quartile_s: float
    ratio: float
    gb_per_s: float | None = None
    share_of_stream: float | None = None
    peak_extra_mib: float | None = None


@dataclass
class CaseResult:
    name: str
    rounds: int
    shrink: str
    stream_gb_per_s: float | None = None
    rows: list[Row] = field(default_factory=list)


def make_row(name: str, seconds: list[float], plain_s: float) -> Row:
    first, median, third = statistics.quantiles(seconds, n=4)
    return Row(name, median, first, third, median / plain_s)


def stream_step() -> Step:
    x = torch.ones(STREAM_ELEMENTS)
    return lambda: x.mul_(1.0)


def run_case(case: Case, quick: bool) -> CaseResult:
    rounds = case.quick_rounds if quick else case.rounds
    problem = Problem.random(case.shapes)
    shrink = fastest_shrink(problem, repeats=max(3, rounds // 3))
    contenders = make_contenders(problem, SHRINKS[shrink])
    steps = {contender.name: contender.step for contender in contenders}
    if case.is_memory_bound:
        steps["stream"] = stream_step()  # in the same rounds: the bandwidth of a shared machine drifts
    seconds = time_in_rounds(steps, rounds)

    result = CaseResult(case.name, rounds, shrink)
    plain_s = statistics.median(seconds[PLAIN])
    result.rows = [make_row(contender.name, seconds[contender.name], plain_s) for contender in contenders]
    if case.is_memory_bound:
        result.stream_gb_per_s = STREAM_ELEMENTS * STREAM_BYTES / statistics.median(seconds["stream"]) / 1e9
        for row, contender in zip(result.rows, contenders, strict=True):
            row.gb_per_s = case.numel * contender.floor_bytes / row.median_s / 1e9
            row.share_of_stream = row.gb_per_s / result.stream_gb_per_s
            row.peak_extra_mib = peak_extra_mib(contender.step)
    return result


# -- output


def format_time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def times_table(result: CaseResult) -> Table:
    caption = f"{result.rounds} rounds; the shrink by hand is {result.shrink}, the fastest of {len(SHRINKS)} here"
    table = Table(title=result.name, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("one step of")
    for header in ("median", "quartiles", "ratio"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result.rows:
        quartiles = f"{format_time(row.first_quartile_s)} - {format_time(row.third_quartile_s)}"
        table.add_row(row.name, format_time(row.median_s), quartiles, f"{row.ratio:.2f}")
    return table


def memory_table(case: Case, result: CaseResult) -> Table:
    tensor_mib = math.prod(case.shapes[0]) * 4 / MIB
    table = Table(
        title=f"Memory, {case.name}; in-place stream x.mul_: {result.stream_gb_per_s:.1f} GB/s",
        caption=(
            f"GB/s: of the bytes that the job takes at least, {STEP_BYTES} an element, {CLIPPED_STEP_BYTES} with the "
            f"norm. Extra: peak memory of a step above what it started with; one tensor is {tensor_mib:.1f} MiB, all "
            f"are {case.numel * 4 / MIB:.0f} MiB."
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("one step of")
    for header in ("GB/s", "of stream", "extra"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result.rows:
        extra = "not known" if row.peak_extra_mib is None else f"{row.peak_extra_mib:.1f} MiB"
        table.add_row(row.name, f"{row.gb_per_s:.1f}", f"{row.share_of_stream:.0%}", extra)
    return table


def describe_machine() -> dict[str, Any]:
    from fusedreg import _C  # after the gate, which says why if the compiled backend is not there

    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instruction_set": _C.instruction_set(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="threads for every contender (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see it work; the times mean little")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    console = Console()
    try:
        failures = gate_failures()
    except RuntimeError as error:
        failures = [str(error)]
    if failures:
        for failure in failures:
            console.print(f"Wrong: {failure}", style="bold red", markup=False)
        console.print("Nothing was timed.")
        return 1
    console.print(f"cpp agrees with the reference: {len(CASES)} cases x {len(OURS)} settings, {GATE_STEPS} steps each")

    machine = describe_machine()
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"fusedreg's instruction set {machine['instruction_set']}",
        highlight=False,
    )
    results = []
    for case in CASES:
        result = run_case(case, arguments.quick)
        results.append(result)
        console.print("", times_table(result), sep="\n")
        if case.is_memory_bound:
            console.print("", memory_table(case, result), sep="\n")
    if arguments.json is not None:
        report = {"machine": machine, "quick": arguments.quick, "cases": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
