"""How long a kernel for few tokens should take: the slowest of memory, L2 and the multiprocessors' own work."""

from __future__ import annotations

from spa_compiler.kernels.cuda.form import LAUNCH_US
from spa_compiler.targets.cuda import Architecture

START_US = 1.2
"""From a block's start to its first product, and from its last one to y: two trips to memory, a barrier."""

REACHED = 0.85
"""Of memory's rate, and of the multiprocessors' cycles."""

CLOCK_GHZ = 1.7


def microseconds(arch: Architecture, grid: tuple[int, int, int], read: float, shared: float, cycles: float) -> float:
    """Of a launch that reads `read` bytes from memory, and whose blocks fetch `shared` bytes each from L2 besides their
    part of `read`, and keep a multiprocessor busy for `cycles` each."""
    blocks = grid[0] * grid[1] * grid[2]
    rounds = -(-blocks // arch.sms)  # of the multiprocessor that has the most
    memory = read / (arch.dram_gb_s * REACHED) / 1e3
    # L2 serves all, and the one with the most blocks no faster than its share
    cache = max(blocks, rounds * arch.sms) * (shared + read * grid[0] / blocks) / arch.l2_gb_s / 1e3
    own = rounds * cycles / (CLOCK_GHZ * REACHED) / 1e3
    return LAUNCH_US + START_US + max(memory, cache, own)
