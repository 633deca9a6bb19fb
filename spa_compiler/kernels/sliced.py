"""Unstructured zeros with rows side by side: 16 rows of like length make a slice, whose entries are interleaved.

    slice       slot 0   columns [c0 .. c15]   values [v0 .. v15]     the first entry of each of its 16 rows
                slot 1   columns [c0 .. c15]   values [v0 .. v15]     the second ...

    chunk, k_block, tile     as in `rx1.py`

    indptr  int32  [slices of all tiles + 1]    where a slice's slots begin; increasing over all tiles
    order   int32  [slices of all tiles, 16]    the rows' places in their chunk; rows of a tile are sorted by their
                                                number of entries, so that next to nothing is padded
    columns uint16 [slots, 16]                  column within its k_block
    values  f32    [slots, 16]                  zero behind the end of a shorter row
    bias    f32    [rows, rounded up to 16]

Two kernels read it. With one token, rows fill the lanes: the activations of a slot are gathered, and the weight streams
from memory once, 6 bytes an entry. With more, tokens fill the lanes, and a slice keeps 16 independent sums, which hides
the latency that a row by itself does not.

Reference: SELL-C-sigma, arXiv 1307.6209, with C = 16 and sigma = chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation, sums
from spa_compiler.kernels.form import tiled
from spa_compiler.kernels.rx1 import ARRAYS, default_blocking, pad_bias
from spa_compiler.kernels.sums import ACCUMULATE, RESIDUAL, activate_in_place, add, fma, start
from spa_compiler.kernels.vector import AHEAD, ANY, AVX512, ZMM, Isa, at, const, gather, prefetch, spread, store

F32 = NDArray[np.float32]

ROWS = 16  # of a slice: a cache line of values, and a register of the widest machines
COLUMNS = 512  # of a k_block at most: with 16 lanes a 32 KiB part of the panel
CHAINS = 4  # of multiply-adds behind gathers, which are slower than those


@dataclass(frozen=True)
class Slices:
    """The form: slices in tiles of `chunk` x `k_block`, where None is the usual size."""

    chunk: int | None = None
    k_block: int | None = None
    rows: int = ROWS
    windowed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """`unstructured interleaved`; `unstructured interleaved in 128x768` with the tile."""
        return tiled("unstructured interleaved", self.chunk, self.k_block)

    @property
    def pattern(self) -> str:
        """`unstructured`."""
        return "unstructured"

    @property
    def info(self) -> dict[str, int]:
        """Of `LinearInfo` in region.h."""
        return {"interleaved": 1}

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store."""
        return sum(int(counts.max(axis=1).sum()) * ROWS for *_, counts in _tiles(weight, *self._sizes(*weight.shape)))

    def cut(self, chunk: int | None, k_block: int | None) -> Slices:
        """The same slices in other tiles."""
        return Slices(chunk, k_block)

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias."""
        return pack(weight, None, self.chunk, self.k_block)

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of the kernel for tiles of `lanes` tokens."""
        return name(lanes, act)

    def _sizes(self, n: int, k: int) -> tuple[int, int]:
        return self.chunk or default_blocking(n, k, ROWS)[0], self.k_block or -(-k // -(-k // COLUMNS))


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] in this format."""

    n: int
    k: int
    chunk: int
    k_block: int
    indptr: NDArray[np.int32]
    order: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: F32
    bias: F32

    @property
    def form(self) -> Slices:
        """With its tile sizes."""
        return Slices(self.chunk, self.k_block)

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """In the order in which a node takes them."""
        return {what: getattr(self, what) for what in ARRAYS}

    def with_bias(self, bias: F32 | None) -> Packed:
        """The same weight with `bias` [n]; None: zeros."""
        return dataclasses.replace(self, bias=pad_bias(bias, self.n, ROWS))


def _tiles(weight: F32, chunk: int, k_block: int) -> Iterator[tuple[int, int, NDArray[np.intp], NDArray[np.intp]]]:
    """(first row, first column, rows by their number of entries, those numbers as [slices, 16]) of every tile."""
    n, k = weight.shape
    mask = np.zeros((-(-n // ROWS) * ROWS, k), bool)
    mask[:n] = weight != 0
    for first in range(0, len(mask), chunk):
        for k0 in range(0, k, k_block):
            counts = mask[first : first + chunk, k0 : k0 + k_block].sum(axis=1)
            order = np.argsort(counts, kind="stable")
            yield first, k0, order, counts[order].reshape(-1, ROWS)


def pack(weight: F32, bias: F32 | None, chunk: int | None = None, k_block: int | None = None) -> Packed:
    """`weight` [n, k] and `bias` [n] (or None) -> Packed. Exact: nothing but zeros is left out."""
    n, k = weight.shape
    chunk, k_block = Slices(chunk, k_block)._sizes(n, k)
    padded = np.zeros((-(-n // ROWS) * ROWS, k), np.float32)
    padded[:n] = weight
    slots, orders, columns, values = [], [], [], []
    for first, k0, order, counts in _tiles(weight, chunk, k_block):
        tile = padded[first + order, k0 : k0 + k_block]
        depth = counts.max(axis=1)
        row, column = np.nonzero(tile)
        ends = np.cumsum(counts.reshape(-1))
        slot = np.arange(len(row)) - (ends - counts.reshape(-1))[row]  # an entry's place in its row
        place = (np.cumsum(depth) - depth)[row // ROWS] + slot
        own = np.zeros((int(depth.sum()), ROWS), np.uint16)
        value = np.zeros(own.shape, np.float32)
        own[place, row % ROWS], value[place, row % ROWS] = column, tile[row, column]
        slots.append(depth)
        orders.append(order.reshape(-1, ROWS))
        columns.append(own)
        values.append(value)
    return Packed(
        n,
        k,
        chunk,
        k_block,
        np.concatenate([[0], np.cumsum(np.concatenate(slots))]).astype(np.int32),
        np.concatenate(orders).astype(np.int32),
        np.concatenate(columns),
        np.concatenate(values),
        pad_bias(bias, n, ROWS),
    )


def unpack(packed: Packed) -> F32:
    """The dense weight [n, k]."""
    dense = np.zeros((len(packed.bias), packed.k), np.float32)
    part = 0
    for first in range(0, len(dense), packed.chunk):
        for k0 in range(0, packed.k, packed.k_block):
            for _ in range(min(packed.chunk, len(dense) - first) // ROWS):
                for slot in range(packed.indptr[part], packed.indptr[part + 1]):
                    for i, row in enumerate(first + packed.order[part]):
                        dense[row, k0 + int(packed.columns[slot, i])] += packed.values[slot, i]
                part += 1
    return dense[: packed.n]


def reference(
    panel: F32, packed: Packed, residual: F32 | None = None, act: str = "none", low: float = 0.0, high: float = 0.0
) -> F32:
    """What the kernel computes on a panel tile [k, lanes], in float64: [n, lanes]."""
    return sums.reference(unpack(packed), packed.bias, panel, residual, act, low, high)


def name(lanes: int, act: str) -> str:
    return f"spa_sliced_{lanes}_{act}"


def kernel(lanes: int, act: str, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_sliced_<lanes>_<act>(...): one tile on one panel tile, arguments of `rx1_products.kernel`.

    `order` points at the tile's first slice, and `groups` is the number of its slices.
    """
    return _one_lane(act, isa) if lanes == 1 else _many_lanes(lanes, act, isa)


