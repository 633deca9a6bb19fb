"""Unstructured zeros for few tokens: loaded sparse, multiplied dense.

With few tokens the time is that of reading the weight, so zeros are left out of it; tensor cores then meet a dense
tile.

    strip, window, place     as in `strips.py`

    starts   int32  [windows + 1]          where the units of a window begin, window by window, strip by strip
    entries  uint32 [units, 32 lanes, 2]   fp16, bf16: bits 0..15 a value, bits 16..27 its place in the window, in bytes
             uint32 [units, 32 lanes, 2]   fp32: a value, then its place in bytes

    unit     what a warp loads in one instruction, 8 bytes a lane: 64 entries (fp32: 32). The last one of a window is
             filled up with zeros that are written where zeros are

Entries of a window may come in any order. `pack` deals them so that few of those which lanes write in the same
instruction lie in the same bank.

For each of its windows a warp scatters the entries over its zeroed tile, loads fragments, multiplies, and writes zeros
where it wrote values; meanwhile its next entries are on the way to registers. No barrier but at the end.

A nonzero takes 4 bytes (fp32: 8): of a dense weight's bytes 10 % at 95 % zeros, 40 % at 80 %, all at 50 %.

Reference: Xia et al., Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with
Unstructured Sparsity, VLDB 2023, arXiv 2309.10285, whose idea this is; there a tile is a block's, behind barriers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm.script import tirx as T

from spa_compiler.kernels.cuda.arrays import Array, Extent, Offsets
from spa_compiler.kernels.cuda.form import (
    F32,
    Arrays,
    Dtype,
    Epilogue,
    Form,
    Kernel,
    Layout,
    from_bits,
    rounded,
    to_bits,
)
from spa_compiler.kernels.cuda.roofline import microseconds
from spa_compiler.kernels.cuda.script import as_float, call, load_tokens, mma, syncwarp, word_type
from spa_compiler.kernels.cuda.strips import (
    BINS,
    ROWS,
    TILE,
    columns,
    finish,
    places_of,
    rank_of,
    sums_bytes,
    weight_of,
    windows_of,
)
from spa_compiler.kernels.vector import ANY
from spa_compiler.targets.cuda import Architecture

UNIT = 8  # bytes of a lane in a unit
HELD = 8  # units of a window that are on the way in registers: 25 % nonzeros; what is more is loaded when it is needed
PLACE = (
    0x0FFE  # places of 16-bit numbers, all other bits of an entry's upper half are ignored: no entry leaves its tile
)
PLACE_FP32 = 0x0FFC


@dataclass(frozen=True)
class Few:
    """The form: entries of value and place, in windows of 32 rows."""

    rather: ClassVar[Form | None] = None

    @property
    def name(self) -> str:
        """`unstructured scattered`."""
        return "unstructured scattered"

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ("starts", "entries")

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """What a kernel relies on. Places need no check: it cuts off what would lead out of the tile."""
        windows = Extent(rows=ROWS, columns=columns(dtype), plus=1)
        return (
            Array("starts", "int32", (windows,), Offsets(Extent(count="units"))),
            Array("entries", "uint32", (Extent(count="units"), Extent(32), Extent(2))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """A place for each nonzero, as large as itself."""
        return 2 * float(np.count_nonzero(weight) / max(weight.size, 1))

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> `starts`, `entries`."""
        tiles = windows_of(rounded(weight, dtype), dtype)
        places = places_of(dtype).reshape(-1)
        each = UNIT // (8 if dtype == "fp32" else 4)  # entries of a lane in a unit
        window, element = np.nonzero(tiles)
        units = -(-np.bincount(window, minlength=len(tiles)) // (32 * each))
        units[-1] = max(units[-1], int(not units.any()))  # no model has an empty initializer
        starts = np.concatenate([[0], np.cumsum(units)])
        # What lanes write in one instruction takes as long as its fullest bank. First come the first entries of all
        # banks, then the second ones, and so on: only where banks run out do some meet themselves. Keys, from the
        # highest bits: window, turn (of 64), bank (of 32), element (of 2048).
        keys = np.sort(window << 22 | (places[element] // 4 % 32) << 11 | element)
        keys = np.sort(keys | rank_of(keys >> 11) << 16)
        window, element = keys >> 22, keys & 2047
        slot = starts[window] * (32 * each) + rank_of(window)
        total = starts[-1] * 32 * each
        # of each window, a place without a value, if there is one
        place = np.repeat(places[np.argmin(tiles != 0, axis=1)], units * 32 * each)
        value = np.zeros(total, np.float32)
        place[slot], value[slot] = places[element], tiles[window, element]
        if dtype == "fp32":
            entries = np.stack([value.view(np.uint32), place.astype(np.uint32)], axis=1).reshape(-1, 32, 2)
        else:
            entries = to_bits(value, dtype).astype(np.uint32) | (place << 16).astype(np.uint32)
            entries = entries.reshape(-1, 2, 32).transpose(0, 2, 1)
        return {"starts": starts.astype(np.int32), "entries": np.ascontiguousarray(entries)}

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The dense weight [n, k]."""
        starts, entries = arrays["starts"], arrays["entries"]
        size = ROWS * columns(dtype)
        tiles = np.zeros((len(starts) - 1, size), np.float32)
        step = 4 if dtype == "fp32" else 2
        inverse = np.zeros(TILE // step, np.int64)
        inverse[places_of(dtype).reshape(-1) // step] = np.arange(size)
        if dtype == "fp32":
            value, place = entries[:, :, :1].view(np.float32), entries[:, :, 1:] & PLACE_FP32
        else:
            value, place = from_bits((entries & 0xFFFF).astype(np.uint16), dtype), entries >> 16 & PLACE
        window = np.repeat(np.arange(len(tiles)), np.diff(starts))[:, None, None]
        np.add.at(tiles, (np.broadcast_to(window, place.shape), inverse[place // step]), value)
        return weight_of(tiles, n, k)

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """One, for as many tokens as there are; for more than 64, or in planes, there is none."""
        if layout != "rows" or tokens > BINS[-1]:
            return []
        made = [kernel(dtype, epilogue, next(b for b in BINS if tokens <= b))]
        return [one for one in made if one.fits(arch)]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """Microseconds: entries are read once for each tile of tokens, x by every block; shared memory takes 128 bytes
        a cycle."""
        wide = "_fp32_" in kernel.name
        grid = kernel.grid(n, tokens)
        windows = -(-k // columns("fp32" if wide else "fp16"))
        loads = arrays["entries"].size / 32 / (len(arrays["starts"]) - 1) / (2 if wide else 1)  # a window
        tiles = kernel.tile_tokens // 8
        cycles = 2 * _TURNS * loads + TILE / 128 + 8 * tiles + _OTHER
        read = arrays["entries"].nbytes + arrays["starts"].nbytes
        x = min(tokens, kernel.tile_tokens) * k * (4 if wide else 2)
        return microseconds(arch, grid, read, x, windows * cycles)


_TURNS = 1.7  # of banks, that lanes' writes take
_OTHER = 8  # cycles of a window; what else there is, four schedulers do beside it


def kernel(dtype: Dtype, epilogue: Epilogue, tokens: int) -> Kernel:
    """For tiles of `tokens` (one of `BINS`)."""
    warps = 16 if tokens <= 16 else 8
    return Kernel(
        f"spa_few_{dtype}_{tokens}_{epilogue}",
        lambda: _script(dtype, epilogue, tokens, warps),
        threads=32 * warps,
        tile_rows=ROWS,
        tile_tokens=tokens,
        shared_bytes=_shared(tokens, warps),
    )


def _shared(tokens: int, warps: int) -> int:
    return warps * max(TILE, sums_bytes(tokens))


def _script(dtype, epilogue, tile, warps):
    NT = tile // 8  # tiles of an mma
    W = warps
    wide = dtype == "fp32"
    xtype = word_type(dtype)
    C = columns(dtype)
    size = 4 if wide else 2
    EACH = 1 if wide else 2  # entries of a lane in a unit
    shared = _shared(tile, W)

    def load_x(xs, X, rows, half, window, q, k):
        """16 bytes of each token: of a lane's columns in one half of a window."""
        column = T.bind(window * C + (q * 8 + half * 4 if wide else half * 32 + q * 8))
        load_tokens(xs, half * NT * 4, X, rows, NT, column, k, size)

    def load_entries(held, entries, begin, count, lane):
        """What registers hold of `count` units."""
        with T.unroll(HELD) as u, T.If(u < count), T.Then():
            where = T.address_of(entries[(begin * 32 + lane) * 2])
            call("spa_load8_once_at", T.address_of(held[u * 2]), where, u * 256)

    def scatter(S, base, places, first, unit, at):
        """Writes a lane's part of a unit, words at, at + 1 of `unit`, and keeps where: places first, first + 1."""
        for i in range(EACH):
            if wide:
                place = T.Cast("int32", unit[at + 1] & T.uint32(PLACE_FP32))
            else:
                place = T.Cast("int32", T.shift_right(unit[at + i] & T.uint32(PLACE << 16), T.uint32(16)))
            T.buffer_store(places, base + place, [first + i])
            value = T.call_extern("uint32", "spa_to_tf32", as_float(unit[at])) if wide else unit[at + i]
            call(f"spa_store{size}", T.address_of(S[places[first + i]]), value)

    def clear(S, places, first):
        """Zeros where `scatter` wrote."""
        for i in range(EACH):
            call(f"spa_store{size}", T.address_of(S[places[first + i]]), T.uint32(0))

    def wipe(S, base, zeros, lane):
        """Zeros all over a tile."""
        with T.unroll(TILE // 512) as i:
            call("spa_store16", T.address_of(S[base + (i * 32 + lane) * 16]), T.address_of(zeros[0]))

    def multiply(sums, S, base, xs, half, lane):
        """Adds one half of a window."""
        with T.unroll(2) as step, T.unroll(2) as m:
            a = T.alloc_buffer((4,), "uint32", scope="local")
            where = S[base + (((half * 2 + step) * 2 + m) * 32 + lane) * 16]
            call("spa_load16", T.address_of(a[0]), T.address_of(where))
            with T.unroll(NT) as t:
                b = xs[(half * NT + t) * 4 + step * 2]
                call(mma(dtype), T.address_of(sums[(m * NT + t) * 4]), T.address_of(a[0]), T.address_of(b))

    @T.prim_func(s_tir=True)
    def few(
        starts_: T.handle("int32"),
        entries_: T.handle("uint32"),
        x_: T.handle(xtype),
        bias_: T.handle("float32"),
        residual__: T.handle(xtype),
        y_: T.handle(xtype),
        n: T.int32,
        k: T.int32,
        tokens: T.int32,
        batch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": "few", "tirx.noalias": True})
        starts = T.decl_buffer((ANY,), "int32", data=starts_)
        entries = T.decl_buffer((ANY,), "uint32", data=entries_)
        X = T.decl_buffer((ANY,), xtype, data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), xtype, data=residual__)
        Y = T.decl_buffer((ANY,), xtype, data=y_)
        column_of_grid = T.launch_thread("blockIdx.x", T.ceildiv(tokens, tile))
        strip = T.launch_thread("blockIdx.y", T.ceildiv(n, ROWS))
        T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", 32 * W)
        S = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
        sums = T.alloc_buffer((8 * NT,), "float32", scope="local")
        xs = T.alloc_buffer((8 * NT,), "uint32", scope="local")
        rows = T.alloc_buffer((NT,), "int32", scope="local")
        held = T.alloc_buffer((2 * HELD,), "uint32", scope="local")
        unit = T.alloc_buffer((2,), "uint32", scope="local")
        places = T.alloc_buffer((2 * HELD,), "int32", scope="local")
        other = T.alloc_buffer((2,), "int32", scope="local")
        zeros = T.alloc_buffer((4,), "uint32", scope="local")
        units = T.alloc_buffer(
            (4,), "int32", scope="local"
        )  # begin and number of this window's units, of the next one's
        first: T.let[T.int32] = column_of_grid * tile
        warp: T.let[T.int32] = T.truncdiv(thread, 32)
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        g: T.let[T.int32] = T.truncdiv(lane, 4)
        q: T.let[T.int32] = T.truncmod(lane, 4)
        base: T.let[T.int32] = warp * TILE
        windows: T.let[T.int32] = T.truncdiv(k + (C - 1), C)
        at: T.let[T.int32] = strip * windows + warp
        for i in T.unroll(8 * NT):
            sums[i] = T.float32(0)
        for i in T.unroll(4):
            zeros[i] = T.uint32(0)
            units[i] = 0
        for t in T.unroll(NT):  # the sums of tokens past the last one are not stored
            rows[t] = T.min(first + t * 8 + g, tokens - 1) * k
        wipe(S, base, zeros, lane)
        if warp < windows:
            units[0] = starts[at]
            units[1] = starts[at + 1] - starts[at]
            load_entries(held, entries, units[0], units[1], lane)
            for half in T.unroll(2):
                load_x(xs, X, rows, half, warp, q, k)
            if warp + W < windows:
                units[2] = starts[at + W]
                units[3] = starts[at + W + 1] - starts[at + W]
        for i in T.serial(T.truncdiv(windows - warp + (W - 1), W)):
            window: T.let[T.int32] = warp + i * W
            syncwarp()
            for u in T.unroll(HELD):
                if u < units[1]:
                    scatter(S, base, places, u * EACH, held, u * 2)
            for u in T.serial(T.max(0, units[1] - HELD)):
                call("spa_load8", T.address_of(unit[0]), T.address_of(entries[((units[0] + HELD + u) * 32 + lane) * 2]))
                scatter(S, base, other, 0, unit, 0)
            load_entries(held, entries, units[2], units[3], lane)
            syncwarp()
            for half in T.unroll(2):
                multiply(sums, S, base, xs, half, lane)
                if window + W < windows:
                    load_x(xs, X, rows, half, window + W, q, k)
            syncwarp()
            if units[1] > HELD:
                wipe(S, base, zeros, lane)
            else:
                for u in T.unroll(HELD):
                    if u < units[1]:
                        clear(S, places, u * EACH)
            for j in T.unroll(2):
                units[j] = units[2 + j]
                units[2 + j] = 0
            if window + 2 * W < windows:
                units[2] = starts[at + (i + 2) * W]
                units[3] = starts[at + (i + 2) * W + 1] - starts[at + (i + 2) * W]
        T.tvm_storage_sync("shared.dyn")
        finish(S, sums, Y, bias, residual, dtype, epilogue, tile, W, strip, first, warp, lane, n, tokens, low, high)

    return few
