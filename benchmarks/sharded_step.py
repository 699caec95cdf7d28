"""Times a step on DTensors, with everything on, beside torch's ``clip_grad_norm_`` and ``AdamW(fused=True)``.

    python benchmarks/sharded_step.py

Two processes on this machine, joined by gloo, with one thread each; every tensor is sharded over both on its first
dimension, as FSDP2 does. Both sides step the same parameters, in rounds, in a random order that the ranks agree on.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, MAX_NORM_SHARE, Problem, Shape
from measure import no_garbage_collection, stamp, wall_time
from peers import DECAY, L1, L2, LR
from report import Grid
from rich.console import Console
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from fusedreg import FusedRegAdamW
from fusedreg.backends import StepScalars
from fusedreg.step.norm import clip
from fusedreg.step.plan import Gradients

RANKS = 2
WARM_UP, ROUNDS = 5, 60
SHARDED: dict[str, list[Shape]] = {"100 of 64x64": [(64, 64)] * 100, "GPT-2, 125M": CASES["GPT-2, 125M"]}


def median_seconds(parts: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of each part, what the slower rank takes; they begin together."""
    order = list(parts)
    shuffle = random.Random(0).shuffle
    taken: dict[str, list[float]] = {name: [] for name in parts}

    with no_garbage_collection():
        for round in range(WARM_UP + ROUNDS):
            shuffle(order)
            for name in order:
                distributed.barrier()
                seconds = wall_time(parts[name])
                if round >= WARM_UP:
                    taken[name].append(seconds)
    slower = torch.tensor(list(taken.values()), dtype=torch.float64)
    distributed.all_reduce(slower, distributed.ReduceOp.MAX)
    return {name: statistics.median(seconds) for name, seconds in zip(parts, slower.tolist(), strict=True)}


def time_case(shapes: list[Shape]) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (RANKS,))
    params = []
    for param in Problem.random(shapes).params:
        grad, own = param.grad, distribute_tensor(param.detach(), mesh, [Shard(0)]).requires_grad_()
        assert grad is not None
        own.grad = distribute_tensor(grad, mesh, [Shard(0)])
        params.append(own)
    max_norm = MAX_NORM_SHARE * clip_grad_norm_(params, float("inf")).full_tensor().item()
    torchs = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "l1": L1, "l2": L2, "backend": "cpp"}
    ours = FusedRegAdamW(params, max_grad_norm=max_norm, **options)
    without_clip = FusedRegAdamW(params, **options)

    def clip_and_step() -> None:
        clip_grad_norm_(params, max_norm)
        torchs.step()

    steps = median_seconds({"torch": clip_and_step, "ours": ours.step, "ours, no clip": without_clip.step})
    plans, hyperparameters = ours._plans, ours._hyperparameters
    assert plans is not None
    assert hyperparameters is not None
    one_number = torch.ones(1, dtype=torch.float64)
    parts = median_seconds(
        {
            "all-reduce": lambda: distributed.all_reduce(one_number),
            "check": lambda: plans.follow(ours.param_groups, ours.state, hyperparameters, False, Gradients()),
            "norm": lambda: clip(plans, StepScalars(), max_norm, None),
        }
    )
    return steps | parts


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {name: time_case(shapes) for name, shapes in SHARDED.items()}
    distributed.barrier()
    distributed.destroy_process_group()
    if rank == 0:
        show(found)


def show(found: dict[str, dict[str, float]]) -> None:
    console = Console(width=120)
    console.print(stamp("cpu"))
    headers = [
        "milliseconds",
        "torch: clip, fused",
        "fusedreg, all on",
        "torch / fusedreg",
        "without clip",
        "of it: host's check",
        "norm",
        "its all-reduce",
    ]
    rows = []
    for name, seconds in found.items():
        ms = {part: f"{1e3 * each:.3f}" for part, each in seconds.items()}
        ratio = f"{seconds['torch'] / seconds['ours']:.1f}"
        rows.append(
            [name, ms["torch"], ms["ours"], ratio, ms["ours, no clip"], ms["check"], ms["norm"], ms["all-reduce"]]
        )
    Grid(f"One AdamW step on DTensors, {RANKS} ranks", headers, rows).show(console)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=RANKS, start_method="spawn")


if __name__ == "__main__":
    main()
