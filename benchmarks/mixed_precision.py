"""What a step costs whose parameters, gradients and states have dtypes of their own, in the same rounds.

    python benchmarks/mixed_precision.py [--elements 50_000_000] [--threads 2] [--seconds 10]

Ratios to torch's fused step with gradients and states of the parameters' dtype, and its decay alone. Everything on:
decay, L1 and L2. And the bytes that an element's states take.

Bars at 50M, float32 parameters with bfloat16 states: 0.80 with everything on, 1.00 with the norm clip too. bfloat16
parameters and states: 0.95 for AdamW, 1.00 for SGD with momentum."""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import torch
from cases import Problem
from measure import stamp, time_in_rounds
from peers import L1, L2, LR
from penalties import OPTIMIZERS
from report import Grid
from rich.console import Console

F32, BF16 = torch.float32, torch.bfloat16
NEAREST: dict[str, Any] = {}
STOCHASTIC = {"stochastic_rounding": True}
# Of parameters, gradients, states, and how what is stored in fewer bits is rounded.
STORED: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | str, dict[str, Any]]] = {
    "float32": (F32, F32, F32, NEAREST),
    "float32, bfloat16 gradients": (F32, BF16, F32, NEAREST),
    "float32, bfloat16 states": (F32, F32, BF16, NEAREST),
    "float32, bfloat16 states, stochastic": (F32, F32, BF16, STOCHASTIC),
    "float32, bfloat16 gradients and states": (F32, BF16, BF16, NEAREST),
    "float32, int8 states": (F32, F32, "int8", NEAREST),
    "float32, int8 states, stochastic": (F32, F32, "int8", STOCHASTIC),
    "bfloat16": (BF16, BF16, BF16, NEAREST),
    "bfloat16, stochastic": (BF16, BF16, BF16, STOCHASTIC),
    "bfloat16, float32 states": (BF16, BF16, F32, NEAREST),
    "bfloat16, int8 states, stochastic": (BF16, BF16, "int8", STOCHASTIC),
}
EVERYTHING = {"l1": L1, "l2": L2}


def problem_of(elements: int, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> Problem:
    rows = max(elements // 10 // 5000, 1)
    problem = Problem.random([(rows, 5000)] * 10, param_dtype)
    if grad_dtype != param_dtype:
        for param in problem.params:
            grad, param.grad = param.grad, None
            assert grad is not None
            param.grad_dtype = grad_dtype
            param.grad = grad.to(grad_dtype)
    return problem


def bytes_of_state(optimizer: torch.optim.Optimizer) -> float:
    """For each element of its parameters."""
    tensors = [each for own in optimizer.state.values() for each in own.values() if isinstance(each, torch.Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors) / sum(p.numel() for p in optimizer.state)


def time_stored(name: str, stored: str, elements: int, seconds: float) -> list[float]:
    """Nanoseconds an element of torch's step, and ratios to it: nothing on, everything, and the norm clip; medians. And
    bytes of state an element."""
    cls, options = OPTIMIZERS[name]
    param_dtype, grad_dtype, state_dtype, rounding = STORED[stored]
    problem = problem_of(elements, param_dtype, grad_dtype)
    alike = problem_of(elements, param_dtype, param_dtype)  # torch's fused step wants one dtype
    # So small an lr that no weight goes far from where it is, however many steps are taken.
    options = {"lr": LR * 1e-3, **options}
    ours: dict[str, Any] = {"backend": "cpp", "state_dtype": state_dtype, **rounding, **options}
    assert cls.spec.twin is not None
    nothing = cls(problem.params, **ours | {"weight_decay": 0.0})
    steps = {
        "torch": cls.spec.twin(alike.params, fused=True, **options).step,
        "nothing": nothing.step,
        "everything": cls(problem.params, **ours, **EVERYTHING).step,
        "clip": cls(problem.params, **ours, **EVERYTHING, max_grad_norm=problem.max_norm).step,
    }
    taken = {each: statistics.median(times) for each, times in time_in_rounds(steps, seconds).items()}
    torch_s = taken.pop("torch")
    ratios = [each / torch_s for each in taken.values()]
    return [torch_s / problem.numel * 1e9, *ratios, bytes_of_state(nothing)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    headers = ["stored", "torch, fused: ns an element", "nothing on", "everything on", "and the clip", "bytes of state"]
    for name in OPTIMIZERS:
        rows = []
        for stored in STORED:
            nanoseconds, *others = time_stored(name, stored, arguments.elements, arguments.seconds)
            rows.append([stored, f"{nanoseconds:.3f}", *(f"{each:.2f}" for each in others)])
            gc.collect()
        Grid(f"{name}, {arguments.elements:,} elements", headers, rows, "Medians, in alternation.").show(console)


if __name__ == "__main__":
    main()
