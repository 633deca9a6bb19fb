"""Products of blocks and activations on tensor cores: the script of `blocks.py`."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from spa_compiler.kernels.cuda.activations import align_of, fetch, load_operands, tile_words
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, Layout
from spa_compiler.kernels.cuda.script import call, mma
from spa_compiler.kernels.cuda.sums import ANY, Tile, finish, finish_bytes, multiply


def shared_bytes(size: int, tile: Tile, dtype: Dtype, layout: Layout) -> int:
    """Stages, or the results that are put together where they were."""
    per_stage = max(1, 32 // size)
    stage = per_stage * size * (tile.tokens + tile.group) * (4 if dtype == "fp32" else 2)
    return max(tile.stages * stage, finish_bytes(tile, dtype, layout))


def script(size: int, tile: Tile, dtype: Dtype, layout: Layout, epilogue: Epilogue) -> Any:
    """The kernel for blocks of size x size."""
    E = 4 if dtype == "fp32" else 2  # bytes of a number
    U, P = tile.group // size, max(1, 32 // size)
    G, TT, S, NT = tile.group, tile.tokens, tile.stages, tile.threads
    KS = size * E // 32  # steps of 32 bytes along a block's columns
    KC = min(KS, 2)  # of which so many have their operands in registers
    RP = size // 16  # pieces of 16 rows
    UW = U // tile.across  # places of a warp
    J = tile.warp_tokens // 8
    BLOCK = size * size * E // 4  # words
    X_WORDS = tile_words(tile, dtype, size)  # of a column
    STAGE = P * (X_WORDS + U * BLOCK)
    rows = layout == "rows"
    number = "uint32" if dtype == "fp32" else "uint16"
    product = mma(dtype)

    @T.prim_func(s_tir=True)
    def blocks(
        indptr_: T.handle("int32"),
        order_: T.handle("int32"),
        columns_: T.handle("int32"),
        firsts_: T.handle("int32"),
        masks_: T.handle("uint32"),
        values_: T.handle("uint32"),
        x_: T.handle(number),
        bias_: T.handle("float32"),
        residual_: T.handle(number),
        y_: T.handle(number),
        n: T.int32,
        k: T.int32,
        tokens: T.int32,
        batch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": "blocks", "tirx.noalias": True})
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "int32", data=columns_)
        firsts = T.decl_buffer((ANY,), "int32", data=firsts_)
        masks = T.decl_buffer((ANY,), "uint32", data=masks_)
        values = T.decl_buffer((ANY,), "uint32", data=values_)
        x = T.decl_buffer((ANY,), number, data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), number, data=residual_)
        y = T.decl_buffer((ANY,), number, data=y_)
        block_x = T.launch_thread("blockIdx.x", T.ceildiv(tokens, TT))
        block_y = T.launch_thread("blockIdx.y", T.ceildiv(n, G))
        image = T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", NT)
        shared = T.alloc_buffer((shared_bytes(size, tile, dtype, layout) // 4,), "uint32", scope="shared.dyn")
        acc = T.alloc_buffer((UW * RP * J * 4,), "float32", scope="local")
        xf = T.alloc_buffer((KC * 2 * J,), "uint32", scope="local")
        w = T.alloc_buffer((4,), "uint32", scope="local")
        b = T.alloc_buffer((4,), "uint32", scope="local")
        column = T.alloc_buffer((P,), "int32", scope="local")
        first = T.alloc_buffer((P + 1,), "int32", scope="local")
        slot = T.alloc_buffer((2,), "int32", scope="local")

        # Groups run first, so that those that run at a time share their activations in L2.
        linear: T.let[T.int32] = block_y * T.ceildiv(tokens, TT) + block_x
        group: T.let[T.int32] = T.truncmod(linear, T.ceildiv(n, G))
        token: T.let[T.int32] = T.truncdiv(linear, T.ceildiv(n, G)) * TT
        x_image: T.let[T.int32] = image * k * tokens
        y_image: T.let[T.int32] = image * n * tokens
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        # Warps 0 to 3, one for each scheduler, differ in their tokens where there are as many parts of them: then all
        # schedulers have the same to do, whatever rows a column has.
        part: T.let[T.int32] = T.truncdiv(T.truncdiv(thread, 32), tile.along)
        first_token: T.let[T.int32] = T.truncmod(T.truncdiv(thread, 32), tile.along) * tile.warp_tokens
        begin: T.let[T.int32] = indptr[group]
        count: T.let[T.int32] = indptr[group + 1] - begin
        x_align: T.let[T.int32] = align_of(k if rows else tokens, E)
        y_align: T.let[T.int32] = align_of(n if rows else tokens, E)

        for i in T.unroll(UW * RP * J * 4):
            acc[i] = T.float32(0)
        # What is to be fetched next is read ahead.
        for p in T.unroll(P):
            column[p] = T.if_then_else(count > 0, columns[begin * P + p], 0)
        for p in T.unroll(P + 1):
            first[p] = T.if_then_else(count > 0, firsts[begin * P + p], 0)
        slot[0] = 0  # of the stage to multiply
        slot[1] = 0  # of the stage to fetch
        for i in T.serial(count + S - 1):
            if i >= S - 1:
                call(f"spa_cp_async_wait{S - 2}")
                T.tvm_storage_sync("shared")
            if i < count:
                for p in T.unroll(P):
                    fetch(
                        tile,
                        dtype,
                        layout,
                        size,
                        shared,
                        slot[1] * STAGE + p * X_WORDS,
                        x,
                        x_image,
                        column[p] * size,
                        token,
                        thread,
                        k,
                        tokens,
                        x_align,
                    )
                    stored: T.let[T.int32] = T.min(first[p + 1] - first[p], U) * (BLOCK // 4)
                    for c in T.serial(T.ceildiv(stored, NT)):
                        if c * NT + thread < stored:
                            call(
                                "spa_cp_async16",
                                T.address_of(
                                    shared[slot[1] * STAGE + P * X_WORDS + p * (U * BLOCK) + (c * NT + thread) * 4]
                                ),
                                T.address_of(values[first[p] * BLOCK + (c * NT + thread) * 4]),
                            )
                slot[1] = T.if_then_else(slot[1] == S - 1, 0, slot[1] + 1)
                if i + 1 < count:
                    for p in T.unroll(P):
                        column[p] = columns[(begin + i + 1) * P + p]
                    for p in T.unroll(P + 1):
                        first[p] = firsts[(begin + i + 1) * P + p]
            call("spa_cp_async_commit")
            if i >= S - 1:
                for p in T.unroll(P):
                    mask: T.let[T.uint32] = masks[(begin + i - (S - 1)) * P + p]
                    own: T.let[T.uint32] = T.bitwise_and(
                        T.shift_right(mask, T.Cast("uint32", part * UW)), T.uint32(2**UW - 1)
                    )
                    before: T.let[T.int32] = T.call_extern(
                        "int32",
                        "spa_popc",
                        T.bitwise_and(mask, T.shift_left(T.uint32(1), T.Cast("uint32", part * UW)) - T.uint32(1)),
                    )
                    if own != T.uint32(0):
                        for step in T.unroll(KS // KC):
                            for ks in T.unroll(KC):
                                load_operands(
                                    tile,
                                    dtype,
                                    layout,
                                    size,
                                    xf,
                                    ks * (2 * J),
                                    shared,
                                    slot[0] * STAGE + p * X_WORDS,
                                    step * KC + ks,
                                    first_token,
                                    lane,
                                )
                            for u in T.unroll(UW):
                                if T.bitwise_and(T.shift_right(own, T.Cast("uint32", u)), T.uint32(1)) != T.uint32(0):
                                    at: T.let[T.int32] = before + T.call_extern(
                                        "int32",
                                        "spa_popc",
                                        T.bitwise_and(
                                            own, T.shift_left(T.uint32(1), T.Cast("uint32", u)) - T.uint32(1)
                                        ),
                                    )
                                    for ks in T.unroll(KC):
                                        for r in T.unroll(RP):
                                            call(
                                                "spa_load16",
                                                T.address_of(w[0]),
                                                T.address_of(
                                                    shared[
                                                        slot[0] * STAGE
                                                        + P * X_WORDS
                                                        + (p * U + at) * BLOCK
                                                        + (r * KS + step * KC + ks) * 128
                                                        + lane * 4
                                                    ]
                                                ),
                                            )
                                            multiply(
                                                product, rows, J, acc, (u * RP + r) * J * 4, xf, ks * (2 * J), w, b
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
            lambda row: order[group * U + T.truncdiv(row, size)] * size + T.truncmod(row, size),
            part,
            first_token,
            token,
            thread,
            n,
            tokens,
            y_align,
            low,
            high,
        )

    return blocks
