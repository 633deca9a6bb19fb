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

n is padded with zero rows to a multiple of R; the last chunk and the last block may be short. R x V accumulators (V
registers of tokens) stay in registers for the whole group. References: 1x1 SpMM of arXiv 1911.09723; 4 x 1 blocks of
arXiv 2306.16601.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation, sums
from spa_compiler.kernels.form import tiled
from spa_compiler.kernels.sums import ACCUMULATE, BIAS, RESIDUAL, activate_in_place, add, fma, start
from spa_compiler.kernels.vector import ANY, AVX512, ZMM, Isa, at, const, prefetch, spread, store

F32 = NDArray[np.float32]

BLOCK_ROWS = (1, 4, 8, 16)
PRUNED_ROWS = (2, 6)  # the fastest for weights that were pruned in them, and for no others
ARRAYS = ("indptr", "order", "columns", "values", "bias")
MAX_CHUNK = 256  # rows; with 64 lanes its accumulators are 64 KiB, the most a pool thread's stack is asked for
AHEAD = 2048  # floats of values to prefetch ahead, 8 KiB: 4 to 16 KiB measured alike, 1 KiB is too little

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


def kernel(
    rows: int, lanes: int, act: str, window: bool = False, isa: Isa = AVX512, pitched: bool = False
) -> tirx.PrimFunc:
    """void spa_rx1_<R>_<lanes>_<act>(panel, offsets, indptr, order, columns, values, bias, base, out, groups, mode,
    last, base_pitch, out_pitch, low, high)

    One tile on one panel tile. `panel` points at the k_block's first feature, `indptr` and `order` at the tile's
    first group, `bias`, `base` (the residual) and `out` at the chunk's first row. mode: ACCUMULATE, BIAS or RESIDUAL;
    the activation is applied when `last` is not 0.

    Args:
        window: the tile is part of an image. Column c of the block is not row c of a panel tile, but lies `offsets[c]`
            floats behind `panel` (`kernels/window.py`), and the rows of `base` and `out` are `base_pitch` and
            `out_pitch` floats apart; whole registers of lanes alone. Otherwise these three are not read.
        pitched: the same, where columns are `offsets[0]` floats apart: a multiplication is faster than a table.
    """
    window = window or pitched
    if window and lanes < ZMM:
        raise ValueError(f"a window of {lanes} lanes: whole registers of {ZMM} alone")
    return _one_lane(rows, act, isa) if lanes == 1 else _many_lanes(rows, lanes, act, window, isa, pitched)


def rows_at_once(rows: int, isa: Isa) -> int:
    """Of a group: where registers are few, the sums of 16 rows do not fit, and the group is gone over again."""
    return next(part for part in range(rows, 0, -1) if rows % part == 0 and part + 2 < isa.registers)


def _accumulator_sets(rows: int, vectors: int) -> int:
    """Independent multiply-add chains hide the latency of 4 cycles at 2 a cycle: at least 8 are wanted, but for
    R = 1 more than two sets lose at the short groups that K blocks leave."""
    if rows == 1:
        return {1: 4, 2: 2}.get(vectors, 1)
    return 2 if rows * vectors < 8 else 1


def _place(offsets, column, lanes, window, pitched):
    """Where the activations of a column begin."""
    column = T.Cast("int32", column)
    return column * offsets[0] if pitched else offsets[column] if window else column * lanes


def _position(i, vectors, width, row, lane, pitch):
    """Where sum number `i` of a group belongs, of rows that are `pitch` floats apart."""
    return (row + T.truncdiv(i, vectors)) * pitch + lane + T.truncmod(i, vectors) * width


def _put(regs, i, out, row, lane, pitch, vectors, act, low, high, width, isa):
    """Stores sum number `i` of a group, activated on the way."""
    value = activation.emit(regs[at(i * width, width)], act, low, high, width, isa)
    store(out, value, _position(i, vectors, width, row, lane, pitch), width)


