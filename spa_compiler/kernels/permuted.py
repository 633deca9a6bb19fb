"""Unstructured zeros for one token where gathers are slow: most activations come out of two registers instead.

The arrays are those of `sliced.py`, and so are the kernels for more than one token; only the order of a slice's slots
says more. The inputs are cut into windows of 32, which two 512-bit registers hold, and a slice begins with `depth`
slots for each window: there, every row's column lies in that window, and one permutation of the two registers
(vpermt2ps) fetches all 16 activations. Entries of a row that are more than `depth` in one window follow, in slots that
are gathered.

    slice       slots 0 .. depth-1              columns 0 .. 31
                slots depth .. 2 depth-1        columns 32 .. 63          ... to the last window
                further slots                   any column                left over, padded to the longest row

A slot that a row does not need holds a zero, and the first column of its window. `depth` is one for the whole weight,
so that the loop over a window's slots is unrolled and no branch depends on the weight. There is one block of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation, sliced
from spa_compiler.kernels.rx1 import default_blocking, pad_bias
from spa_compiler.kernels.sliced import ROWS
from spa_compiler.kernels.sums import ACCUMULATE, RESIDUAL, add, fma
from spa_compiler.kernels.vector import AHEAD, ANY, AVX512, ZMM, Isa, at, const, pick, prefetch, store

F32 = NDArray[np.float32]

WINDOW = 2 * ZMM  # columns
MOST_SLOTS = 24  # of a window: the rest of it would be padding
LEAST_COLUMNS = 4 * WINDOW  # of a weight that it is worth trying for
#: cycles of a slot out of registers and of one that is gathered, between weights from L2 and from memory; on Zen 4
_PERMUTED, _GATHERED = 8.0, 20.0
_CHAINS = 4  # of multiply-adds, in turns


@dataclass(frozen=True)
class Permuted:
    """The form: slices in chunks of the usual size, with `depth` slots for each window; None: what `pack` decides."""

    depth: int | None = None
    chunk: int | None = None
    k_block: int | None = None
    rows: int = ROWS
    windowed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """`unstructured permuted`."""
        return "unstructured permuted"

    @property
    def pattern(self) -> str:
        """`unstructured`."""
        return "unstructured"

    @property
    def info(self) -> dict[str, int]:
        """Of `LinearInfo` in region.h."""
        depth, k = self._decided()
        return {"interleaved": 1, "least_slots": depth * windows(k)}

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store."""
        n, k = weight.shape
        depth, further = _plan(weight, self.depth)
        return ROWS * sum(
            depth * windows(k) + int(most)
            for first in range(0, len(further), default_blocking(n, k, ROWS)[0])
            for most in _by_slice(further[first : first + default_blocking(n, k, ROWS)[0]])[1].max(axis=1)
        )

    def cut(self, chunk: int | None, k_block: int | None) -> Permuted:
        """Itself: there are no other tiles."""
        return self

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias."""
        return pack(weight, None, self.depth)

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of the kernel for tiles of `lanes` tokens."""
        return name(*self._decided(), act) if lanes == 1 else sliced.name(lanes, act)

    def _decided(self) -> tuple[int, int]:
        if self.depth is None or self.k_block is None:
            raise ValueError("only a packed weight's form says how deep its windows are")
        return self.depth, self.k_block


@dataclass(frozen=True)
class Packed(sliced.Packed):
    """A weight [n, k] in this format."""

    depth: int

    @property
    def form(self) -> Permuted:  # type: ignore[override]  # as a Packed of sliced.py, it would be a Slices
        """With what was decided."""
        return Permuted(self.depth, self.chunk, self.k_block)