def begin_rows(regs, index, mode, bias, begin, places, isa):
    """The first values of a register of rows; `begin` is what they begin with: the output so far, or a residual."""
    W = isa.width
    if mode == ACCUMULATE:
        store(regs, gather(begin, places, W, isa), index, W)
    elif mode == RESIDUAL:
        store(regs, gather(begin, places, W, isa) + gather(bias, places, W, isa), index, W)
    else:
        store(regs, gather(bias, places, W, isa), index, W)


def _gathered(P, columns, index, W, isa):
    return gather(P, T.Cast(f"int32x{W}", columns[at(index, W)]), W, isa)


def _activate(regs, index, act, low, high, width, isa):
    store(regs, activation.emit(regs[at(index, width)], act, low, high, width, isa), index, width)


def _one_lane(act, isa):
    """One token: 16 rows fill a register, or several, and what they read is gathered."""
    W = isa.width
    V = ROWS // W
    U = max(1, CHAINS // V)
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def sliced(
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
        T.func_attr({"global_symbol": name(1, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            regs = T.alloc_buffer((U * V * W,), "float32", scope="local")
            begin: T.let[T.int32] = indptr[g]
            count: T.let[T.int32] = indptr[g + 1] - begin
            if mode == ACCUMULATE:
                for v in T.unroll(V):
                    begin_rows(regs, v * W, ACCUMULATE, bias, out, order[at(g * ROWS + v * W, W)], isa)
            elif mode == RESIDUAL:
                for v in T.unroll(V):
                    begin_rows(regs, v * W, RESIDUAL, bias, base, order[at(g * ROWS + v * W, W)], isa)
            else:
                for v in T.unroll(V):
                    begin_rows(regs, v * W, None, bias, None, order[at(g * ROWS + v * W, W)], isa)
            for i in T.unroll((U - 1) * V):
                store(regs, const(0.0, W), (V + i) * W, W)
            for j in T.serial(T.truncdiv(count, U)):
                for u in T.unroll(U):
                    prefetch(values, (begin + j * U + u) * ROWS + AHEAD)
                    if u % 2 == 0:
                        prefetch(columns, (begin + j * U + u) * ROWS + AHEAD)
                for i in T.unroll(U * V):
                    fma(
                        regs,
                        i * W,
                        values[at((begin + j * U) * ROWS + i * W, W)],
                        _gathered(P, columns, (begin + j * U) * ROWS + i * W, W, isa),
                        W,
                    )
            for j in T.serial(T.truncmod(count, U)):
                for v in T.unroll(V):
                    fma(
                        regs,
                        v * W,
                        values[at((begin + count - 1 - j) * ROWS + v * W, W)],
                        _gathered(P, columns, (begin + count - 1 - j) * ROWS + v * W, W, isa),
                        W,
                    )
            for i in T.unroll((U - 1) * V):
                add(regs, T.truncmod(i, V) * W, (V + i) * W, W)
            if epilogue:
                if last != 0:
                    for v in T.unroll(V):
                        _activate(regs, v * W, act, low, high, W, isa)
            for i in T.unroll(ROWS):
                out[order[g * ROWS + i]] = regs[i]

    return sliced


def _shape(lanes, isa):
    """(lanes of a register, registers of lanes in a pass, rows in a pass): half of the registers hold sums."""
    W, total = isa.widths(lanes)
    sums = isa.registers // 2
    vectors = next(v for v in (4, 3, 2, 1) if total % v == 0 and 4 * v <= sums)
    return W, vectors, next(r for r in (16, 8, 4) if r * vectors <= sums)


def _four_rows(regs, row, P, columns, values, entry, lanes, lane, V, W):
    """Multiply-adds of four entries that follow each other, the first of them for the sums of row `row`.

    With AVX-512 a core loads one register a cycle, and that is to be the activations: the columns come in one load, and
    so do the values, which are then spread from register to register. LLVM would make loads of that again, if it saw
    where they come from; `llvm.arithmetic.fence` is no instruction.
    """
    packed = T.bind(T.reinterpret("uint64", columns[at(entry, 4)]))
    if W == ZMM:
        repeated = tirx.Shuffle([T.bind(values[at(entry, 4)])] * 4, [tirx.IntImm("int32", i) for i in range(ZMM)])
        fours = T.bind(T.call_llvm_pure_intrin(f"float32x{ZMM}", "llvm.arithmetic.fence", repeated))
    for r in range(4):
        column = T.bitwise_and(T.shift_right(packed, T.uint64(16 * r)), T.uint64(0xFFFF))
        place = T.Cast("int64", column) * lanes + lane
        if W == ZMM:
            value = T.bind(tirx.Shuffle([fours], [tirx.IntImm("int32", i // 4 * 4 + r) for i in range(ZMM)]))
        else:
            value = spread(values[entry + r], W)
        for v in range(V):
            fma(regs, ((row + r) * V + v) * W, value, P[at(place + v * W, W)], W)


def _many_lanes(lanes, act, isa):
    W, V, R = _shape(lanes, isa)
    passes = lanes // (V * W)
    parts = ROWS // R
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def sliced(
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
        T.func_attr({"global_symbol": name(lanes, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
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
            for part in T.serial(parts * passes):
                first: T.let[T.int32] = T.truncdiv(part, passes) * R
                lane: T.let[T.int32] = T.truncmod(part, passes) * (V * W)
                regs = T.alloc_buffer((R * V * W,), "float32", scope="local")
                if mode == ACCUMULATE:
                    for r in T.unroll(R):
                        for v in T.unroll(V):
                            start(
                                regs,
                                (r * V + v) * W,
                                ACCUMULATE,
                                bias,
                                0,
                                out,
                                order[g * ROWS + first + r] * lanes + lane + v * W,
                                W,
                            )
                elif mode == RESIDUAL:
                    for r in T.unroll(R):
                        for v in T.unroll(V):
                            start(
                                regs,
                                (r * V + v) * W,
                                RESIDUAL,
                                bias,
                                order[g * ROWS + first + r],
                                base,
                                order[g * ROWS + first + r] * lanes + lane + v * W,
                                W,
                            )
                else:
                    for r in T.unroll(R):
                        for v in T.unroll(V):
                            start(regs, (r * V + v) * W, None, bias, order[g * ROWS + first + r], None, 0, W)
                for j in T.serial(count):
                    prefetch(values, (begin + j) * ROWS + AHEAD, lanes)
                    prefetch(columns, (begin + j) * ROWS + AHEAD, lanes)
                    for quarter in T.unroll(R // 4):
                        _four_rows(
                            regs,
                            quarter * 4,
                            P,
                            columns,
                            values,
                            (begin + j) * ROWS + first + quarter * 4,
                            lanes,
                            lane,
                            V,
                            W,
                        )
                for r in T.unroll(R):
                    for v in T.unroll(V):
                        store(out, regs[at((r * V + v) * W, W)], order[g * ROWS + first + r] * lanes + lane + v * W, W)
                if epilogue:
                    # a loop over what was just stored, not over registers: one copy of the polynomial's code
                    if last != 0:
                        for i in T.serial(R * V):
                            activate_in_place(
                                out,
                                order[g * ROWS + first + T.truncdiv(i, V)] * lanes + lane + T.truncmod(i, V) * W,
                                act,
                                low,
                                high,
                                W,
                                isa,
                            )

    return sliced
