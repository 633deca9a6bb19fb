"""R x C blocks: R consecutive outputs by C consecutive inputs, one index for R C values.

    W [n, k]        rows 0..R-1     . . a b . .       R = C = 2: one block, column 2 of the weight's,
                                    . . c d . .       values [a, b, c, d]   (row by row)

    chunk, k_block, tile     as in `rx1.py`; C divides k and k_block
    indptr, order, bias      as in `rx1.py`: a group is R consecutive rows

    columns uint16 [entries]           the first of its C columns, within its k_block
    values  f32    [entries, R C]      row by row

Two kernels read it. With one token, a register holds several rows of a block, C lanes each, and meets the C activations
that follow each other: one load of values for each multiply-add, and the lanes of a row are added up once for a group.
With more, tokens fill the lanes, as in `rx1.py`; the places of all C columns follow from one index.

Reference: block-compressed rows (BCSR), Im and Yelick, Optimizing Sparse Matrix Computations for Register Reuse (2001).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import sums
from spa_compiler.kernels.form import tiled
from spa_compiler.kernels.rx1 import ARRAYS, FULL, default_blocking, pad_bias
from spa_compiler.kernels.sums import ACCUMULATE, BIAS, RESIDUAL, activate_in_place, add, finish, fma, start
from spa_compiler.kernels.vector import AHEAD, ANY, AVX512, ZMM, Isa, at, const, prefetch, spread, store

F32 = NDArray[np.float32]

MAX_ROWS, MAX_COLS = 8, 4  # larger blocks are stored as several of these: measured, they are not faster
CHAINS = 8  # of multiply-adds that are wanted: they take 4 cycles, 2 begin in each


@dataclass(frozen=True)
class Rectangles:
    """The form: R x C blocks in tiles of `chunk` x `k_block`, where None is the usual size."""

    rows: int  # R
    cols: int  # C
    chunk: int | None = None
    k_block: int | None = None
    windowed: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`block:4x4`; `block:4x4 in 128x768` with the tile."""
        return tiled(self.pattern, self.chunk, self.k_block)

    @property
    def pattern(self) -> str:
        """`block:RxC`."""
        return f"block:{self.rows}x{self.cols}"

    @property
    def info(self) -> dict[str, int]:
        """Of `LinearInfo` in region.h."""
        return {"cols": self.cols}

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of the kernel for tiles of `lanes` tokens."""
        return name(self.rows, self.cols, lanes, act, window)

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store."""
        return int(_blocks(weight, self.rows, self.cols).any(axis=(1, 3)).sum()) * self.rows * self.cols

    def cut(self, chunk: int | None, k_block: int | None) -> Rectangles:
        """The same blocks in other tiles."""
        return Rectangles(self.rows, self.cols, chunk, k_block)

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias."""
        return pack(weight, None, self.rows, self.cols, self.chunk, self.k_block)


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] in this format."""

    n: int
    k: int
    rows: int  # R
    cols: int  # C
    chunk: int
    k_block: int
    indptr: NDArray[np.int32]
    order: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: F32
    bias: F32

    @property
    def form(self) -> Rectangles:
        """With its tile sizes."""
        return Rectangles(self.rows, self.cols, self.chunk, self.k_block)

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """In the order in which a node takes them."""
        return {what: getattr(self, what) for what in ARRAYS}

    def with_bias(self, bias: F32 | None) -> Packed:
        """The same weight with `bias` [n]; None: zeros."""
        return dataclasses.replace(self, bias=pad_bias(bias, self.n, self.rows))


