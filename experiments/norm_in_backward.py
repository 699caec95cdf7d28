"""Is a norm clip cheaper where hooks sum the squares of each gradient as soon as the backward pass has made it?

    python experiments/norm_in_backward.py [--seconds 15] [--threads 2]

Whole training steps: forward, backward, a step of AdamW with decay, L1 and L2. Without a clip; with the clip as
fusedreg has it, after the backward pass; and with hooks in C++ (norm_in_backward.cpp), whose step is the one without a
clip, as the coefficient costs nothing: what they save at the most. Then in steps of four backward passes that add up,
of which only the last one's sums are of use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from measure import Step, stamp, time_in_rounds
from peers import DECAY, L1, L2, LR
from report import Grid
from training_step import MAX_NORM, MODELS
from variants import LEVELS

from fusedreg import _C, FusedRegAdamW

HERE = Path(__file__).parent
ACCUMULATED = 4


def wide_mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layers = [layer for _ in range(3) for layer in (nn.Linear(4096, 4096), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(32, 4096), torch.randint(4096, (32,))


def deep_mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layers = [layer for _ in range(24) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(32, 512), torch.randint(512, (32,))


ALL_MODELS = {
    **MODELS,
    "MLP, 24 layers of 1 MiB, batch 32": deep_mlp,
    "MLP, 3 layers of 64 MiB, batch 32": wide_mlp,
}


def build_hooks(folder: str) -> Any:
    from torch.utils.cpp_extension import load

    target = LEVELS[_C.instruction_set()][0]
    return load(
        "fusedreg_norm_hooks",
        [str(HERE / "norm_in_backward.cpp")],
        extra_include_paths=[str(HERE.parent / "csrc")],
        extra_cflags=["-O3", "-fno-math-errno", "-fno-trapping-math", "-w", f'-DLEVEL=\\"{target}\\"'],
        build_directory=folder,
    )


def training_steps(
    make: Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]], hooks: Any, passes: int
) -> dict[str, Step]:
    """Of one model, as two would have their gradients in memory of different luck."""
    torch.manual_seed(0)
    model, x, y = make()
    params = list(model.parameters())
    hooks.add_hooks(params)
    options: dict[str, Any] = {"lr": LR * 1e-3, "weight_decay": DECAY, "l1": L1, "l2": L2, "backend": "cpp"}

    def step_of(max_norm: float | None, is_hooked: bool) -> Step:
        optimizer = FusedRegAdamW(params, max_grad_norm=max_norm, **options)

        def step() -> None:
            hooks.switch(is_hooked)
            for _ in range(passes):
                hooks.take()
                cross_entropy(model(x), y).backward()
            if is_hooked:
                assert hooks.take() > 0
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {
        "no clip": step_of(None, False),
        "the norm in the step": step_of(MAX_NORM, False),
        "the norm in hooks": step_of(None, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    console.print(stamp("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        hooks = build_hooks(folder)
    rows = []
    for name, make in ALL_MODELS.items():
        for passes in (1, ACCUMULATED):
            seconds = time_in_rounds(training_steps(make, hooks, passes), options.seconds)
            medians = {each: statistics.median(times) for each, times in seconds.items()}
            first = medians["no clip"]
            rows.append(
                [
                    name,
                    str(passes),
                    f"{first * 1e3:.2f} ms",
                    *(f"{each / first:.3f}" for each in list(medians.values())[1:]),
                ]
            )
            console.print(rows[-1])
    headers = ["model", "backward passes a step", "no clip", "the norm in the step", "in hooks, at the least"]
    Grid("Training steps with a norm clip", headers, rows, "Medians, in alternation; ratios to no clip.").show(console)


if __name__ == "__main__":
    main()
