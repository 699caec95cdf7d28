"""From which share of zeros on a Linear layer is faster in compressed sparse rows, on this machine.

Run it with ``python benchmarks/sparse_linear.py`` on a machine that does nothing else. For each shape and batch it
prints the dense layer's time over that of ``fusedreg.to_sparse``, at several shares of scattered zeros: above 1, CSR is
faster. The last column is the first of these shares from which on it is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import fusedreg

SHAPES = ((256, 256), (1024, 1024), (4096, 4096))
BATCHES = (1, 16, 256)
SHARES = (0.8, 0.9, 0.95, 0.98, 0.99)


def median_ratio(some: Callable[[], Tensor], others: Callable[[], Tensor], rounds: int) -> float:
    """The median time of the first over that of the second, taken in turns."""
    times: list[list[float]] = [[], []]
    for i in range(rounds + 2):
        for action, samples in zip((some, others), times, strict=True):
            start = time.perf_counter()
            action()
            if i >= 2:
                samples.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def make_layer(outputs: int, inputs: int, share: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight[torch.rand(outputs, inputs) < share] = 0
    return layer


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="of timing (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; dense time / CSR time")
    print(f"{'layer':>12} {'batch':>6}", *(f"{share:>7.0%}" for share in SHARES), "  CSR wins from")
    for outputs, inputs in SHAPES:
        for batch in BATCHES:
            x = torch.randn(batch, inputs)
            ratios = []
            for share in SHARES:
                dense = make_layer(outputs, inputs, share)
                sparse = fusedreg.to_sparse(dense, zeros=0.0)
                ratios.append(median_ratio(partial(dense, x), partial(sparse, x), arguments.rounds))
            wins = [i for i in range(len(SHARES)) if min(ratios[i:]) > 1]
            first = f"{SHARES[wins[0]]:.0%}" if wins else "nowhere here"
            print(
                f"{outputs:>6}x{inputs:<5} {batch:>6}",
                *(f"{ratio:>7.2f}" for ratio in ratios),
                f"  {first}",
                flush=True,
            )


if __name__ == "__main__":
    main()
