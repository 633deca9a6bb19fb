"""2:4: of every four inputs of an output at most two count, and sparse tensor cores skip the others.

    W [n, k]   a . . b   . . c d        kept    a b  c d
                                        places  0 3  2 3   two bits each, the lower place first

`mma.sp` multiplies 16 outputs and 32 inputs, of which it is given 16 and their places, with 8 tokens, in the time that
16 inputs take. Where an output keeps fewer than two of four, zeros fill up.

    values uint16 [ceil(n / 16), ceil(k / 64), 512]   two steps of 32 inputs; in a step lane 4 g + t of a warp finds
    its four
                                                      words behind each other: kept numbers 2 t, 2 t + 1 of row g, of
                                                      row g + 8, then 2 t + 8, 2 t + 9 of both
    places uint32 [ceil(n / 16), ceil(k / 64), 32]    a word for each lane: t = 0, 1 hold those of the first step,
    inputs 0..15
                                                      and 16..31, t = 2, 3 those of the second; low half row g, high
                                                      half row g + 8

The outputs are the long side of a product in both layouts, since only that side may be sparse. So in `rows` two sums
of a lane are results of two tokens, and results go through shared memory number by number.

What bounds it. Nothing is left out of the way from L2, so a tile of 256 x 128 does 128 useful operations for each byte
of its halved weight and its activations together, more than it needs on any of these chips; the tensor cores are what
counts. On sm_80 to sm_89 they do twice as much as dense. On Hopper `mma.sp` reaches, as `mma.sync` does, some 62 % of
the peak that only wgmma gives, so at best 1.2 times what dense cuBLAS does there.

Reference: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021; PTX ISA, "Sparse matrix storage".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm.script import tirx as T

from spa_compiler.kernels.cuda.activations import align_of, fetch, load_four, tile_words
from spa_compiler.kernels.cuda.arrays import Array, Extent
from spa_compiler.kernels.cuda.form import (
    F32,
    Arrays,
    Dtype,
    Epilogue,
    Form,
    Kernel,
    Layout,
    from_bits,
    to_bits,
)
from spa_compiler.kernels.cuda.roofline import in_waves
from spa_compiler.kernels.cuda.script import call
from spa_compiler.kernels.cuda.sums import ANY, Tile, finish, finish_bytes
from spa_compiler.targets.cuda import Architecture

DEPTH = 64  # inputs of a stage
PIECE = 256 + 32  # words of 16 outputs in a stage: values, places

TILES = (
    Tile(256, 128, 2, 4, 3),
    Tile(128, 128, 2, 4, 3, 2),
    Tile(128, 64, 2, 2, 4, 2),
    Tile(64, 64, 1, 4, 4, 2),
    Tile(32, 32, 1, 2, 4, 4),
)


@dataclass(frozen=True)
class TwoFour:
    """The form."""

    rather: ClassVar[Form | None] = None

    @property
    def name(self) -> str:
        """`2:4`."""
        return "2:4"

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ("values", "places")

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """See `arrays.py`. Places are read by tensor cores alone, which index nothing with them."""
        return (
            Array("values", "uint16", (Extent(rows=16), Extent(columns=DEPTH), Extent(512))),
            Array("places", "uint32", (Extent(rows=16), Extent(columns=DEPTH), Extent(32))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """A half, and two bits for each number of it; a weight that has more is not tried."""
        n, k = weight.shape
        return 0.5 + 1 / 16 if np.count_nonzero(weight) <= 2 * n * -(-k // 4) else 1.0

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> arrays; n and k may be anything, edges are filled with zeros.

        Raises:
            ValueError: an output keeps more than two of four inputs, or `dtype` is fp32.
        """
        if dtype == "fp32":
            raise ValueError("2:4 has no kernels for float32")
        n, k = weight.shape
        rows, stages = -(-n // 16), -(-k // DEPTH)
        padded = np.zeros((16 * rows, DEPTH * stages), np.float32)
        padded[:n, :k] = weight
        fours = padded.reshape(len(padded), -1, 4)
        if (np.count_nonzero(fours, axis=2) > 2).any():
            raise ValueError("an output keeps more than two of four inputs")
        # The two largest places by "is kept", zeros that fill up come first; then in their own order.
        kept = np.sort(np.argsort(fours != 0, axis=2, kind="stable")[:, :, 2:], axis=2)
        values = np.take_along_axis(fours, kept, axis=2)
        nibbles = (kept[..., 0] | kept[..., 1] << 2).astype(np.uint32)
        # [piece, half, g, stage, step, ...] -> lanes
        cut = values.reshape(rows, 2, 8, stages, 2, 2, 4, 2)  # ..., half of the kept, t, number of a word
        words = cut.transpose(0, 3, 4, 2, 6, 5, 1, 7).reshape(rows, stages, 512)
        # [piece, half, g, stage, step, inputs 0..15 or 16..31, group of four]
        parts = nibbles.reshape(rows, 2, 8, stages, 2, 2, 4) << (4 * np.arange(4, dtype=np.uint32))
        halves = parts.sum(axis=-1, dtype=np.uint32)
        both = halves[:, 0] | halves[:, 1] << np.uint32(16)  # [piece, g, stage, step, inputs]
        places = both.transpose(0, 2, 1, 3, 4).reshape(rows, stages, 32)
        return {"values": to_bits(words, dtype), "places": np.ascontiguousarray(places)}

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The weight [n, k] again, rounded to `dtype`."""
        rows, stages, _ = arrays["values"].shape
        words = from_bits(arrays["values"], dtype).reshape(rows, stages, 2, 8, 4, 2, 2, 2)
        values = words.transpose(0, 6, 3, 1, 2, 5, 4, 7).reshape(16 * rows, stages * DEPTH // 4, 2)
        both = arrays["places"].reshape(rows, stages, 8, 2, 2).transpose(0, 2, 1, 3, 4)
        halves = np.stack([both & 0xFFFF, both >> 16], axis=1)  # [piece, half, g, stage, step, inputs]
        nibbles = (halves[..., None] >> (4 * np.arange(4, dtype=np.uint32)) & 15).reshape(16 * rows, -1)
        kept = np.stack([nibbles & 3, nibbles >> 2], axis=-1).astype(np.int64)
        fours = np.zeros((16 * rows, stages * DEPTH // 4, 4), np.float32)
        np.put_along_axis(fours, kept, values, axis=2)
        return fours.reshape(16 * rows, -1)[:n, :k]

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """None for fp32; else those whose tokens do not exceed what there is to do by more than half."""
        if dtype == "fp32":
            return []
        made = [kernel(tile, dtype, layout, epilogue) for tile in TILES]
        return [k for k in made if k.fits(arch) and k.tile_tokens <= max(32, 2 * tokens)]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """A roofline of tensor cores, L2, memory and the latency of a thread block, in whole waves."""
        grid = kernel.grid(n, tokens, batch)
        all_stages = grid[0] * grid[1] * batch * -(-k // DEPTH)
        return in_waves(
            arch,
            kernel,
            grid,
            operations=2.0 * all_stages * DEPTH * kernel.tile_rows * kernel.tile_tokens,
            rate=2 * arch.tflops("fp16") * 0.8e6,
            l2=all_stages * (DEPTH * kernel.tile_tokens * 2 + kernel.tile_rows // 16 * PIECE * 4),
            dram=sum(a.nbytes for a in arrays.values()) + 2 * (k + n) * tokens * batch,
            latency=-(-k // DEPTH) * _STAGE_US,
        )


_STAGE_US = 0.1  # of a stage whose data are there


def kernel(tile: Tile, dtype: Dtype, layout: Layout, epilogue: Epilogue) -> Kernel:
    """One variant."""
    return Kernel(
        f"spa_two_four_{tile}_{dtype}_{layout}_{epilogue}",
        functools.partial(_script, tile, dtype, layout, epilogue),
        threads=tile.threads,
        tile_rows=tile.group,
        tile_tokens=tile.tokens,
        shared_bytes=_shared_bytes(tile, dtype, layout),
        min_blocks=tile.min_blocks,
    )


def _stage_words(tile: Tile, dtype: Dtype) -> int:
    words: int = tile_words(tile, dtype, DEPTH)
    return words + tile.group // 16 * PIECE


def _shared_bytes(tile: Tile, dtype: Dtype, layout: Layout) -> int:
    return max(tile.stages * _stage_words(tile, dtype) * 4, finish_bytes(tile, dtype, layout))


def _script(tile: Tile, dtype: Dtype, layout: Layout, epilogue: Epilogue) -> Any:
    TT, S, NT = tile.tokens, tile.stages, tile.threads
    PIECES, OWN = tile.group // 16, tile.warp_rows // 16  # of the thread block, of a warp
    J = tile.warp_tokens // 8
    X_WORDS, STAGE = tile_words(tile, dtype, DEPTH), _stage_words(tile, dtype)
    rows = layout == "rows"

    @T.prim_func(s_tir=True)
    def two_four(
        values_: T.handle("uint32"),
        places_: T.handle("uint32"),
        x_: T.handle("uint16"),
        bias_: T.handle("float32"),
        residual_: T.handle("uint16"),
        y_: T.handle("uint16"),
        n: T.int32,
        k: T.int32,
        tokens: T.int32,
        batch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": "two_four", "tirx.noalias": True})
        values = T.decl_buffer((ANY,), "uint32", data=values_)
        places = T.decl_buffer((ANY,), "uint32", data=places_)
        x = T.decl_buffer((ANY,), "uint16", data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), "uint16", data=residual_)
        y = T.decl_buffer((ANY,), "uint16", data=y_)
        block_x = T.launch_thread("blockIdx.x", T.ceildiv(tokens, TT))
        block_y = T.launch_thread("blockIdx.y", T.ceildiv(n, tile.group))
        image = T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", NT)
        shared = T.alloc_buffer((_shared_bytes(tile, dtype, layout) // 4,), "uint32", scope="shared.dyn")
        acc = T.alloc_buffer((OWN * J * 4,), "float32", scope="local")
        xf = T.alloc_buffer((2 * J * 4,), "uint32", scope="local")
        w = T.alloc_buffer((4,), "uint32", scope="local")
        slot = T.alloc_buffer((2,), "int32", scope="local")

        # Outputs run first, so that thread blocks that run at a time share their activations in L2.
        linear: T.let[T.int32] = block_y * T.ceildiv(tokens, TT) + block_x
        group: T.let[T.int32] = T.truncmod(linear, T.ceildiv(n, tile.group))
        token: T.let[T.int32] = T.truncdiv(linear, T.ceildiv(n, tile.group)) * TT
        x_image: T.let[T.int32] = image * k * tokens
        y_image: T.let[T.int32] = image * n * tokens
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        part: T.let[T.int32] = T.truncdiv(T.truncdiv(thread, 32), tile.along)
        first_token: T.let[T.int32] = T.truncmod(T.truncdiv(thread, 32), tile.along) * tile.warp_tokens
        count: T.let[T.int32] = T.ceildiv(k, DEPTH)
        # Pieces of 16 outputs that there are, from this group's first on.
        there: T.let[T.int32] = T.min(PIECES, T.ceildiv(n, 16) - group * PIECES)
        x_align: T.let[T.int32] = align_of(k if rows else tokens, 2)
        y_align: T.let[T.int32] = align_of(n if rows else tokens, 2)

        for i in T.unroll(OWN * J * 4):
            acc[i] = T.float32(0)
        slot[0] = 0  # of the stage to multiply
        slot[1] = 0  # of the stage to fetch
        for i in T.serial(count + S - 1):
            if i >= S - 1:
                call(f"spa_cp_async_wait{S - 2}")
                T.tvm_storage_sync("shared")
            if i < count:
                fetch(
                    tile,
                    dtype,
                    layout,
                    DEPTH,
                    shared,
                    slot[1] * STAGE,
                    x,
                    x_image,
                    i * DEPTH,
                    token,
                    thread,
                    k,
                    tokens,
                    x_align,
                )
                for c in T.unroll((PIECES * 72 + NT - 1) // NT):
                    piece: T.let[T.int32] = T.truncdiv(c * NT + thread, 72)
                    chunk: T.let[T.int32] = T.truncmod(c * NT + thread, 72)
                    stored: T.let[T.int32] = (group * PIECES + piece) * count + i
                    to: T.let[T.int32] = slot[1] * STAGE + X_WORDS + piece * PIECE + chunk * 4
                    if piece < there:
                        if chunk < 64:
                            call(
                                "spa_cp_async16",
                                T.address_of(shared[to]),
                                T.address_of(values[stored * 256 + chunk * 4]),
                            )
                        else:
                            call(
                                "spa_cp_async16",
                                T.address_of(shared[to]),
                                T.address_of(places[stored * 32 + (chunk - 64) * 4]),
                            )
                slot[1] = T.if_then_else(slot[1] == S - 1, 0, slot[1] + 1)
            call("spa_cp_async_commit")
            if i >= S - 1:
                for step in T.unroll(2):
                    load_four(
                        tile,
                        dtype,
                        layout,
                        DEPTH,
                        xf,
                        step * (4 * J),
                        shared,
                        slot[0] * STAGE,
                        step,
                        first_token,
                        lane,
                    )
                for own in T.unroll(OWN):
                    if part * OWN + own < there:
                        start: T.let[T.int32] = slot[0] * STAGE + X_WORDS + (part * OWN + own) * PIECE
                        word: T.let[T.uint32] = shared[start + 256 + lane]
                        for step in T.unroll(2):
                            call("spa_load16", T.address_of(w[0]), T.address_of(shared[start + step * 128 + lane * 4]))
                            for j in T.unroll(J):
                                if step == 0:
                                    call(
                                        f"spa_mma_sparse_{dtype}_first",
                                        T.address_of(acc[(own * J + j) * 4]),
                                        T.address_of(w[0]),
                                        T.address_of(xf[j * 4]),
                                        word,
                                    )
                                else:
                                    call(
                                        f"spa_mma_sparse_{dtype}_second",
                                        T.address_of(acc[(own * J + j) * 4]),
                                        T.address_of(w[0]),
                                        T.address_of(xf[(J + j) * 4]),
                                        word,
                                    )
                slot[0] = T.if_then_else(slot[0] == S - 1, 0, slot[0] + 1)

        finish(
            tile,
            dtype,
            layout,
            epilogue,
            acc,
            shared,
            bias,
            residual,
            y,
            y_image,
            lambda row: group * tile.group + row,
            part,
            first_token,
            token,
            thread,
            n,
            tokens,
            y_align,
            low,
            high,
            outputs_long=True,
        )

    return two_four