def _many_lanes(R, lanes, act, window, isa, pitched):
    Q = rows_at_once(R, isa)
    W, V, passes = isa.passes(Q, lanes)
    U = _accumulator_sets(Q, V)
    inline_prefetch = R > 1
    short = act in ("relu", "clip")  # an instruction or two, applied on the way out of the registers
    epilogue = act != "none" and not short
    # A long chain of operations wants others beside it. A row by itself has those of the next row, which is short.
    at_end = epilogue and R > 1 and Q * V < 8
    # Of the kind of factor that there are more of one stays in a register, of the other all.
    row_of, vector_of = (
        (lambda i: T.truncdiv(i, V), lambda i: T.truncmod(i, V))
        if Q > V
        else (lambda i: T.truncmod(i, Q), lambda i: T.truncdiv(i, Q))
    )

    @T.prim_func(s_tir=True)
    def rx1(
        p_: T.handle("float32"),
        offsets_: T.handle("int32"),
        indptr_: T.handle("int32"),
        order_: T.handle("int32"),
        columns_: T.handle("uint16"),
        values_: T.handle("float32"),
        bias_: T.handle("float32"),
        base_: T.handle("float32"),
        out_: T.handle("float32"),
        groups: T.int32,
        mode: T.int32,
        last: T.int32,
        base_pitch: T.int32,
        out_pitch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": name(R, lanes, act, window, pitched), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        offsets = T.decl_buffer((ANY,), "int32", data=offsets_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            begin: T.let[T.int32] = indptr[g]
            count: T.let[T.int32] = indptr[g + 1] - begin
            for p in T.serial(R // Q * passes):
                first: T.let[T.int32] = T.truncdiv(p, passes) * Q
                row: T.let[T.int32] = order[g] * R + first
                # only constant indices after unrolling: LLVM keeps `regs` in registers
                regs = T.alloc_buffer((U * Q * V * W,), "float32", scope="local")
                lane: T.let[T.int32] = T.truncmod(p, passes) * (V * W)
                if mode == ACCUMULATE:
                    for r in T.unroll(Q):
                        for v in T.unroll(V):
                            start(
                                regs,
                                (r * V + v) * W,
                                ACCUMULATE,
                                bias,
                                row + r,
                                out,
                                (row + r) * (out_pitch if window else lanes) + lane + v * W,
                                W,
                            )
                elif mode == RESIDUAL:
                    for r in T.unroll(Q):
                        for v in T.unroll(V):
                            start(
                                regs,
                                (r * V + v) * W,
                                RESIDUAL,
                                bias,
                                row + r,
                                base,
                                (row + r) * (base_pitch if window else lanes) + lane + v * W,
                                W,
                            )
                else:
                    for r in T.unroll(Q):
                        for v in T.unroll(V):
                            start(regs, (r * V + v) * W, BIAS, bias, row + r, out, 0, W)
                for i in T.unroll((U - 1) * Q * V):
                    store(regs, const(0.0, W), (Q * V + i) * W, W)
                if not inline_prefetch:
                    for i in T.serial(T.truncdiv(count + 15, 16)):
                        prefetch(values, begin + i * 16 + AHEAD, lanes)
                    for i in T.serial(T.truncdiv(count + 31, 32)):
                        prefetch(columns, begin + i * 32 + AHEAD, lanes)
                for j in T.serial(T.truncdiv(count, U)):
                    if inline_prefetch:
                        prefetch(values, (begin + j * U) * R + AHEAD, lanes)
                        prefetch(columns, begin + j * U + AHEAD // R, lanes)
                    for u in T.unroll(U):
                        for i in T.unroll(Q * V):
                            fma(
                                regs,
                                (u * Q * V + row_of(i) * V + vector_of(i)) * W,
                                spread(values[(begin + j * U + u) * R + first + row_of(i)], W),
                                P[
                                    at(
                                        _place(offsets, columns[begin + j * U + u], lanes, window, pitched)
                                        + lane
                                        + vector_of(i) * W,
                                        W,
                                    )
                                ],
                                W,
                            )
                if U > 1:
                    for j in T.serial(T.truncmod(count, U)):
                        for i in T.unroll(Q * V):
                            fma(
                                regs,
                                (row_of(i) * V + vector_of(i)) * W,
                                spread(values[(begin + count - 1 - j) * R + first + row_of(i)], W),
                                P[
                                    at(
                                        _place(offsets, columns[begin + count - 1 - j], lanes, window, pitched)
                                        + lane
                                        + vector_of(i) * W,
                                        W,
                                    )
                                ],
                                W,
                            )
                    for u in T.unroll(U - 1):
                        for i in T.unroll(Q * V):
                            add(regs, i * W, ((u + 1) * Q * V + i) * W, W)
                if short:  # known while the script is parsed; `last` is not
                    if last != 0:
                        for i in T.unroll(Q * V):
                            _put(regs, i, out, row, lane, out_pitch if window else lanes, V, act, low, high, W, isa)
                    else:
                        for i in T.unroll(Q * V):
                            _put(regs, i, out, row, lane, out_pitch if window else lanes, V, "none", low, high, W, isa)
                else:
                    for i in T.unroll(Q * V):
                        _put(regs, i, out, row, lane, out_pitch if window else lanes, V, "none", low, high, W, isa)
                if epilogue and not at_end:
                    # a loop over what was just stored, not over registers: one copy of the polynomial's code
                    if last != 0:
                        for i in T.serial(Q * V):
                            activate_in_place(
                                out,
                                _position(i, V, W, row, lane, out_pitch if window else lanes),
                                act,
                                low,
                                high,
                                W,
                                isa,
                            )
        if at_end:
            if last != 0:
                for r in T.serial(groups * R):
                    for i in T.serial(T.truncdiv(lanes, W)):
                        activate_in_place(out, r * (out_pitch if window else lanes) + i * W, act, low, high, W, isa)

    return rx1


def _one_lane(R, act, isa):
    """One token: the R rows of a group fill the register instead, four columns at a time."""
    U = 4
    E = R & -R  # rows that are activated at once: instructions have widths that are powers of two
    lines = max(1, U * R // 16)  # of values, read in one turn of the loop
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def rx1(
        p_: T.handle("float32"),
        offsets_: T.handle("int32"),
        indptr_: T.handle("int32"),
        order_: T.handle("int32"),
        columns_: T.handle("uint16"),
        values_: T.handle("float32"),
        bias_: T.handle("float32"),
        base_: T.handle("float32"),
        out_: T.handle("float32"),
        groups: T.int32,
        mode: T.int32,
        last: T.int32,
        base_pitch: T.int32,
        out_pitch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": name(R, 1, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            regs = T.alloc_buffer((U * R,), "float32", scope="local")
            row: T.let[T.int32] = order[g] * R
            begin: T.let[T.int32] = indptr[g]
            count: T.let[T.int32] = indptr[g + 1] - begin
            if mode == ACCUMULATE:
                store(regs, out[at(row, R)], 0, R)
            elif mode == RESIDUAL:
                store(regs, base[at(row, R)] + bias[at(row, R)], 0, R)
            else:
                store(regs, bias[at(row, R)], 0, R)
            for u in T.unroll(U - 1):
                store(regs, const(0.0, R), (u + 1) * R, R)
            for j in T.serial(T.truncdiv(count, U)):
                for line in T.unroll(lines):
                    prefetch(values, (begin + j * U) * R + line * 16 + AHEAD)
                prefetch(columns, begin + j * U + AHEAD // R)
                for u in T.unroll(U):
                    fma(
                        regs,
                        u * R,
                        values[at((begin + j * U + u) * R, R)],
                        spread(P[T.Cast("int32", columns[begin + j * U + u])], R),
                        R,
                    )
            for j in T.serial(T.truncmod(count, U)):
                fma(
                    regs,
                    0,
                    values[at((begin + count - 1 - j) * R, R)],
                    spread(P[T.Cast("int32", columns[begin + count - 1 - j])], R),
                    R,
                )
            for u in T.unroll(U - 1):
                add(regs, 0, (u + 1) * R, R)
            store(out, regs[at(0, R)], row, R)
            if epilogue:
                if last != 0:
                    for i in T.unroll(R // E):
                        activate_in_place(out, row + i * E, act, low, high, E, isa)

    return rx1
