"""Low rank for few tokens, in one kernel: y = act(U (V x) + b [+ residual]), where V x stays in shared memory.

    W [n, k] = U [n, rank] V [rank, k]

    chunk    32 columns (fp32: 16): 16 bytes of each of four lanes

    v   uint32 [chunks of k, tiles of 16 ranks x 2 steps x 32 lanes, 4]
    u   uint32 [strips of 16 rows, chunks of rank x 2 steps x 32 lanes, 4]

    Fragments of an mma with 16 rows. Lane 4 g + q has rows g and g + 8 and of a chunk columns 8 q .. 8 q + 7 (fp32: 4 q
    .. 4 q + 3), the first half of them in step 0: words are row g, row g + 8 of the first quarter of the eight (four),
    then of the second quarter.

Every block computes all of V x for itself: its warps share k, their sums meet in shared memory, where V x is rounded to
the model's type, as a tensor between two operators would be. Then a warp has a strip of U. That is a launch less, and
between (rank + tokens) k numbers from L2 for each block: the faster way as long as these arrive within what a launch
takes, on an H200 for (rank + tokens) k up to some 65 000 numbers of 16 bits. Beyond, two operators are faster, which
`placement/gpu_low_rank.py` compares, and larger ranks have no kernel here. A weight that is sparse + low rank is two
nodes: a sparse kernel with bias and activation, whose residual is the result of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm.script import tirx as T

from spa_compiler.kernels.cuda.arrays import Array, Extent
from spa_compiler.kernels.cuda.form import F32, Arrays, Dtype, Epilogue, Form, Kernel, Layout, from_bits, to_bits
from spa_compiler.kernels.cuda.roofline import microseconds
from spa_compiler.kernels.cuda.script import (
    add_up,
    as_float,
    as_uint,
    call,
    load_tokens,
    mma,
    narrowed,
    store_result,
    word_type,
)
from spa_compiler.kernels.vector import ANY
from spa_compiler.targets.cuda import Architecture

RANKS = (16, 32, 48, 64)
BINS = (8, 16)  # tokens of a thread block


def size(dtype: Dtype) -> int:
    """Bytes of a number."""
    return 4 if dtype == "fp32" else 2


def columns(dtype: Dtype) -> int:
    """Of a chunk."""
    return 64 // size(dtype)


@dataclass(frozen=True)
class LowRank:
    """The form: two factors of a rank of at most `rank`."""

    rank: int = 32
    rather: ClassVar[Form | None] = None

    def __post_init__(self) -> None:
        if self.rank not in RANKS:
            raise ValueError(f"there are kernels for ranks up to {', '.join(map(str, RANKS))}")

    @property
    def name(self) -> str:
        """`low rank 32`."""
        return f"low rank {self.rank}"

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ("v", "u")

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """Sizes alone: a kernel indexes with nothing that it reads."""
        chunks = -(-self.rank // columns(dtype))
        return (
            Array("v", "uint32", (Extent(columns=columns(dtype)), Extent(self.rank * 4), Extent(4))),
            Array("u", "uint32", (Extent(rows=16), Extent(chunks * 64), Extent(4))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """Both factors, as a share of `weight` [n, k]."""
        n, k = weight.shape
        return float(self.rank * (n + k) / (n * k))

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] by its singular vectors, each factor with the roots of the singular values.

        Raises:
            ValueError: more than `rank` singular values are above float32's noise.
        """
        left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        used = int((values > values.max(initial=0) * 1e-6).sum())
        if used > self.rank:
            raise ValueError(f"a weight of rank {used} is not one of rank {self.rank}")
        root = np.sqrt(values[:used])
        u, v = left[:, :used] * root, root[:, None] * right[:used]
        return self.pack_factors(u.astype(np.float32), v.astype(np.float32), dtype)

    def pack_factors(self, u: F32, v: F32, dtype: Dtype) -> Arrays:
        """Factors `u` [n, rank] and `v` [rank, k] as they are, rounded to `dtype`.

        Raises:
            ValueError: they are of a rank above this form's.
        """
        if u.shape[1] != len(v) or len(v) > self.rank:
            raise ValueError(f"factors {u.shape} and {v.shape} are none of rank {self.rank}")
        padded = np.zeros((self.rank, v.shape[1]), np.float32)
        padded[: len(v)] = v
        return {
            "v": np.ascontiguousarray(fragments(padded, dtype).transpose(1, 0, 2, 3, 4)).reshape(-1, self.rank * 4, 4),
            "u": fragments(u, dtype, self.rank).reshape(-(-len(u) // 16), -1, 4),
        }

    def factors(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> tuple[F32, F32]:
        """(u [n, rank], v [rank, k]) again."""
        v = arrays["v"].reshape(-1, self.rank // 16, 2, 32, 4).transpose(1, 0, 2, 3, 4)
        u = arrays["u"].reshape(len(arrays["u"]), -1, 2, 32, 4)
        return matrix(u, dtype)[:n, : self.rank], matrix(v, dtype)[:, :k]

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The product of the factors: [n, k]."""
        u, v = self.factors(arrays, n, k, dtype)
        product: F32 = u @ v
        return product

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """One, in rows, for up to 16 tokens."""
        if layout != "rows" or tokens > BINS[-1]:
            return []
        made = [kernel(dtype, epilogue, self.rank, next(b for b in BINS if tokens <= b))]
        return [one for one in made if one.fits(arch)]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """Microseconds: every block fetches V and x from L2."""
        each = 4 if "_fp32_" in kernel.name else 2
        fetched = arrays["v"].nbytes + min(tokens, kernel.tile_tokens) * k * each
        return microseconds(arch, kernel.grid(n, tokens), arrays["u"].nbytes, fetched, 0)


def fragments(values: F32, dtype: Dtype, width: int = 0) -> NDArray[np.uint32]:
    """A matrix as an mma takes it: uint32 [strips of 16 rows, chunks, 2 steps, 32 lanes, 4]; columns up to `width`."""
    rows, width = -(-len(values) // 16), max(width, values.shape[1])
    chunks, each = -(-width // columns(dtype)), 4 // size(dtype)
    padded = np.zeros((rows * 16, chunks * columns(dtype)), np.float32)
    padded[: len(values), : values.shape[1]] = values
    # [strip, half, g, chunk, q, step, quarter, number of a word] -> [strip, chunk, step, g, q, quarter, half, number]
    split = padded.reshape(rows, 2, 8, chunks, 4, 2, 2, each).transpose(0, 3, 5, 2, 4, 6, 1, 7)
    words = to_bits(np.ascontiguousarray(split), dtype).view(np.uint32)
    return words.reshape(rows, chunks, 2, 32, 4)


def matrix(words: NDArray[np.uint32], dtype: Dtype) -> F32:
    """What `fragments` made, with what it padded."""
    rows, chunks = words.shape[:2]
    each = 4 // size(dtype)
    split = np.ascontiguousarray(words).reshape(rows, chunks, 2, 8, 4, 2, 2, 1)
    numbers = from_bits(split.view(np.float32 if dtype == "fp32" else np.uint16), dtype)
    return numbers.reshape(rows, chunks, 2, 8, 4, 2, 2, each).transpose(0, 6, 3, 1, 4, 2, 5, 7).reshape(rows * 16, -1)


def kernel(dtype: Dtype, epilogue: Epilogue, rank: int, tokens: int) -> Kernel:
    """For tiles of `tokens` (one of `BINS`)."""
    warps = _warps(dtype, rank)
    return Kernel(
        f"spa_low_rank_{dtype}_{rank}_{tokens}_{epilogue}",
        lambda: _script(dtype, epilogue, rank, tokens),
        threads=32 * warps,
        tile_rows=16 * warps,
        tile_tokens=tokens,
        shared_bytes=_products(tokens, dtype, rank) + warps * 4 * tokens * (rank + 1),
    )


def _warps(dtype: Dtype, rank: int) -> int:
    return 8 if dtype == "fp32" and rank > 32 else 16  # as registers allow


def _pitch(dtype: Dtype, rank: int) -> int:
    """Numbers of a token's row of V x in shared memory: whole chunks, and 16 bytes more, for the sake of banks."""
    return -(-rank // columns(dtype)) * columns(dtype) + 16 // size(dtype)


def _products(tokens: int, dtype: Dtype, rank: int) -> int:
    return tokens * _pitch(dtype, rank) * size(dtype)


def _script(dtype, epilogue, rank, tile):
    NT = tile // 8
    W = _warps(dtype, rank)
    R = rank
    TILES = rank // 16
    C = columns(dtype)
    CHUNKS = -(-rank // C)
    SIZE = size(dtype)
    HP = _pitch(dtype, rank)
    SUMS = _products(tile, dtype, rank)  # bytes before the warps' sums
    PITCH = rank + 1
    SHARED = SUMS + W * 4 * tile * PITCH
    xtype = word_type(dtype)

    def load_fragments(into, at, words, index, count, lane):
        """`count` fragments that follow each other, into registers `at` and following."""
        with T.unroll(count) as i:
            where = T.address_of(words[((index + i) * 32 + lane) * 4])
            call("spa_load16_once", T.address_of(into[at + i * 4]), where)

    def to_tf32(words, count):
        if SIZE == 4:
            with T.unroll(count) as i:
                T.buffer_store(words, T.call_extern("uint32", "spa_to_tf32", as_float(words[i])), [i])

    def put(S, token, row, value):
        """A number of V x as the model's type."""
        where = T.address_of(S[(token * HP + row) * SIZE])
        if SIZE == 4:
            call("spa_store4", where, as_uint(value))
        else:
            call("spa_store2", where, T.Cast("uint32", narrowed(dtype, value)))

    @T.prim_func(s_tir=True)
    def low_rank(
        v_: T.handle("uint32"),
        u_: T.handle("uint32"),
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
        T.func_attr({"global_symbol": "low_rank", "tirx.noalias": True})
        V = T.decl_buffer((ANY,), "uint32", data=v_)
        U = T.decl_buffer((ANY,), "uint32", data=u_)
        X = T.decl_buffer((ANY,), xtype, data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), xtype, data=residual__)
        Y = T.decl_buffer((ANY,), xtype, data=y_)
        column_of_grid = T.launch_thread("blockIdx.x", T.ceildiv(tokens, tile))
        tile_of_rows = T.launch_thread("blockIdx.y", T.ceildiv(n, 16 * W))
        T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", 32 * W)
        S = T.alloc_buffer((SHARED,), "uint8", scope="shared.dyn")
        sums = T.alloc_buffer((4 * NT * TILES,), "float32", scope="local")
        y = T.alloc_buffer((4 * NT,), "float32", scope="local")
        xs = T.alloc_buffer((4 * NT,), "uint32", scope="local")
        these_xs = T.alloc_buffer((4 * NT,), "uint32", scope="local")
        rows = T.alloc_buffer((NT,), "int32", scope="local")
        vs = T.alloc_buffer((8 * TILES,), "uint32", scope="local")
        these = T.alloc_buffer((8,), "uint32", scope="local")
        us = T.alloc_buffer((8 * CHUNKS,), "uint32", scope="local")
        first: T.let[T.int32] = column_of_grid * tile
        warp: T.let[T.int32] = T.truncdiv(thread, 32)
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        g: T.let[T.int32] = T.truncdiv(lane, 4)
        q: T.let[T.int32] = T.truncmod(lane, 4)
        chunks: T.let[T.int32] = T.truncdiv(k + (C - 1), C)
        strip: T.let[T.int32] = tile_of_rows * W + warp
        for i in T.unroll(4 * NT * TILES):
            sums[i] = T.float32(0)
        for i in T.unroll(4 * NT):
            y[i] = T.float32(0)
        for t in T.unroll(NT):  # the sums of tokens past the last one are not stored
            rows[t] = T.min(first + t * 8 + g, tokens - 1) * k
        # U is on the way while V x is computed; of warps without a strip it is the last one
        load_fragments(us, 0, U, T.min(strip, T.truncdiv(n - 1, 16)) * (CHUNKS * 2), CHUNKS * 2, lane)
        if warp < chunks:
            load_fragments(vs, 0, V, warp * (TILES * 2), TILES * 2, lane)
            load_tokens(xs, 0, X, rows, NT, warp * C + q * (C // 4), k, SIZE)
        for i in T.serial(T.truncdiv(chunks - warp + (W - 1), W)):
            chunk: T.let[T.int32] = warp + i * W
            for j in T.unroll(4 * NT):
                these_xs[j] = xs[j]
            if chunk + W < chunks:
                load_tokens(xs, 0, X, rows, NT, (chunk + W) * C + q * (C // 4), k, SIZE)
            for m in T.unroll(TILES):
                for j in T.unroll(8):
                    these[j] = vs[m * 8 + j]
                if chunk + W < chunks:
                    load_fragments(vs, m * 8, V, ((chunk + W) * TILES + m) * 2, 2, lane)
                to_tf32(these, 8)
                for step in T.unroll(2):
                    for t in T.unroll(NT):
                        call(
                            mma(dtype),
                            T.address_of(sums[(m * NT + t) * 4]),
                            T.address_of(these[step * 4]),
                            T.address_of(these_xs[t * 4 + step * 2]),
                        )
        for m in T.unroll(TILES):
            for t in T.unroll(NT):
                for j in T.unroll(4):
                    where: T.let[T.int32] = (
                        (warp * tile + t * 8 + q * 2 + j % 2) * PITCH + m * 16 + T.truncdiv(j, 2) * 8 + g
                    )
                    call("spa_store4", T.address_of(S[SUMS + where * 4]), as_uint(sums[(m * NT + t) * 4 + j]))
        T.tvm_storage_sync("shared.dyn")
        for i in T.serial(-(-tile * C * CHUNKS // (32 * W))):
            token: T.let[T.int32] = T.truncdiv(i * (32 * W) + thread, C * CHUNKS)
            row: T.let[T.int32] = T.truncmod(i * (32 * W) + thread, C * CHUNKS)
            total = T.alloc_buffer((1,), "float32", scope="local")
            total[0] = T.float32(0)
            if token < tile:
                if row < R:
                    add_up(S, total, W, tile * PITCH, SUMS // 4 + token * PITCH + row)
                put(S, token, row, total[0])
        T.tvm_storage_sync("shared.dyn")
        to_tf32(us, 8 * CHUNKS)
        for chunk in T.unroll(CHUNKS):
            for t in T.unroll(NT):
                product: T.let[T.int32] = ((t * 8 + g) * HP + chunk * C + q * (C // 4)) * SIZE
                call("spa_load16", T.address_of(these_xs[t * 4]), T.address_of(S[product]))
            to_tf32(these_xs, 4 * NT)
            for step in T.unroll(2):
                for t in T.unroll(NT):
                    call(
                        mma(dtype),
                        T.address_of(y[t * 4]),
                        T.address_of(us[(chunk * 2 + step) * 4]),
                        T.address_of(these_xs[t * 4 + step * 2]),
                    )
        for t in T.unroll(NT):
            for j in T.unroll(4):
                column: T.let[T.int32] = first + t * 8 + q * 2 + j % 2
                out_row: T.let[T.int32] = strip * 16 + T.truncdiv(j, 2) * 8 + g
                if T.And(out_row < n, column < tokens):
                    value = T.alloc_buffer((1,), "float32", scope="local")
                    value[0] = y[t * 4 + j] + bias[out_row]
                    store_result(Y, residual, value, column * n + out_row, dtype, epilogue, low, high)

    return low_rank
