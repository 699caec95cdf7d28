"""What share of a GPU's copy bandwidth a kernel's loop should reach, from its machine code: a prediction, to be held
against the first measurement. docs/cuda.md gives the numbers and their sources.

Of each multiprocessor, the resident warps go round between three stations: the latency of memory, which all wait for
at once; the multiprocessor's share of the bandwidth, one after the other; and its pipes, of which the busiest counts,
one after the other too. Mean value analysis of that closed network gives the throughput (Reiser and Lavenberg,
https://doi.org/10.1145/322186.322195). It takes service times to vary as much as exponential ones do, so that queues
run empty more often than they really should.
"""

from __future__ import annotations

from typing import NamedTuple

from machine_code import LOAD, STORE, Loop


class Gpu(NamedTuple):
    bandwidth: float
    """Bytes a second, read and written, of a large copy."""
    multiprocessors: int = 132
    clock: float = 1.7e9
    latency: float = 800e-9
    """Of a load under load: twice what pointer chasing shows."""
    pipes_in_use: float = 0.85
    """The part of its slots that a pipe can fill, where nothing but other instructions is in the way."""


H100, H200 = Gpu(bandwidth=3.0e12), Gpu(bandwidth=4.3e12)

# Lanes for each clock of a multiprocessor of compute capability 9.0, and what runs there. Conversions to double are
# slower than the pipe that they share with MUFU is otherwise.
PIPES = {
    128: r"FMUL|FFMA|FADD|IMAD",
    64: r"FSETP|FSEL|FMNMX|LOP3|IADD|VIADD|ISETP|SHF|PRMT|SEL|LEA|F2FP|DFMA|DADD|DMUL|DSETP",
    16: r"MUFU|F2F\b|F2F\.",
}
LANES = 32


def clocks(loop: Loop) -> float:
    """Of a multiprocessor, for a warp's way round, on its busiest pipe. What is there for memory that is not aligned
    counts as if it were executed, but for the loads and stores themselves."""
    narrow = loop.count(r"(?:LDG|STG)\.E") - loop.count(LOAD) - loop.count(STORE)
    issued = (loop.count() - narrow) * LANES / 128
    shared_memory = loop.count("LDS") + 4 * (loop.count(LOAD) + loop.count(STORE))  # 128 bytes a clock
    return max(issued, shared_memory, *(loop.count(names) * LANES / lanes for lanes, names in PIPES.items()))


def share_of_bandwidth(loop: Loop, registers: int, gpu: Gpu) -> float:
    """For whole chunks, where memory is aligned."""
    warps = 8 * min(65536 // (256 * -(-registers // 8) * 8), 8)  # of 256 threads a block
    bytes_moved = 16 * LANES * (loop.count(LOAD) + loop.count(STORE))
    demands = (
        bytes_moved * gpu.multiprocessors / gpu.bandwidth,
        clocks(loop) / (gpu.clock * gpu.pipes_in_use),
    )
    queues = [0.0, 0.0]
    throughput = 0.0
    for population in range(1, warps + 1):
        times = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        throughput = population / (gpu.latency + sum(times))
        queues = [throughput * time for time in times]
    return throughput * demands[0]
