"""More than 2**31 elements in one tensor: no index, count or sum is 32 bits wide. Slow: it takes 9 GiB."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import FusedRegSGD

NUMEL = 2**31 + 32_769 + 5  # past 2**31, the last chunk is a full one and then five elements
# The first and the last elements, and those on either side of 2**30, of 2**31 and of the next chunks' borders
BORDERS = (2**30, 2**31 - 32_768, 2**31, 2**31 + 32_768)
SPOTS = sorted({0, 1, *(border - 1 for border in BORDERS), *BORDERS, 2**31 + 1, NUMEL - 2, NUMEL - 1})


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_elements() -> None:
    if not Path("/proc/meminfo").exists() or available_gib() < 11:
        pytest.skip("needs 11 GiB of free memory")
    weight = torch.ones(NUMEL, dtype=torch.bfloat16)
    gradient = torch.full((NUMEL,), 0.5, dtype=torch.bfloat16)
    for i, spot in enumerate(SPOTS):
        weight[spot], gradient[spot] = 2.0 + i, 4.0 + i
    weight.requires_grad_()
    weight.grad = gradient
    # 0.25 * gradient, and the prox's 0.125
    optimizer = FusedRegSGD([weight], lr=0.25, l1=0.5, max_grad_norm=math.inf, backend="cpp")
    optimizer.step()

    squares = 0.25 * (NUMEL - len(SPOTS)) + sum((4.0 + i) ** 2 for i in range(len(SPOTS)))
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(squares), rel=1e-7)  # it is a float32
    weight = weight.detach()
    for i, spot in enumerate(SPOTS):
        assert weight[spot] == 2.0 + i - 0.25 * (4.0 + i) - 0.125, f"element {spot}"
        weight[spot] = 0.75
    for piece in weight.split(2**28):
        assert (piece == 0.75).all()
    for i, spot in enumerate(SPOTS):
        assert gradient[spot] == 4.0 + i
