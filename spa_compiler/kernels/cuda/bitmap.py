"""Unstructured zeros for few tokens where there are fewer of them: a bit for every element, and the nonzeros.

    strip, window      as in `strips.py`: 32 rows, 64 columns

    bits    uint32 [windows, 32 lanes, 2]   a lane's 64 elements, in the order in which it multiplies them: bit
                                            (half 32) + 16 step + 8 (row half) + 2 register + column
    starts  int32  [windows + 1]            where the values of a window begin, in units of 8
    values  uint16 [units, 8]               fp16 or bf16: nonzeros of lane 0 in the order of its bits, of lane 1, ...;
                                            zeros up to a whole unit

The values of a warp's windows come to shared memory by asynchronous copies, one window ahead. How many bits the lanes
before it have tells a lane where its own values begin; then it goes through its bits, and takes a value where one is
set, straight into the fragment. So nothing is written to a tile, zeroed and read again, but there are instructions for
every element, zero or not.

A nonzero takes 2 bytes and every element a bit: 56 % of a dense weight's bytes at 50 % zeros, 26 % at 80 %. Where
memory is slow beside the multiprocessors (all but the HBM of H100 and later) that is what counts; where it is not,
`few.py` is faster at many zeros.

Reference: Fan et al., SpInfer: Leveraging Low-Level Sparsity for Efficient Large Language Model Inference on GPUs,
EuroSys 2025, for bitmaps in the order of fragments; there a lane counts bits for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
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
from spa_compiler.kernels.cuda.script import call, load_tokens, mma, syncwarp
from spa_compiler.kernels.cuda.strips import (
    BINS,
    ROWS,
    TILE,
    finish,
    places_of,
    rank_of,
    sums_bytes,
    weight_of,
    windows_of,
)
from spa_compiler.kernels.vector import ANY
from spa_compiler.targets.cuda import Architecture

COLUMNS = 64
UNIT = 8  # values: 16 bytes
WARPS = 8


@dataclass(frozen=True)
class Bitmap:
    """The form: bits and nonzeros, in windows of 32 rows."""

    rather: ClassVar[Form | None] = None

    @property
    def name(self) -> str:
        """`unstructured bitmap`."""
        return "unstructured bitmap"

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ("bits", "starts", "values")

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """What a kernel relies on. Bits need no check: whatever they say, a lane stays in its warp's shared memory."""
        units = Extent(count="units")
        return (
            Array("bits", "uint32", (Extent(rows=ROWS, columns=COLUMNS), Extent(32), Extent(2))),
            Array("starts", "int32", (Extent(rows=ROWS, columns=COLUMNS, plus=1),), Offsets(units)),
            Array("values", "uint16", (units, Extent(UNIT))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """The nonzeros, and a bit for each element."""
        return float(np.count_nonzero(weight) / max(weight.size, 1)) + 1 / 16

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> `bits`, `starts`, `values`.

        Raises:
            ValueError: there is no such form in fp32.
        """
        if dtype == "fp32":
            raise ValueError("bitmaps are for numbers of 16 bits")
        lanes = windows_of(rounded(weight, dtype), dtype)[:, _order()]
        mask = lanes != 0
        bits = np.ascontiguousarray(np.packbits(mask, axis=1, bitorder="little")).view(np.uint32).reshape(-1, 32, 2)
        counts = mask.sum(axis=1)
        units = -(-counts // UNIT)
        units[-1] = max(units[-1], int(not units.any()))  # no model has an empty initializer
        starts = np.concatenate([[0], np.cumsum(units)])
        values = np.zeros(starts[-1] * UNIT, np.float32)
        window = np.repeat(np.arange(len(mask)), counts)
        values[starts[window] * UNIT + rank_of(window)] = lanes[mask]
        return {
            "bits": bits,
            "starts": starts.astype(np.int32),
            "values": to_bits(values, dtype).reshape(-1, UNIT),
        }

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The weight [n, k] again."""
        bits, starts = arrays["bits"].reshape(-1, 64), arrays["starts"].astype(np.int64)
        mask = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").astype(bool)
        window = np.repeat(np.arange(len(mask)), mask.sum(axis=1))
        lanes = np.zeros(mask.shape, np.float32)
        lanes[mask] = from_bits(arrays["values"].reshape(-1), dtype)[starts[window] * UNIT + rank_of(window)]
        tiles = np.empty_like(lanes)
        tiles[:, _order()] = lanes
        return weight_of(tiles, n, k)

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """One of fp16 and bf16, in rows, for up to 64 tokens."""
        if layout != "rows" or tokens > BINS[-1] or dtype == "fp32":
            return []
        made = [kernel(dtype, epilogue, next(b for b in BINS if tokens <= b))]
        return [one for one in made if one.fits(arch)]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """Microseconds: 64 elements of a lane take one access to shared memory each, and more where many lanes meet in
        a bank, and 4.5 instructions each, of which four start a cycle."""
        windows = len(arrays["starts"]) - 1
        density = min(1.0, arrays["values"].size / (windows * ROWS * COLUMNS))
        cycles = 64 * max(1 + 3 * density, 4.5 / 4) + 16 * kernel.tile_tokens / 8
        read = sum(array.nbytes for array in arrays.values())
        fetched = min(tokens, kernel.tile_tokens) * k * 2
        return microseconds(arch, kernel.grid(n, tokens), read, fetched, -(-k // COLUMNS) * cycles)


def _order() -> NDArray[np.int64]:
    """Of elements of a window [32, 64], flat: those of lane 0 in the order of its bits, of lane 1, ..."""
    place = places_of("fp16").reshape(-1)
    lane, number = place // 16 % 32, place // 512 * 8 + place % 16 // 2
    order: NDArray[np.int64] = np.argsort(lane * 64 + number)
    return order


def kernel(dtype: Dtype, epilogue: Epilogue, tokens: int) -> Kernel:
    """For tiles of `tokens` (one of `BINS`)."""
    return Kernel(
        f"spa_bitmap_{dtype}_{tokens}_{epilogue}",
        lambda: _script(dtype, epilogue, tokens),
        threads=32 * WARPS,
        tile_rows=ROWS,
        tile_tokens=tokens,
        shared_bytes=WARPS * max(2 * TILE, sums_bytes(tokens)),
    )


def _script(dtype, epilogue, tile):
    NT = tile // 8
    W = WARPS
    C = COLUMNS
    SHARED = WARPS * max(2 * TILE, sums_bytes(tile))

    def fetch(S, base, values, begin, count, lane):
        """Begins to copy `count` units, at most as many as a window can have."""
        with T.unroll(TILE // 512) as i, T.If(i * 32 + lane < count), T.Then():
            where = T.address_of(values[(begin + i * 32 + lane) * UNIT])
            call("spa_cp_async16", T.address_of(S[base + (i * 32 + lane) * 16]), where)

    def multiply(sums, S, bits, place, xs, half):
        """Adds one half of a window; `place` is where a lane's next value is."""
        with T.unroll(2) as step, T.unroll(2) as m:
            a = T.alloc_buffer((4,), "uint32", scope="local")
            with T.unroll(4) as i:
                at = step * 16 + m * 8 + i * 2
                pair = T.call_extern("uint32", "spa_pair", bits[half], at, T.address_of(S[0]), T.address_of(place[0]))
                T.buffer_store(a, pair, [i])
            with T.unroll(NT) as t:
                b = xs[(half * NT + t) * 4 + step * 2]
                call(mma(dtype), T.address_of(sums[(m * NT + t) * 4]), T.address_of(a[0]), T.address_of(b))

    @T.prim_func(s_tir=True)
    def bitmap(
        bits_: T.handle("uint32"),
        starts_: T.handle("int32"),
        values_: T.handle("uint16"),
        x_: T.handle("uint16"),
        bias_: T.handle("float32"),
        residual__: T.handle("uint16"),
        y_: T.handle("uint16"),
        n: T.int32,
        k: T.int32,
        tokens: T.int32,
        batch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": "bitmap", "tirx.noalias": True})
        masks = T.decl_buffer((ANY,), "uint32", data=bits_)
        starts = T.decl_buffer((ANY,), "int32", data=starts_)
        values = T.decl_buffer((ANY,), "uint16", data=values_)
        X = T.decl_buffer((ANY,), "uint16", data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), "uint16", data=residual__)
        Y = T.decl_buffer((ANY,), "uint16", data=y_)
        column_of_grid = T.launch_thread("blockIdx.x", T.ceildiv(tokens, tile))
        strip = T.launch_thread("blockIdx.y", T.ceildiv(n, ROWS))
        T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", 32 * W)
        S = T.alloc_buffer((SHARED,), "uint8", scope="shared.dyn")
        sums = T.alloc_buffer((8 * NT,), "float32", scope="local")
        xs = T.alloc_buffer((8 * NT,), "uint32", scope="local")
        rows = T.alloc_buffer((NT,), "int32", scope="local")
        bits = T.alloc_buffer((2,), "uint32", scope="local")
        coming = T.alloc_buffer((2,), "uint32", scope="local")
        place = T.alloc_buffer((1,), "int32", scope="local")
        first: T.let[T.int32] = column_of_grid * tile
        warp: T.let[T.int32] = T.truncdiv(thread, 32)
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        g: T.let[T.int32] = T.truncdiv(lane, 4)
        q: T.let[T.int32] = T.truncmod(lane, 4)
        base: T.let[T.int32] = warp * (2 * TILE)
        windows: T.let[T.int32] = T.truncdiv(k + (C - 1), C)
        at: T.let[T.int32] = strip * windows + warp
        for i in T.unroll(8 * NT):
            sums[i] = T.float32(0)
        for t in T.unroll(NT):  # the sums of tokens past the last one are not stored
            rows[t] = T.min(first + t * 8 + g, tokens - 1) * k
        if warp < windows:
            fetch(S, base, values, starts[at], starts[at + 1] - starts[at], lane)
            call("spa_load8_once", T.address_of(coming[0]), T.address_of(masks[(at * 32 + lane) * 2]))
            for half in T.unroll(2):
                load_tokens(xs, half * (4 * NT), X, rows, NT, warp * C + half * 32 + q * 8, k, 2)
        call("spa_cp_async_commit")
        for i in T.serial(T.truncdiv(windows - warp + (W - 1), W)):
            window: T.let[T.int32] = warp + i * W
            for j in T.unroll(2):
                bits[j] = coming[j]
            if window + W < windows:
                after: T.let[T.int32] = at + (i + 1) * W
                fetch(S, base + (i + 1) % 2 * TILE, values, starts[after], starts[after + 1] - starts[after], lane)
                call("spa_load8_once", T.address_of(coming[0]), T.address_of(masks[(after * 32 + lane) * 2]))
            call("spa_cp_async_commit")
            # values of the lanes before this one, and where they end in shared memory
            mine: T.let[T.int32] = T.call_extern("int32", "spa_popc", bits[0]) + T.call_extern(
                "int32", "spa_popc", bits[1]
            )
            place[0] = base + i % 2 * TILE + T.call_extern("int32", "spa_before", mine) * 2
            call("spa_cp_async_wait1")
            syncwarp()
            for half in T.unroll(2):
                multiply(sums, S, bits, place, xs, half)
                if window + W < windows:
                    load_tokens(xs, half * (4 * NT), X, rows, NT, (window + W) * C + half * 32 + q * 8, k, 2)
            syncwarp()
        call("spa_cp_async_wait0")
        T.tvm_storage_sync("shared.dyn")
        finish(S, sums, Y, bias, residual, dtype, epilogue, tile, W, strip, first, warp, lane, n, tokens, low, high)

    return bitmap