def windows(k: int) -> int:
    """How many windows `k` columns have; the last one may be short."""
    return -(-k // WINDOW)


def depth_of(density: float, k: int) -> int:
    """Slots of a window that take the fewest cycles, where a share `density` of all entries is spread evenly.

    A row has about Poisson(32 density) entries in a window. What is more than the depth is gathered, and the longest of
    16 rows counts: their mean and 1.8 standard deviations.
    """
    mean, count = WINDOW * density, windows(k)
    chance = [math.exp(-mean)]
    for x in range(1, WINDOW + 1):
        chance.append(chance[-1] * mean / x)

    def cycles(depth: int) -> float:
        over = [(x - depth, p) for x, p in enumerate(chance) if x > depth]
        first, second = (sum(p * by**power for by, p in over) for power in (1, 2))
        gathered = count * first + 1.8 * math.sqrt(count * max(second - first * first, 0.0))
        return count * depth * _PERMUTED + gathered * _GATHERED

    return min(range(1, MOST_SLOTS + 1), key=cycles)


def _plan(weight: F32, depth: int | None) -> tuple[int, NDArray[np.intp]]:
    """The depth, and how many entries of each of the rows, rounded up to 16, find no slot in their windows."""
    n, k = weight.shape
    mask = np.zeros((-(-n // ROWS) * ROWS, windows(k) * WINDOW), bool)
    mask[:n, :k] = weight != 0
    # of two digits, so that layers that are alike get one kernel
    depth = depth or depth_of(round(float(mask[:n, :k].mean()), 2), k)
    counts = mask.reshape(len(mask), -1, WINDOW).sum(axis=2)
    return depth, np.maximum(counts - depth, 0).sum(axis=1)


def _by_slice(further: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of a chunk by what they have left over, and that, as [slices, 16]."""
    order = np.argsort(further, kind="stable")
    return order, further[order].reshape(-1, ROWS)


def pack(weight: F32, bias: F32 | None, depth: int | None = None) -> Packed:
    """`weight` [n, k] and `bias` [n] (or None) -> Packed. Exact: nothing but zeros is left out."""
    n, k = weight.shape
    chunk, (depth, further) = default_blocking(n, k, ROWS)[0], _plan(weight, depth)
    padded = np.zeros((len(further), k), np.float32)
    padded[:n] = weight
    in_windows = depth * windows(k)
    slots, orders, columns, values = [], [], [], []
    for first in range(0, len(padded), chunk):
        order, over = _by_slice(further[first : first + chunk])
        tile = padded[first + order]
        count = in_windows + over.max(axis=1)
        row, column = np.nonzero(tile)
        window = column // WINDOW
        slot = _rank(row * windows(k) + window)  # an entry's place among those of its row in its window
        own = slot < depth
        slot[own] += window[own] * depth
        slot[~own] = in_windows + _rank(row[~own])
        place = (np.cumsum(count) - count)[row // ROWS] + slot
        which = np.zeros((int(count.sum()), ROWS), np.uint16)
        value = np.zeros(which.shape, np.float32)
        for begin in np.cumsum(count) - count:
            which[begin : begin + in_windows] = np.repeat(np.arange(windows(k)) * WINDOW, depth)[:, None]
        which[place, row % ROWS], value[place, row % ROWS] = column, tile[row, column]
        slots.append(count)
        orders.append(order.reshape(-1, ROWS))
        columns.append(which)
        values.append(value)
    return Packed(
        n,
        k,
        chunk,
        k,
        np.concatenate([[0], np.cumsum(np.concatenate(slots))]).astype(np.int32),
        np.concatenate(orders).astype(np.int32),
        np.concatenate(columns),
        np.concatenate(values),
        pad_bias(bias, n, ROWS),
        depth,
    )


def _rank(keys: NDArray[np.intp]) -> NDArray[np.intp]:
    """Of each element of sorted `keys`, its place among those that are equal to it."""
    _, begins, counts = np.unique(keys, return_index=True, return_counts=True)
    return np.arange(len(keys)) - np.repeat(begins, counts)


def name(depth: int, k: int, act: str) -> str:
    return f"spa_permuted_{depth}_{k}_{act}"


def parse(called: str) -> tuple[int, int, str]:
    """The arguments of `name`."""
    depth, k, act = called.removeprefix("spa_permuted_").split("_", 2)
    return int(depth), int(k), act


def kernel(depth: int, k: int, act: str, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_permuted_<depth>_<k>_<act>(...): one tile on a panel of one token, arguments of `rx1_products.kernel`.

    `order` points at the tile's first slice, and `groups` is the number of its slices. Machines without the permutation
    read all slots as `sliced.py` does.
    """
    if isa.width != ZMM:
        return sliced.kernel(1, act, isa)
    return _permuted(depth, k, act, isa)


def _permuted(depth, k, act, isa):
    W, U = ZMM, min(depth, _CHAINS)
    count, odd = windows(k), k % WINDOW not in range(1, W + 1)  # the last window has a second register
    whole = count if odd else count - 1
    fixed = depth * count
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def permuted(
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
        T.func_attr({"global_symbol": name(depth, k, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            regs = T.alloc_buffer((U * W,), "float32", scope="local")
            begin: T.let[T.int32] = indptr[g]
            further: T.let[T.int32] = indptr[g + 1] - begin - fixed
            if mode == ACCUMULATE:
                sliced.begin_rows(regs, 0, ACCUMULATE, bias, out, order[at(g * ROWS, W)], isa)
            elif mode == RESIDUAL:
                sliced.begin_rows(regs, 0, RESIDUAL, bias, base, order[at(g * ROWS, W)], isa)
            else:
                sliced.begin_rows(regs, 0, None, bias, None, order[at(g * ROWS, W)], isa)
            for u in T.unroll(U - 1):
                store(regs, const(0.0, W), (u + 1) * W, W)
            for w in T.serial(whole):
                for i in T.unroll(depth):
                    _slot(regs, P, columns, values, begin + w * depth + i, w, True, T.truncmod(i, U), i)
            if whole < count:
                for i in T.unroll(depth):
                    _slot(regs, P, columns, values, begin + whole * depth + i, whole, False, T.truncmod(i, U), i)
            for j in T.serial(further):
                prefetch(values, (begin + fixed + j) * ROWS + AHEAD)
                fma(
                    regs,
                    0,
                    values[at((begin + fixed + j) * ROWS, W)],
                    P[T.Cast(f"int32x{W}", columns[at((begin + fixed + j) * ROWS, W)])],  # 16 loads: see vector.gather
                    W,
                )
            for u in T.unroll(U - 1):
                add(regs, 0, (u + 1) * W, W)
            if epilogue:
                if last != 0:
                    store(regs, activation.emit(regs[at(0, W)], act, low, high, W, isa), 0, W)
            for i in T.unroll(ROWS):
                out[order[g * ROWS + i]] = regs[i]

    return permuted


def _slot(regs, P, columns, values, slot, window, both, chain, i):
    """One slot of a window: activations of its two registers, or of the one that is there, by their columns."""
    prefetch(values, slot * ROWS + AHEAD)
    if i % 2 == 0:
        prefetch(columns, slot * ROWS + AHEAD)
    first = P[at(window * WINDOW, ZMM)]
    second = P[at(window * WINDOW + ZMM, ZMM)] if both else first
    places = T.Cast(f"int32x{ZMM}", columns[at(slot * ROWS, ZMM)])  # the instruction reads five bits of each
    fma(regs, chain * ZMM, values[at(slot * ROWS, ZMM)], pick([first, second], places), ZMM)
