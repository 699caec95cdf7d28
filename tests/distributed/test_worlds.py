"""The harness itself: results come back in order, and whatever goes wrong on a rank is an error here."""

from __future__ import annotations

import os
import time

import pytest
import torch
import worlds
from torch import distributed


def _sum_of_ranks(start: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([start + distributed.get_rank()])
    distributed.all_reduce(total)
    return distributed.get_rank(), total


def _one_raises_and_the_others_wait() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("a reason")
    distributed.barrier()


def _one_dies() -> None:
    if distributed.get_rank() == 1:
        os._exit(3)
    distributed.barrier()


def _one_sleeps() -> None:
    if distributed.get_rank() == 1:
        time.sleep(60)
    distributed.barrier()


def test_results_in_order() -> None:
    results = worlds.run(4, _sum_of_ranks, 10)
    assert [rank for rank, _ in results] == [0, 1, 2, 3]
    assert all(total.tolist() == [46] for _, total in results)


def test_errors_of_a_rank() -> None:
    with pytest.raises(worlds.RankError, match=r"(?s)rank 1 of 2: Traceback.*ValueError: a reason"):
        worlds.run(2, _one_raises_and_the_others_wait)
    with pytest.raises(worlds.RankError, match="rank 1 of 2: died with exit code 3"):
        worlds.run(2, _one_dies)
    with pytest.raises(worlds.RankError, match=r"(?s)rank 1 of 2: did not end in 3 s.*in _one_sleeps"):
        worlds.run(2, _one_sleeps, timeout=3.0)