def _blocks(weight: F32, rows: int, cols: int) -> F32:
    """[groups, R, k / C, C], with rows of zeros behind the last."""
    n, k = weight.shape
    if k % cols:
        raise ValueError(f"{k} columns cannot be cut into blocks of {cols}")
    padded = np.zeros((-(-n // rows) * rows, k), np.float32)
    padded[:n] = weight
    return padded.reshape(-1, rows, k // cols, cols)


def pack(
    weight: F32, bias: F32 | None, rows: int, cols: int, chunk: int | None = None, k_block: int | None = None
) -> Packed:
    """`weight` [n, k] and `bias` [n] (or None) -> Packed. Exact: nothing but zeros is left out.

    Raises:
        ValueError: C does not divide k or k_block, or R the chunk.
    """
    n, k = weight.shape
    blocks = _blocks(weight, rows, cols).transpose(0, 2, 1, 3)  # [group, block, R, C]
    mask = (blocks != 0).any(axis=(2, 3))
    default = default_blocking(n, k, rows, full=bool(mask.mean() >= FULL))
    chunk, k_block = chunk or default[0], k_block or default[1]
    if k_block % cols or chunk % rows:
        raise ValueError(f"tiles of {chunk} x {k_block} cut blocks of {rows} x {cols}")
    counts, order, columns, values = [], [], [], []
    per_chunk, per_block = chunk // rows, k_block // cols
    for first in range(0, len(mask), per_chunk):
        for c0 in range(0, k // cols, per_block):
            tile = mask[first : first + per_chunk, c0 : c0 + per_block]
            places = np.argsort(tile.sum(axis=1), kind="stable")
            group, column = np.nonzero(tile[places])
            counts.append(np.bincount(group, minlength=len(places)))
            order.append(places)
            columns.append(column * cols)
            values.append(blocks[first + places[group], c0 + column].reshape(-1, rows * cols))
    return Packed(
        n,
        k,
        rows,
        cols,
        chunk,
        k_block,
        np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32),
        np.concatenate(order).astype(np.int32),
        np.concatenate(columns).astype(np.uint16),
        np.ascontiguousarray(np.concatenate(values), np.float32),
        pad_bias(bias, n, rows),
    )


def unpack(packed: Packed) -> F32:
    """The dense weight [n, k]."""
    dense = np.zeros((len(packed.bias), packed.k), np.float32)
    rows, cols, entry = packed.rows, packed.cols, 0
    for first in range(0, len(dense), packed.chunk):
        for k0 in range(0, packed.k, packed.k_block):
            for _ in range(min(packed.chunk, len(dense) - first) // rows):
                row = first + int(packed.order[entry]) * rows
                for j in range(packed.indptr[entry], packed.indptr[entry + 1]):
                    column = k0 + int(packed.columns[j])
                    dense[row : row + rows, column : column + cols] = packed.values[j].reshape(rows, cols)
                entry += 1
    return dense[: packed.n]


def reference(
    panel: F32, packed: Packed, residual: F32 | None = None, act: str = "none", low: float = 0.0, high: float = 0.0
) -> F32:
    """What the kernel computes on a panel tile [k, lanes], in float64: [n, lanes]."""
    return sums.reference(unpack(packed), packed.bias, panel, residual, act, low, high)


def name(rows: int, cols: int, lanes: int, act: str, window: bool = False) -> str:
    return f"spa_rxc{'w' if window else ''}_{rows}x{cols}_{lanes}_{act}"


def kernel(rows: int, cols: int, lanes: int, act: str, window: bool = False, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_rxc_<R>x<C>_<lanes>_<act>(...): one tile on one panel tile, arguments of `rx1_products.kernel`."""
    if window and lanes < ZMM:
        raise ValueError(f"a window of {lanes} lanes: whole registers of {ZMM} alone")
    return _one_lane(rows, cols, act, isa) if lanes == 1 else _many_lanes(rows, cols, lanes, act, window, isa)


def tile_of(rows: int, lanes: int, isa: Isa) -> tuple[int, int, int]:
    """(lanes of a register, rows, registers of lanes) of the sums that are kept at once: fewest loads for each."""
    width, total = isa.widths(lanes)
    fits = [
        (q, v)
        for q in range(1, rows + 1)
        for v in range(1, total + 1)
        if rows % q == total % v == 0 and q * v + min(q, v) + 1 < isa.registers
    ]
    return width, *min(fits, key=lambda tile: ((tile[0] + tile[1]) / (tile[0] * tile[1]), -tile[1]))


def _place(offsets, column, c, lanes, window):
    """Where the activations of column `c` of a block begin."""
    column = T.Cast("int32", column)
    return offsets[column + c] if window else (column + c) * lanes


def _many_lanes(R, C, lanes, act, window, isa):
    W, Q, V = tile_of(R, lanes, isa)
    passes = lanes // (V * W)
    S = min(C, max(1, CHAINS // (Q * V)))  # sets of sums, for columns in turns
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def rxc(
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
        T.func_attr({"global_symbol": name(R, C, lanes, act, window), "tirx.noalias": True})
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
                regs = T.alloc_buffer((S * Q * V * W,), "float32", scope="local")
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
                for i in T.unroll((S - 1) * Q * V):
                    store(regs, const(0.0, W), (Q * V + i) * W, W)
                for j in T.serial(count):
                    for i in T.unroll((R * C + ZMM - 1) // ZMM):
                        prefetch(values, (begin + j) * (R * C) + i * ZMM + AHEAD, lanes)
                    prefetch(columns, begin + j + AHEAD // (R * C), lanes)
                    for c in T.unroll(C):
                        for i in T.unroll(Q * V):
                            fma(
                                regs,
                                (c % S * (Q * V) + i) * W,
                                spread(values[(begin + j) * (R * C) + (first + T.truncdiv(i, V)) * C + c], W),
                                P[
                                    at(
                                        _place(offsets, columns[begin + j], c, lanes, window)
                                        + lane
                                        + T.truncmod(i, V) * W,
                                        W,
                                    )
                                ],
                                W,
                            )
                for i in T.unroll((S - 1) * Q * V):
                    add(regs, T.truncmod(i, Q * V) * W, (Q * V + i) * W, W)
                for i in T.unroll(Q * V):
                    store(
                        out,
                        regs[at(i * W, W)],
                        (row + T.truncdiv(i, V)) * (out_pitch if window else lanes) + lane + T.truncmod(i, V) * W,
                        W,
                    )
                if epilogue:
                    # a loop over what was just stored, not over registers: one copy of the activation's code
                    if last != 0:
                        for i in T.serial(Q * V):
                            activate_in_place(
                                out,
                                (row + T.truncdiv(i, V)) * (out_pitch if window else lanes)
                                + lane
                                + T.truncmod(i, V) * W,
                                act,
                                low,
                                high,
                                W,
                                isa,
                            )

    return rxc


def _activations(P, column, cols, width):
    """What a register of values meets: C activations, again for each of its rows."""
    once = T.bind(P[at(T.Cast("int32", column), cols)])
    return tirx.Shuffle([once] * (width // cols), [tirx.IntImm("int32", i) for i in range(width)])


def _one_lane(R, C, act, isa):
    W = min(isa.width, R * C)
    A = R * C // W  # registers of a block
    U = max(1, CHAINS // 2 // A)
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def rxc(
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
        T.func_attr({"global_symbol": name(R, C, 1, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            regs = T.alloc_buffer((U * A * W,), "float32", scope="local")
            row: T.let[T.int32] = order[g] * R
            begin: T.let[T.int32] = indptr[g]
            count: T.let[T.int32] = indptr[g + 1] - begin
            for i in T.unroll(U * A):
                store(regs, const(0.0, W), i * W, W)
            for j in T.serial(T.truncdiv(count, U)):
                for i in T.unroll((U * R * C + ZMM - 1) // ZMM):
                    prefetch(values, (begin + j * U) * (R * C) + i * ZMM + AHEAD)
                prefetch(columns, begin + j * U + AHEAD // (R * C))
                for u in T.unroll(U):
                    for i in T.unroll(A):
                        fma(
                            regs,
                            (u * A + i) * W,
                            values[at((begin + j * U + u) * (R * C) + i * W, W)],
                            _activations(P, columns[begin + j * U + u], C, W),
                            W,
                        )
            if U > 1:
                for j in T.serial(T.truncmod(count, U)):
                    for i in T.unroll(A):
                        fma(
                            regs,
                            i * W,
                            values[at((begin + count - 1 - j) * (R * C) + i * W, W)],
                            _activations(P, columns[begin + count - 1 - j], C, W),
                            W,
                        )
                for i in T.unroll((U - 1) * A):
                    add(regs, T.truncmod(i, A) * W, (A + i) * W, W)
            if mode == ACCUMULATE:
                finish(regs, A, W, C, out, row, ACCUMULATE, bias, base)
            elif mode == RESIDUAL:
                finish(regs, A, W, C, out, row, RESIDUAL, bias, base)
            else:
                finish(regs, A, W, C, out, row, BIAS, bias, base)
            if epilogue:
                if last != 0:
                    activate_in_place(out, row, act, low, high, R, isa)

    return rxc
