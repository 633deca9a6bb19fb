"""R x 1 blocks: R consecutive output rows share their input columns. R = 1 is unstructured sparsity.

    W [n, k]        rows 0..R-1     . a . . b .       one group: columns [1, 4]
                                    . c . . d .                  values  [[a, c, ..], [b, d, ..]]   (column-major)
                    rows R..2R-1    e . . . . .       next group ...

    chunk           consecutive rows, computed as one work item; its accumulators stay in L2
    k_block         consecutive columns, so that the panel's part stays in L1 (R = 1 alone needs it)
    tile            chunk x k_block. Tiles are stored chunk by chunk, within a chunk block by block

    indptr  int32  [groups of all tiles + 1]   where a group's entries begin; increasing over all tiles
    order   int32  [groups of all tiles]       a group's place in its chunk; groups of a tile are sorted by their number
                                               of entries, so that trip counts are predictable
    columns uint16 [entries]                   column within its k_block
    values  f32    [entries, R]
    bias    f32    [groups x R]

n is padded with zero rows to a multiple of R; the last chunk and the last block may be short. References: 1x1 SpMM of
arXiv 1911.09723; 4 x 1 blocks of arXiv 2306.16601.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels import sums
from spa_compiler.kernels.form import tiled

F32 = NDArray[np.float32]

BLOCK_ROWS = (1, 4, 8, 16)
PRUNED_ROWS = (2, 6)  # the fastest for weights that were pruned in them, and for no others
ARRAYS = ("indptr", "order", "columns", "values", "bias")
MAX_CHUNK = 256  # rows; with 64 lanes its accumulators are 64 KiB, the most a pool thread's stack is asked for

CHUNK_STEP = 16  # a whole cache line of outputs; a chunk is a multiple of R besides
SMALL = 64  # fewer rows are one chunk
L1_COLUMNS, L2_COLUMNS = 128, 768  # x 64 lanes: 32 KiB and 192 KiB
FULL = 0.9  # of the blocks stored


@dataclass(frozen=True)
class Blocks:
    """The form: R x 1 blocks in tiles of `chunk` x `k_block`, where None is what `default_blocking` says."""

    rows: int  # R
    chunk: int | None = None
    k_block: int | None = None
    windowed: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`block:4x1`, `unstructured`; `block:4x1 in 128x768` with the tile."""
        return tiled(self.pattern, self.chunk, self.k_block)

    @property
    def pattern(self) -> str:
        """`block:Rx1`, for R = 1 `unstructured`."""
        return "unstructured" if self.rows == 1 else f"block:{self.rows}x1"

    @property
    def info(self) -> dict[str, int]:
        """Of `LinearInfo` in region.h."""
        return {}

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of the kernel for tiles of `lanes` tokens."""
        return name(self.rows, lanes, act, window)

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store."""
        return stored_entries(weight, self.rows)

    def cut(self, chunk: int | None, k_block: int | None) -> Blocks:
        """The same blocks in other tiles."""
        return Blocks(self.rows, chunk, k_block)

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias."""
        return pack(weight, None, self.rows, self.chunk, self.k_block)


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] in this format. `entries` counts stored blocks, `fill` the share of non-zeros in them."""

    n: int
    k: int
    rows: int  # R
    chunk: int
    k_block: int
    indptr: NDArray[np.int32]
    order: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: F32
    bias: F32

    @property
    def form(self) -> Blocks:
        """With its tile sizes."""
        return Blocks(self.rows, self.chunk, self.k_block)

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """In the order in which a node takes them."""
        return {what: getattr(self, what) for what in ARRAYS}

    def with_bias(self, bias: F32 | None) -> Packed:
        """The same weight with `bias` [n]; None: zeros."""
        return dataclasses.replace(self, bias=pad_bias(bias, self.n, self.rows))

    @property
    def fill(self) -> float:
        return float(np.count_nonzero(self.values) / self.values.size) if self.values.size else 1.0


