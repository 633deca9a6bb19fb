"""Columns of R outputs, R = 8 or 16, on tensor cores: at each input, R outputs that follow each other keep all or none.

    W [n, k], R = 2    a . b . . c     group 0     columns 0 2 5     a b c     a dense product of R outputs and those
                       d . e . . f                                   d e f     inputs that the group has
                       . g . . h .     group 1     columns 1 4       g h
                       . i . . j .                                   i j

    group   R outputs; a *piece* is 32 outputs, 4 or 2 groups: those of a warp
    slab    64 inputs (fp32: 32); they come into shared memory together, for all outputs of a thread block
    step    16 columns (fp32: 8) of a group, what `mma` multiplies at a time. It is multiplied with its slab, and its
            columns lie there or in the seven slabs before, which are kept

    order   int32  [2 pieces]                   the 16 outputs that each half of a piece is; past the last of n: none
    ends    int32  [pieces slabs (32 / R) + 1]  where the steps of a group in a slab begin, by pieces, slabs, groups
    columns uint16 [steps, 16] (fp32: 8)        counted from the first input that a step of this slab may have
    values  uint16 [steps, 16 R]                as the registers of `mma` want them, see below
            float32 [steps, 8 R] for fp32, rounded to TF32

Columns that a step lacks are one of its own again, with zeros: whatever lies in other columns stays out of the sums.

`ldmatrix` transposes 8 inputs x 8 tokens whose lines may be anywhere: a line is an input, along it lie tokens. So the
instruction that loads a dense operand gathers columns as well. It takes one pass if its 8 lines are in different banks,
that is if the columns of each half of a step differ modulo 8 (fp32, loaded word by word: 4 columns modulo 4). So they
may wait: some are left over in each slab, and those come into a step that suit each other. At 90 % zeros a step is 96 %
full, and its halves take 1.5 passes each instead of 2.6. In `planes` lines come as they lie in memory. In `rows` a slab
comes as lines of tokens, and those of 16 bits are transposed once, from shared memory to shared memory, for all outputs
of the thread block.

Lane 4 g + t of a warp finds its words of a step behind each other, where a word is two numbers of 16 bits or one of 32:
R = 8: (row g, t), (row g, t + 4); R = 16: (row g, t), (row g + 8, t), (row g, t + 4), (row g + 8, t + 4), word t being
columns 2 t and 2 t + 1 (fp32: column t). 8 outputs are the short side of `mma`, so tokens are the long one.

Outputs stay where they are if every piece has about the same to do. If not, each gets one of the 16 outputs that have
most and one of those that have least.

What bounds it, for each input, where a thread block has 512 outputs x 64 tokens and p is the density: from L2 come 128
bytes of activations and 512 p 2.3 of weights. Shared memory gives 512 p / R lines of 128 bytes, 1.5 times, takes and
gives the weights, and in `rows` moves activations three times. Tensor cores have 2 512 64 p operations. On an H200, at
90 % zeros, these are 10 cycles of a multiprocessor for L2, 17 (R = 8) or 11 (R = 16) for shared memory, 3 for tensor
cores; cuBLAS takes 20. So unlike larger blocks it is bound by shared memory, and with thousands of tokens it pays there
from some 85 % (R = 16) or 92 % (R = 8) on; on an A100, whose tensor cores do a third, from 65 and 75 %. None of this is
measured.

References: Chen et al., Efficient Tensor Core-Based GPU Kernels for Structured Sparsity under Reduced Precision, SC21
(columns of outputs as the unit of zeros, dense products of them by a warp); Castro et al., Probing the Efficacy of
Hardware-Aware Weight Pruning to Optimize the SpMM Routine on Ampere GPUs (CLASP), PACT 2022 (8 outputs as the short
side of `mma`). There activations are gathered from global memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels.cuda.arrays import Array, Below, Extent, Offsets, Permutation
from spa_compiler.kernels.cuda.form import (
    F32,
    Arrays,
    Dtype,
    Epilogue,
    Form,
    Kernel,
    Layout,
    from_bits,
    tf32,
    to_bits,
)
from spa_compiler.kernels.cuda.roofline import in_waves
from spa_compiler.kernels.cuda.strips import rank_of
from spa_compiler.kernels.cuda.sums import Tile
from spa_compiler.kernels.cuda.vector_products import BACK, PIECE, script, shared_bytes, slab_of, step_of, transposed
from spa_compiler.targets.cuda import Architecture

SIZES = (16, 8)
ARRAYS = ("order", "ends", "columns", "values")
UNIT = 16
"""Outputs that are moved together: 32 bytes of y."""
UNEVEN = 1.25
"""What the piece with most to do may have, as a multiple of the average, before outputs are moved."""

TILES = (
    Tile(512, 64, 16, 1, 2),
    Tile(256, 64, 8, 1, 2, 2),
    Tile(256, 32, 8, 1, 2, 2),
    Tile(128, 32, 4, 1, 3, 4),
    Tile(64, 32, 2, 1, 3, 6),
)
"""By shrinking: large ones move fewer bytes, small ones give small layers enough thread blocks."""


@dataclass(frozen=True)
class Vectors:
    """The form: columns of `size` outputs."""

    size: int
    rather: ClassVar[Form | None] = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"there are no kernels for columns of {self.size}")

    @property
    def name(self) -> str:
        """`block:8x1`."""
        return f"block:{self.size}x1"

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ARRAYS

    @property
    def per_piece(self) -> int:
        """Groups of a piece."""
        return PIECE // self.size

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """See `arrays.py`."""
        steps, units = Extent(count="steps"), Extent(times=PIECE // UNIT, rows=PIECE)
        ends = Extent(times=self.per_piece, rows=PIECE, columns=slab_of(dtype), plus=1)
        wide = dtype == "fp32"
        return (
            Array("order", "int32", (units,), Permutation(units)),
            Array("ends", "int32", (ends,), Offsets(steps)),
            Array("columns", "uint16", (steps, Extent(step_of(dtype))), Below(Extent((BACK + 1) * slab_of(dtype)))),
            Array("values", "float32" if wide else "uint16", (steps, Extent(step_of(dtype) * self.size))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """Share of columns of R outputs with a nonzero."""
        if 0 in weight.shape:
            return 0.0
        some = np.add.reduceat(weight != 0, np.arange(0, len(weight), self.size), axis=0, dtype=np.int32)
        return float(np.count_nonzero(some) / some.size)

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> arrays; n and k may be anything, edges are filled with zeros.

        Raises:
            ValueError: the weight has no row or no column.
        """
        if 0 in weight.shape:
            raise ValueError(f"a weight of {weight.shape} has nothing to multiply")
        n, k = weight.shape
        pieces, slab, width = -(-n // PIECE), slab_of(dtype), step_of(dtype)
        padded = np.zeros((pieces * PIECE, k), np.float32)
        padded[:n] = weight
        groups = padded.reshape(-1, self.size, k)
        there = (groups != 0).any(axis=1)
        per_unit = UNIT // self.size
        order = _order(there.sum(axis=1).reshape(-1, per_unit).sum(axis=1))
        places = (order[:, None] * per_unit + np.arange(per_unit)).reshape(-1)
        slabs, half = -(-k // slab), width // 2
        group, column = np.nonzero(there[places])
        sorted_ = np.lexsort((column, column % half, group))
        group, column = group[sorted_], column[sorted_]
        cell = (group * half + column % half) * slabs + column // slab
        counts = np.bincount(cell, minlength=len(groups) * half * slabs).reshape(len(groups), half, slabs)
        taken, steps = _steps(counts, width)
        if not steps.any():
            steps[-1, -1] = 1  # no model has an empty initializer
        # [pieces, slabs, groups of a piece]
        cells = np.arange(len(groups) * slabs).reshape(pieces, slabs, self.per_piece)
        own = cells.transpose(0, 2, 1).reshape(-1)  # by groups, slabs
        ends = np.zeros(cells.size + 1, np.int64)
        ends[1 + own] = steps.reshape(-1)
        ends = np.cumsum(ends)
        cell = np.repeat(np.arange(taken.size), taken.reshape(-1))
        dealt, cell = _dealt(cell // slabs, cell % slabs, half, slabs)
        group, column = group[dealt], column[dealt]
        place = ends[own[cell]] * width + rank_of(cell)
        columns = np.full((ends[-1] * 2, half), -1)
        columns.reshape(-1)[place] = column - (cell % slabs - BACK) * slab
        # What a half lacks is its first column again, or that of the step's other half.
        first = columns[:, :1].reshape(-1, 2)
        first = np.where(first < 0, np.where(first[:, :1] < 0, BACK * slab, first[:, :1]), first).reshape(-1, 1)
        values = np.zeros((ends[-1] * width, self.size), np.float32)
        values[place] = groups[places[group], :, column]
        return {
            "order": order.astype(np.int32),
            "ends": ends.astype(np.int32),
            "columns": np.where(columns < 0, first, columns).astype(np.uint16).reshape(-1, width),
            "values": _to_fragments(values.reshape(-1, width, self.size), dtype),
        }

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The weight [n, k] again, rounded to `dtype`, for fp32 to TF32."""
        pieces, slabs, slab = -(-n // PIECE), -(-k // slab_of(dtype)), slab_of(dtype)
        values = _from_fragments(arrays["values"], self.size, dtype)
        step, place = np.nonzero(values.any(axis=2))
        cells = np.repeat(np.arange(len(arrays["ends"]) - 1), np.diff(arrays["ends"]))[step]
        piece, own, group = cells // (slabs * self.per_piece), cells // self.per_piece % slabs, cells % self.per_piece
        group = (piece * self.per_piece + group) * self.size
        row = arrays["order"][group // UNIT] * UNIT + group % UNIT
        weight = np.zeros((pieces * PIECE, k), np.float32)
        column = arrays["columns"][step, place].astype(np.int64) + (own - BACK) * slab
        weight[row[:, None] + np.arange(self.size), column[:, None]] = values[step, place]
        return weight[:n]

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """Those whose tokens do not exceed what there is to do by more than half."""
        made = [kernel(self.size, tile, dtype, layout, epilogue) for tile in TILES]
        return [k for k in made if k.fits(arch) and k.tile_tokens <= max(32, 2 * tokens)]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """A roofline of five: tensor cores, L2, shared memory, memory, and the latency of the piece that has most to
        do; in whole waves.

            tensor cores    2 R tokens for each column of a step
            L2              activations once for each tile of outputs, weights once for each tile of tokens
            shared memory   lines of a step's columns, `_BANKS` times; a step's own bytes in and out; activations once,
                            or three times where they are transposed. 128 bytes a cycle and multiprocessor
            latency         barriers of slabs, steps of a warp one after the other
        """
        dtype: Dtype = "fp16" if arrays["values"].dtype == np.uint16 else "fp32"
        layout: Layout = "planes" if "_planes_" in kernel.name else "rows"
        width = 2 if dtype == "fp16" else 4
        grid = kernel.grid(n, tokens, batch)
        tiles, slabs = grid[0] * batch, -(-k // slab_of(dtype))
        columns, stored = len(arrays["values"]) * step_of(dtype), sum(a.nbytes for a in arrays.values())
        line = kernel.tile_tokens * width
        activations = tiles * grid[1] * k * line
        longest = int(np.diff(arrays["ends"][:: slabs * self.per_piece]).max(initial=0))
        return in_waves(
            arch,
            kernel,
            grid,
            operations=2.0 * tiles * columns * self.size * kernel.tile_tokens,
            rate=arch.tflops(dtype) * 0.85e6,
            l2=activations + tiles * stored + 2 * n * tokens * batch * width,
            dram=stored + width * (k + n) * tokens * batch,
            latency=slabs * _SLAB_US + longest * _STEP_US,
            shared=_BANKS * tiles * columns * line
            + 2 * tiles * stored
            + (3 if transposed(dtype, layout) else 1) * activations,
        )


_BANKS = 1.5  # passes of a gathered line: 1.7 at 95 % zeros, 1.5 at 90 %, 1.4 at 80 %
_SLAB_US = 0.12  # of a slab whose data are there: a barrier, copies that begin, a transposition
_STEP_US = 0.07  # of a step: column, line, operand, product, each waiting for the one before


def kernel(size: int, tile: Tile, dtype: Dtype, layout: Layout, epilogue: Epilogue) -> Kernel:
    """One variant: columns of `size` in a tile."""
    return Kernel(
        f"spa_vectors{size}_{tile}_{dtype}_{layout}_{epilogue}",
        functools.partial(script, size, tile, dtype, layout, epilogue),
        threads=tile.threads,
        tile_rows=tile.group,
        tile_tokens=tile.tokens,
        shared_bytes=shared_bytes(size, tile, dtype, layout),
        min_blocks=tile.min_blocks,
    )


def _order(work: NDArray[np.int64]) -> NDArray[np.int64]:
    """Units of 16 outputs in the order of places, two a piece: as they are, or those with most beside those with
    least."""
    pieces = work.reshape(-1, 2).sum(axis=1)
    if pieces.max() * len(pieces) <= UNEVEN * pieces.sum():
        return np.arange(len(work))
    falling = np.argsort(-work, kind="stable")
    return np.stack([falling[: len(pieces)], falling[: len(pieces) - 1 : -1]], axis=1).reshape(-1)


def _dealt(
    remainder: NDArray[np.int64], slab: NDArray[np.int64], half: int, slabs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An order of columns by cells in which few of the same remainder are in one half of a step, and their cells.

    First one of each remainder, then a second one of each that has another, and so on, the most frequent ones first.

    Args:
        remainder: of each column, group x half + remainder. slab: that it is multiplied in. Columns come by remainders,
        then slabs.
    """
    own = remainder * slabs + slab  # in order
    turn, count = rank_of(own), np.bincount(own)[own]
    cell = remainder // half * slabs + slab
    order = np.lexsort((remainder, -count, turn, cell))
    return order, cell[order]


def _steps(counts: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many columns of each group and each remainder are multiplied in which slab, and in how many steps: two
    arrays, [groups, remainders, slabs] as `counts`, and [groups, slabs].

    A column may wait for `BACK` slabs. Steps are full unless some cannot wait, and about a step's columns are left, so
    that there is a choice: of those that can wait, so many of each remainder are taken that the most frequent one is as
    rare as it can be.
    """
    groups, remainders, slabs = counts.shape
    taken, steps = np.zeros_like(counts), np.zeros((groups, slabs), np.int64)
    so_far = np.zeros((groups, remainders, BACK + slabs + 1), np.int64)
    so_far[:, :, BACK + 1 :] = np.cumsum(counts, axis=2)
    before = np.zeros((groups, remainders), np.int64)
    for slab in range(slabs):
        there, must = so_far[:, :, slab + BACK + 1] - before, np.maximum(so_far[:, :, slab + 1] - before, 0)
        waiting = there.sum(axis=1)
        if slab == slabs - 1:
            steps[:, slab] = -(-waiting // width)
        else:
            steps[:, slab] = np.maximum(-(-must.sum(axis=1) // width), (waiting - width) // width)
        want = np.minimum(waiting, steps[:, slab] * width)
        # The lowest level that gives enough; what it gives too much is taken back where the least is left.
        levels = np.arange(there.max(initial=0) + 1)[:, None, None]
        given = np.clip(levels, must, there)
        level = np.argmax(given.sum(axis=2) >= want, axis=0)
        own = given[level, np.arange(groups)]
        can = (own == level[:, None]) & (own > must)
        least = np.argsort(np.where(can, there, there.max(initial=0) + 1), axis=1, kind="stable")
        many = np.arange(remainders) < (own.sum(axis=1) - want)[:, None]
        np.put_along_axis(own, least, np.take_along_axis(own, least, axis=1) - many, axis=1)
        taken[:, :, slab] = own
        before += own
    return taken, steps


def _to_fragments(values: F32, dtype: Dtype) -> NDArray[Any]:
    """[steps, columns, R] -> [steps, columns x R] in the order that the registers of `mma` want."""
    steps, width, size = values.shape
    pair = width // 8
    # [step, half, t, number of a word, eight outputs, g]
    cut = values.reshape(steps, 2, 4, pair, size // 8, 8)
    words = cut.transpose(0, 5, 2, 1, 4, 3).reshape(steps, width * size)
    return to_bits(tf32(words) if dtype == "fp32" else words, dtype)


def _from_fragments(words: NDArray[Any], size: int, dtype: Dtype) -> F32:
    pair = 1 if dtype == "fp32" else 2
    cut = from_bits(words, dtype).reshape(len(words), 8, 4, 2, size // 8, pair)
    return cut.transpose(0, 3, 2, 5, 4, 1).reshape(len(words), 8 * pair, size)
