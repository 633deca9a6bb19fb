"""Blocks of 16 x 16, 32 x 32 or 64 x 64 on tensor cores.

    W [n, k]      block row 0   . A . B      a group of two block rows:     columns   0    1    2    3
                  block row 1   C . D .                                     masks     10   01   10   01   bit u: block
                  row u block row 2   . . E .                                     values    C    A    D    B
                  block row 3   . F E .

Block rows are permuted so that those of a *group* have columns in common, and a thread block multiplies a group with a
tile of tokens: activations of a column are fetched once for all block rows of the group that have it.

    indptr  int32  [groups + 1]        a group's stages: `per_stage` columns each, the last filled up with empty ones
    order   int32  [groups U]          block row that each place of a group holds; past the last of n: none
    columns int32  [stages per_stage]  in blocks
    firsts  int32  [stages per_stage + 1]   each column's first block of `values`
    masks   uint32 [stages per_stage]  which places of the group have a block in this column
    values  uint16 [blocks, R C] (float32 for fp32, rounded to TF32)   each block as the registers of `mma` want it

A block is cut into 16 rows x 32 bytes, rows first; in such a piece, lane 4 g + t of a warp finds its four words behind
each other: (row g, t), (row g + 8, t), (row g, t + 4), (row g + 8, t + 4), where a word is two numbers of 16 bits or
one of 32. As registers (w0, w1, w2, w3) they are the operand A of outputs x tokens (`planes`), and (w0, w2), (w1, w3)
two operands B of tokens x outputs (`rows`): so that in both layouts a pair of sums lies side by side in memory.

What bounds it. mma.sync gives 613 TFLOP/s on an H200 (62 % of the peak), and 4096^3 at 90 % has to run at some 200
useful TFLOP/s to be three times as fast as cuBLAS. Activations come from L2: a block of C columns meets T tokens, 2 C
T bytes for 2 R C T operations, so one block row alone has R = 32 operations for each byte, and 200 TFLOP/s want 6.3
TB/s, more than L2 is measured to give. With U block rows in a group, at density p, the columns of a group are K (1 -
(1 - p)^U) of K instead of K p U, if chance puts them: at U = 8 and p = 0.1, 1.4 times fewer bytes, at p = 0.2, 1.9
times, and the permutation makes it more. The values are read by each tile of T tokens: T operations for each byte. So
256 outputs x 128 tokens have 33 to 38 at 90 %, where 128 x 256 have 32 and 32 x 256 have 28; sums of 256 x 128 are
half of a multiprocessor's registers.

Reference for permuting rows so that blocks fill: Okanovic et al., High Performance Unstructured SpMM Computation Using
Tensor Cores (SMaT), 2024. There single rows are permuted; here whole block rows, since zeros come in blocks already.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels.cuda.arrays import Array, Below, Extent, Offsets, Permutation
from spa_compiler.kernels.cuda.block_products import script, shared_bytes
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
from spa_compiler.kernels.cuda.sums import Tile
from spa_compiler.targets.cuda import Architecture

SIZES = (16, 32, 64)
GROUPS = (256, 128, 64, 32)
ARRAYS = ("indptr", "order", "columns", "firsts", "masks", "values")


TILES = (
    Tile(256, 128, 2, 4, 4),
    Tile(256, 128, 2, 4, 3),
    Tile(256, 64, 4, 2, 3),
    Tile(128, 128, 2, 4, 4, 2),
    Tile(128, 128, 2, 4, 3, 2),
    Tile(128, 64, 2, 2, 4, 2),
    Tile(64, 128, 1, 4, 4, 2),
    Tile(64, 64, 1, 4, 4, 2),
    Tile(64, 32, 1, 2, 4, 2),
    Tile(32, 64, 1, 4, 4, 4),
    Tile(32, 32, 1, 2, 4, 4),
)
"""By shrinking: large ones move fewer bytes, small ones give small layers enough thread blocks."""


@dataclass(frozen=True)
class Blocks:
    """The form: blocks of size x size, `group` outputs in a thread block."""

    size: int
    group: int
    rather: ClassVar[Form | None] = None

    def __post_init__(self) -> None:
        if self.size not in SIZES or self.group not in GROUPS or self.group < self.size:
            raise ValueError(f"there are no kernels for blocks of {self.size} in groups of {self.group}")

    @property
    def name(self) -> str:
        """`block:32x32 in 256`, where 256 are the outputs of a group."""
        return f"block:{self.size}x{self.size} in {self.group}"

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ARRAYS

    @property
    def per_group(self) -> int:
        """U: block rows of a group."""
        return self.group // self.size

    @property
    def per_stage(self) -> int:
        """Columns of blocks that are fetched and met together."""
        return max(1, 32 // self.size)

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """See `arrays.py`."""
        stages, _groups = Extent(times=self.per_stage, count="stages"), Extent(rows=self.group)
        places = Extent(times=self.per_group, rows=self.group)
        return (
            Array("indptr", "int32", (Extent(rows=self.group, plus=1),), Offsets(Extent(count="stages"))),
            Array("order", "int32", (places,), Permutation(places)),
            Array("columns", "int32", (stages,), Below(Extent(columns=self.size))),
            Array(
                "firsts",
                "int32",
                (Extent(times=self.per_stage, count="stages", plus=1),),
                Offsets(Extent(count="blocks")),
            ),
            Array("masks", "uint32", (stages,)),
            Array("values", _stored(dtype), (Extent(count="blocks"), Extent(self.size**2))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """Share of blocks with a nonzero."""
        rows, columns = (np.arange(0, extent, self.size) for extent in weight.shape)
        if not (len(rows) and len(columns)):
            return 0.0
        some = np.add.reduceat(np.add.reduceat(weight != 0, rows, axis=0, dtype=np.int32), columns, axis=1)
        return float(np.count_nonzero(some) / some.size)

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> arrays; n and k may be anything, edges are filled with zeros.

        Raises:
            ValueError: the weight has no row or no column.
        """
        if 0 in weight.shape:
            raise ValueError(f"a weight of {weight.shape} has nothing to multiply")
        blocks = _cut(weight, self.size)
        there = (blocks != 0).any(axis=(2, 3))
        order = _group(there, self.per_group)
        rows = len(there)
        indptr, columns, masks, sources = [0], [], [], []
        for places in order.reshape(-1, self.per_group):
            real = places[places < rows]
            mask = np.zeros((self.per_group, there.shape[1]), bool)
            mask[places < rows] = there[real]
            met = np.flatnonzero(mask.any(axis=0))
            filled = np.zeros(-(-len(met) // self.per_stage) * self.per_stage, np.int64)
            filled[: len(met)] = met
            bits = (mask[:, met].astype(np.uint64) << np.arange(self.per_group, dtype=np.uint64)[:, None]).sum(axis=0)
            columns.append(filled)
            masks.append(np.concatenate([bits, np.zeros(len(filled) - len(met), np.uint64)]))
            column, place = np.nonzero(mask[:, met].T)
            sources.append(np.stack([places[place], met[column]], axis=1))
            indptr.append(indptr[-1] + len(filled) // self.per_stage)
        masks_ = np.concatenate(masks).astype(np.uint32)
        source = np.concatenate(sources)
        return {
            "indptr": np.asarray(indptr, np.int32),
            "order": order.astype(np.int32),
            "columns": np.concatenate(columns).astype(np.int32),
            "firsts": np.concatenate([[0], np.cumsum(np.bitwise_count(masks_))]).astype(np.int32),
            "masks": masks_,
            "values": _to_fragments(blocks[source[:, 0], source[:, 1]], dtype),
        }

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The weight [n, k] again, rounded to `dtype`, for fp32 to TF32."""
        rows, cols = -(-n // self.size), -(-k // self.size)
        blocks = np.zeros((rows, cols, self.size, self.size), np.float32)
        stored = _from_fragments(arrays["values"], self.size, dtype)
        order = arrays["order"].reshape(-1, self.per_group)
        group = np.repeat(np.arange(len(order)), np.diff(arrays["indptr"]) * self.per_stage)
        entry, place = np.nonzero(arrays["masks"][:, None] >> np.arange(self.per_group, dtype=np.uint32) & 1)
        blocks[order[group[entry], place], arrays["columns"][entry]] = stored
        return blocks.transpose(0, 2, 1, 3).reshape(rows * self.size, cols * self.size)[:n, :k]

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """Those of this group whose tokens do not exceed what there is to do by more than half."""
        made = [kernel(self.size, tile, dtype, layout, epilogue) for tile in TILES if tile.group == self.group]
        least = min((k.tile_tokens for k in made), default=0)
        fitting = [k for k in made if k.fits(arch) and k.tile_tokens <= max(least, 2 * tokens)]
        # Of two that differ in stages alone, the deeper one.
        first: dict[int, Kernel] = {}
        for variant in fitting:
            first.setdefault(variant.tile_tokens, variant)
        return list(first.values())

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """A roofline of four: tensor cores, L2, memory, and the longest group's latency, in whole waves."""
        width = 2 if arrays["values"].dtype == np.uint16 else 4
        blocks, stages = len(arrays["values"]), int(arrays["indptr"][-1])
        grid = kernel.grid(n, tokens, batch)
        tiles = grid[0] * batch
        stage_bytes = self.per_stage * self.size * kernel.tile_tokens * width
        return in_waves(
            arch,
            kernel,
            grid,
            operations=2.0 * blocks * self.size**2 * kernel.tile_tokens * tiles,
            rate=arch.tflops("fp16" if width == 2 else "fp32") * 0.85e6,
            l2=tiles * (stages * stage_bytes + arrays["values"].nbytes) + 2.0 * n * tokens * batch * width,
            dram=arrays["values"].nbytes + width * (k + n) * tokens * batch,
            latency=int(np.diff(arrays["indptr"]).max(initial=0)) * _STAGE_US,
        )


_STAGE_US = 0.06  # of a stage whose data are there: a barrier, a few products


def kernel(size: int, tile: Tile, dtype: Dtype, layout: Layout, epilogue: Epilogue) -> Kernel:
    """One variant: blocks of size x size in a tile."""
    return Kernel(
        f"spa_blocks{size}_{tile}_{dtype}_{layout}_{epilogue}",
        functools.partial(script, size, tile, dtype, layout, epilogue),
        threads=tile.threads,
        tile_rows=tile.group,
        tile_tokens=tile.tokens,
        shared_bytes=shared_bytes(size, tile, dtype, layout),
        min_blocks=tile.min_blocks,
    )


def _stored(dtype: Dtype) -> str:
    return "float32" if dtype == "fp32" else "uint16"


def _cut(weight: F32, size: int) -> F32:
    """[block rows, block columns, size, size], zeros beyond the edges."""
    n, k = weight.shape
    padded = np.zeros((-(-n // size) * size, -(-k // size) * size), np.float32)
    padded[:n, :k] = weight
    return padded.reshape(len(padded) // size, size, -1, size).transpose(0, 2, 1, 3)


def _group(there: NDArray[np.bool_], per_group: int) -> NDArray[np.int64]:
    """An order of the block rows, [groups * per_group], numbers past the last one where a group is not full.

    Greedy: a group begins with the row that has most blocks, and takes the row that adds the fewest columns to it, of
    several the one with most blocks. Groups with most to do come first, so that what is left over at the end is short.
    """
    rows = len(there)
    counts = there.sum(axis=1)
    rest = np.argsort(-counts, kind="stable")
    members = []
    while len(rest):
        chosen = [rest[0]]
        union, rest = there[rest[0]].copy(), rest[1:]
        while len(chosen) < per_group and len(rest):
            # argmax takes the first, and the rest is sorted by counts
            best = int(np.argmax(there[rest][:, union].sum(axis=1) - counts[rest]))
            chosen.append(rest[best])
            union |= there[rest[best]]
            rest = np.delete(rest, best)
        members.append((int(union.sum()), chosen))
    members.sort(key=lambda member: -member[0])
    order = np.arange(-(-rows // per_group) * per_group)
    # Only one group is not full; the numbers that it leaves over are those past the last row.
    beyond = iter(range(rows, len(order)))
    for index, (_, chosen) in enumerate(members):
        places = [*chosen, *(next(beyond) for _ in range(per_group - len(chosen)))]
        order[index * per_group : (index + 1) * per_group] = places
    return order


def _to_fragments(blocks: F32, dtype: Dtype) -> NDArray[Any]:
    """[blocks, size, size] -> [blocks, size * size] in the order that the registers of `mma` want."""
    count, size = len(blocks), blocks.shape[-1]
    pair = 1 if dtype == "fp32" else 2
    # [block, piece of 16 rows, half, g, piece of 32 bytes, half, t, number of a word]
    cut = blocks.reshape(count, size // 16, 2, 8, size // (8 * pair), 2, 4, pair)
    values = cut.transpose(0, 1, 4, 3, 6, 5, 2, 7).reshape(count, size * size)
    return to_bits(tf32(values) if dtype == "fp32" else values, dtype)


def _from_fragments(values: NDArray[Any], size: int, dtype: Dtype) -> F32:
    pair = 1 if dtype == "fp32" else 2
    cut = from_bits(values, dtype).reshape(len(values), size // 16, size // (8 * pair), 8, 4, 2, 2, pair)
    return cut.transpose(0, 1, 6, 3, 2, 5, 4, 7).reshape(len(values), size, size)