def default_blocking(n: int, k: int, rows: int, full: bool = False) -> tuple[int, int]:
    """(chunk, k_block) for 64 lanes.

    R = 1 does one panel load per multiply-add, so a block of the panel must stay in L1; larger R read it from L2. A
    `full` weight (next to no zeros) has so many entries in a block that L1 pays for any R: with R = 4 the kernel then
    runs at the peak of dense products. An even number of equal chunks lets two threads share a single tile of tokens.
    """
    step = math.lcm(CHUNK_STEP, rows)
    chunks = 2 * -(-n // (2 * (MAX_CHUNK // step * step))) if n >= SMALL else 1
    chunk = -(-n // (chunks * step)) * step
    return min(chunk, -(-n // rows) * rows), min(k, L1_COLUMNS if rows == 1 or full else L2_COLUMNS)


def pack(weight: F32, bias: F32 | None, rows: int, chunk: int | None = None, k_block: int | None = None) -> Packed:
    """`weight` [n, k] and `bias` [n] (or None) -> Packed. Exact: nothing but zeros is left out."""
    n, k = weight.shape
    groups = -(-n // rows)
    padded = np.zeros((groups * rows, k), np.float32)
    padded[:n] = weight
    blocks = padded.reshape(groups, rows, k).transpose(0, 2, 1)  # [group, k, R]
    mask = (blocks != 0).any(axis=2)
    default = default_blocking(n, k, rows, full=bool(mask.mean() >= FULL))
    chunk, k_block = chunk or default[0], k_block or default[1]
    counts, order, columns, values, per_chunk = [], [], [], [], chunk // rows
    for first in range(0, groups, per_chunk):
        for k0 in range(0, k, k_block):
            tile = mask[first : first + per_chunk, k0 : k0 + k_block]
            places = np.argsort(tile.sum(axis=1), kind="stable")
            group, column = np.nonzero(tile[places])
            counts.append(np.bincount(group, minlength=len(places)))
            order.append(places)
            columns.append(column)
            values.append(blocks[first + places[group], k0 + column])
    return Packed(
        n,
        k,
        rows,
        chunk,
        k_block,
        np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32),
        np.concatenate(order).astype(np.int32),
        np.concatenate(columns).astype(np.uint16),
        np.ascontiguousarray(np.concatenate(values), np.float32),
        pad_bias(bias, n, rows),
    )


def pad_bias(bias: F32 | None, n: int, rows: int) -> F32:
    """`bias` [n] (None: zeros), as long as the groups of R rows."""
    padded = np.zeros(-(-n // rows) * rows, np.float32)
    if bias is not None:
        padded[:n] = bias
    return padded


def unpack(packed: Packed) -> F32:
    """The dense weight [n, k]."""
    dense = np.zeros((len(packed.bias), packed.k), np.float32)
    per_chunk, entry = packed.chunk // packed.rows, 0
    groups = len(packed.bias) // packed.rows
    for first in range(0, groups, per_chunk):
        for k0 in range(0, packed.k, packed.k_block):
            for _ in range(min(per_chunk, groups - first)):
                row = (first + int(packed.order[entry])) * packed.rows
                for j in range(packed.indptr[entry], packed.indptr[entry + 1]):
                    dense[row : row + packed.rows, k0 + int(packed.columns[j])] = packed.values[j]
                entry += 1
    return dense[: packed.n]


def stored_entries(weight: F32, rows: int) -> int:
    """Floats that `pack` would store, without packing: what the time depends on."""
    n, k = weight.shape
    padded = np.zeros((-(-n // rows) * rows, k), bool)
    padded[:n] = weight != 0
    return int(padded.reshape(-1, rows, k).any(axis=1).sum()) * rows


def reference(
    panel: F32, packed: Packed, residual: F32 | None = None, act: str = "none", low: float = 0.0, high: float = 0.0
) -> F32:
    """What the kernel computes on a panel tile [k, lanes], in float64: [n, lanes]."""
    return sums.reference(unpack(packed), packed.bias, panel, residual, act, low, high)


def name(rows: int, lanes: int, act: str, window: bool = False, pitched: bool = False) -> str:
    return f"spa_rx1{'p' if pitched else 'w' if window else ''}_{rows}_{lanes}_{act}"
