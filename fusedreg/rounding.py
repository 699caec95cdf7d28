"""Stochastic rounding to bfloat16 and to codes: the random bits of a step, and, for the oracle, what is made of them.

A number is rounded up with the probability of what is lost by rounding it down, so that the mean of many roundings is
the number itself: Gupta et al., "Deep Learning with Limited Numerical Precision", https://arxiv.org/abs/1502.02551.

The bits are a function of ``rounding_seed``, of the parameter's number in its optimizer, of the stream (the weights, a
state), and of the element's position in the whole parameter, counted row by row. They are the same for any number of
threads, backend, layout in memory and sharding, and on every rank. csrc/maths/rounding.h has the same function.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codes import DTYPES
from .memory import local, offsets_of

# The streams: the weights, the weights that stage 7 stores once more, and the states, in their rule's order.
WEIGHTS, WEIGHTS_OF_UNITS, FIRST_STATE = range(3)

_BITS_32 = (1 << 32) - 1
# The seed is a Weyl sequence, as in Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", with the
# golden ratio's bits; of 63 bits, for whoever stores it as an int64.
_SEED_BITS = 63
_SEED_STEP = 0x1E3779B97F4A7C15


def are_rounded(dtypes: set[torch.dtype]) -> bool:
    """Whether stochastic rounding acts on one of them."""
    return not dtypes.isdisjoint((torch.bfloat16, *DTYPES))


def hash32(x: int) -> int:
    """C. Wellons' lowbias32, a permutation of 32 bits. https://nullprogram.com/blog/2018/07/31/"""
    x ^= x >> 16
    x = x * 0x7FEB352D & _BITS_32
    x ^= x >> 15
    x = x * 0x846CA68B & _BITS_32
    return x ^ x >> 16


def key_of(key: int, part: int) -> int:
    """The key of a part of what ``key`` is of, by the part's number."""
    return hash32(((key ^ part) + 0x9E3779B9) & _BITS_32)


def key_of_step(seed: int) -> int:
    """Of a group, for the step that its seed is of."""
    return key_of(key_of(0, seed & _BITS_32), seed >> 32)


def next_seed(seed: int) -> int:
    """The seed of the step after."""
    return (seed + _SEED_STEP) % (1 << _SEED_BITS)


class Place(NamedTuple):
    """What random bits are a function of, beside the step."""

    number: int
    """Of the parameter, among all of its optimizer."""
    first: int
    """The position of this process's first element in the whole parameter."""
    strides: tuple[int, ...]
    """How far apart the positions of neighbours are, for each dimension."""

    def positions(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Those of all elements that this process holds: int64, of ``shape``."""
        positions = torch.full(shape, self.first, dtype=torch.int64, device=device)
        for dim, stride in enumerate(self.strides):
            along = torch.arange(shape[dim], dtype=torch.int64, device=device) * stride
            positions += along.view(-1, *[1] * (len(shape) - dim - 1))
        return positions


def place_of(param: Any, number: int) -> Place:
    strides = tuple(math.prod(param.shape[dim + 1 :]) for dim in range(param.ndim))
    first = sum(offset * stride for offset, stride in zip(offsets_of(param), strides, strict=True))
    return Place(number, first, strides)


def _times(x: Tensor, factor: int) -> Tensor:
    """Modulo 2^32, by halves: the product of two numbers of 32 bits is too wide for an int64."""
    return ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & _BITS_32


def random_bits(positions: Tensor, key: int) -> Tensor:
    """16 bits for each element, as int64."""
    x = (positions & _BITS_32) ^ key
    x = _times(x ^ x >> 16, 0x7FEB352D)
    x = _times(x ^ x >> 15, 0x846CA68B)
    return x >> 16  # what the hash's last step leaves alone


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """Numbers as bfloat16, of which those that are none of bfloat16 are rounded up or down by 16 random bits.

    What bfloat16 holds exactly stays, zeros too. NaN stays NaN. A finite number stays finite: where up is infinity, it
    is rounded down. float64 is first rounded to float32, to the nearest.
    """
    x = x.float().contiguous()
    bits = x.view(torch.int32)
    up = (bits & 0x7FFFFFFF).to(torch.int64) + random
    # A float whose lower half is zero converts exactly.
    rounded = torch.where(up < 0x7F800000, up & 0x7FFF0000, (bits & 0x7FFF0000).to(torch.int64)).to(torch.int32)
    rounded = rounded.view(torch.float32).copysign(x)
    return torch.where(x.isnan(), torch.nan, rounded).to(torch.bfloat16)


def bits_of_stream(param: Tensor, place: Place, key: int, stream: int) -> Tensor:
    """The random bits that a stream of a parameter is rounded by.

    Args:
        key: of the step.
    """
    positions = place.positions(local(param).shape, local(param).device)
    return random_bits(positions, key_of(key_of(key, place.number), stream))
