"""How long a kernel should take: the slowest of memory, L2 and what the multiprocessors do themselves."""

from __future__ import annotations

from spa_compiler.kernels.cuda.form import LAUNCH_US, Kernel
from spa_compiler.targets.cuda import Architecture

START_US = 1.2
"""For few tokens, from a block's start to its first product, and from its last one to y: two trips to memory, a
barrier."""

TILE_START_US = 1.5
"""For tiles of tokens: pointers, the first stages from L2, the epilogue."""

REACHED = 0.85
"""For few tokens: of memory's rate, and of the multiprocessors' cycles."""

CLOCK_GHZ = 1.7


def microseconds(arch: Architecture, grid: tuple[int, int, int], read: float, shared: float, cycles: float) -> float:
    """Of a launch for few tokens that reads `read` bytes from memory, and whose blocks fetch `shared` bytes each from
    L2 besides their part of `read`, and keep a multiprocessor busy for `cycles` each."""
    blocks = grid[0] * grid[1] * grid[2]
    rounds = -(-blocks // arch.sms)  # of the multiprocessor that has the most
    memory = read / (arch.dram_gb_s * REACHED) / 1e3
    # L2 serves all, and the one with the most blocks no faster than its share
    cache = max(blocks, rounds * arch.sms) * (shared + read * grid[0] / blocks) / arch.l2_gb_s / 1e3
    own = rounds * cycles / (CLOCK_GHZ * REACHED) / 1e3
    return LAUNCH_US + START_US + max(memory, cache, own)


def in_waves(
    arch: Architecture,
    kernel: Kernel,
    grid: tuple[int, int, int],
    *,
    operations: float,
    rate: float,
    l2: float,
    dram: float,
    latency: float,
    shared: float = 0.0,
) -> float:
    """Microseconds of a launch of tiles on tensor cores, in whole waves of thread blocks.

    Args:
        operations: of all thread blocks, of which tensor cores do `rate` a microsecond.
        l2, dram: bytes that all of them take from L2, and from memory.
        latency: microseconds of the thread block that has most stages, once the first one is there.
        shared: bytes that all of them move into and out of shared memory, where that may be what takes longest: 128 in
            a cycle of each multiprocessor.
    """
    thread_blocks = grid[0] * grid[1] * grid[2]
    resident = max(1, min(arch.shared_per_sm // (kernel.shared_bytes + arch.shared_reserved), kernel.min_blocks))
    slots = arch.sms * resident
    waves = -(-thread_blocks // slots)
    idle = waves * slots / thread_blocks  # the last wave takes as long as a full one
    return LAUNCH_US + max(
        idle * operations / rate,
        idle * l2 / (arch.l2_gb_s * 1e3),
        idle * shared / (arch.sms * 128 * CLOCK_GHZ * REACHED * 1e3),
        dram / (arch.dram_gb_s * 0.9e3),
        waves * (TILE_START_US + latency),
    )
