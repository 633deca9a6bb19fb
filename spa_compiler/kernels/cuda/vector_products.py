"""Products of columns of outputs and gathered activations on tensor cores: the script of `vectors.py`.

A warp has a piece of 32 outputs and all tokens of its thread block. Slabs of activations go through shared memory for
all warps, with one barrier each; steps go through a ring of the warp's own, which it fills up once for each slab. If a
slab has more steps than have come, the warp waits for itself.

    slab              begins to come    has come             is transposed    is multiplied
    rows, 16 bits     i                 i - stages + 1       then             one later
    all others        i                 i - stages + 1                        then
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from spa_compiler.kernels.cuda.activations import align_of, fetch, place, tile_words
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, Layout
from spa_compiler.kernels.cuda.script import as_float, call, mma
from spa_compiler.kernels.cuda.sums import ANY, Tile, finish, finish_bytes, multiply

PIECE = 32
"""Outputs of a warp."""

BACK = 7
"""Slabs before its own that a step may have columns of."""

HELD = 8
"""Steps in the ring of a warp, a power of two."""


def slab_of(dtype: Dtype) -> int:
    """Inputs of a slab: 128 bytes of a token."""
    return 32 if dtype == "fp32" else 64


def step_of(dtype: Dtype) -> int:
    """Columns of a step: 32 bytes of a token."""
    return 8 if dtype == "fp32" else 16


def transposed(dtype: Dtype, layout: Layout) -> bool:
    """Whether activations come as lines of inputs and are multiplied as lines of tokens."""
    return layout == "rows" and dtype != "fp32"


def shared_bytes(size: int, tile: Tile, dtype: Dtype, layout: Layout) -> int:
    """Slabs and steps, or the results that are put together where they were."""
    slabs = _slabs(tile, dtype, layout) + (tile.stages if transposed(dtype, layout) else 0)
    words: int = slabs * tile_words(tile, dtype, slab_of(dtype))
    steps = tile.across * HELD * (32 * size + 2 * step_of(dtype))
    return max(4 * words + steps, finish_bytes(tile, dtype, layout))


def _slabs(tile: Tile, dtype: Dtype, layout: Layout) -> int:
    """In the ring: those that are multiplied, and what comes meanwhile."""
    return BACK + 1 + (1 if transposed(dtype, layout) else tile.stages - 1)


def script(size: int, tile: Tile, dtype: Dtype, layout: Layout, epilogue: Epilogue) -> Any:
    """The kernel for columns of `size`."""
    E = 4 if dtype == "fp32" else 2  # bytes of a number
    TT, NT, D = tile.tokens, tile.threads, tile.stages - 1
    K, NR, TURN = slab_of(dtype), _slabs(tile, dtype, layout), transposed(dtype, layout)
    GW = PIECE // size  # groups of a warp
    J = TT // 8
    STEP, LIST = 8 * size, step_of(dtype) // 2  # words of a step's values and of its columns
    SLAB = tile_words(tile, dtype, K)
    COMING = NR * SLAB  # where slabs come that are to be transposed
    VALUES = COMING + (tile.stages * SLAB if TURN else 0)
    COLUMNS = VALUES + tile.across * HELD * STEP
    LATER = D + 1 if TURN else D  # slabs from its coming to its products
    rows = layout == "rows"
    tokens_long = rows or size == 8
    number = "uint32" if dtype == "fp32" else "uint16"
    product = mma(dtype)

    def top_up(shared: Any, values: Any, columns: Any, fetched: Any, until: Any, warp: Any, lane: Any) -> None:
        """Begins to copy the steps from fetched[0] up to `until`."""
        more = T.bind(until - fetched[0])
        with T.serial(T.ceildiv(more * (STEP // 4), 32)) as c:
            step = T.bind(fetched[0] + T.truncdiv(c * 32 + lane, STEP // 4))
            part = T.bind(T.truncmod(c * 32 + lane, STEP // 4) * 4)
            slot = T.bind(warp * HELD + T.bitwise_and(step, HELD - 1))
            with T.If(step < until), T.Then():
                call(
                    "spa_cp_async16",
                    T.address_of(shared[VALUES + slot * STEP + part]),
                    T.address_of(values[step * STEP + part]),
                )
        with T.If(lane < more * (LIST // 4)), T.Then():
            step = T.bind(fetched[0] + T.truncdiv(lane, LIST // 4))
            part = T.bind(T.truncmod(lane, LIST // 4) * 4)
            slot = T.bind(warp * HELD + T.bitwise_and(step, HELD - 1))
            call(
                "spa_cp_async16",
                T.address_of(shared[COLUMNS + slot * LIST + part]),
                T.address_of(columns[step * LIST + part]),
            )
        T.buffer_store(fetched, until, [0])

    def turn(shared: Any, i: Any, warp: Any, lane: Any) -> None:
        """Transposes slab i - D: pieces of 32 tokens x 8 inputs."""
        parts = TT // 32 * (K // 8)
        source = T.bind(COMING + T.truncmod(i - D, tile.stages) * SLAB)
        target = T.bind(T.truncmod(i - D, NR) * K)
        r = T.alloc_buffer((4,), "uint32", scope="local")
        with T.unroll(-(-parts // tile.across)) as p:
            part = p * tile.across + warp
            chunk, token = T.bind(T.truncmod(part, K // 8)), T.bind(T.truncdiv(part, K // 8) * 32)
            at = source + place(dtype, "rows", token + lane, chunk, K // 8)
            call("spa_ldmatrix_x4_trans", T.address_of(r[0]), T.address_of(shared[at]))
            line = target + chunk * 8 + T.truncdiv(lane, 4)
            for m in range(4):
                to = place(dtype, "planes", line, T.truncdiv(token, 8) + m, TT // 8) + T.truncmod(lane, 4)
                T.buffer_store(shared, r[m], [to])

    def line_of(window: Any, column: Any) -> Any:
        """The line of the ring that a column is; `window` is the first that a step may have."""
        line = T.bind(window + T.Cast("int32", column))
        return T.bind(T.if_then_else(line >= NR * K, line - NR * K, line))

    def gather(xf: Any, shared: Any, at: Any, window: Any, lane: Any) -> None:
        """Operands of all tokens and the columns at word `at`, as `load_operands` gives them of a dense tile."""
        where = T.address_of(shared[at])
        matrix = T.truncdiv(lane, 8)
        if dtype != "fp32":
            # (columns, tokens): A (0, 0), (0, 1), (1, 0), (1, 1); B (0, 0), (1, 0), (0, 1), (1, 1)
            upper, second = T.truncdiv(matrix, 2), T.truncmod(matrix, 2)
            half, eight = (upper, second) if tokens_long else (second, upper)
            own = (half * 8 + T.truncmod(lane, 8)) * 2
            line = line_of(window, T.call_extern("uint32", "spa_load2_at", where, own))
            first = T.bind(place(dtype, "planes", line, eight, TT // 8))
            for pair in range(TT // 16):  # chunks of a line are permuted by XOR
                call(
                    "spa_ldmatrix_x4_trans",
                    T.address_of(xf[4 * pair]),
                    T.address_of(shared[T.bitwise_xor(first, pair * 8)]),
                )
            return
        g, t = T.truncdiv(lane, 4), T.truncmod(lane, 4)
        lines = [
            line_of(window, T.call_extern("uint32", "spa_load2_at", where, (t + 4 * half) * 2)) for half in range(2)
        ]
        for pair in range(TT // 16):
            for i in range(4):
                half, eight = (i // 2, i % 2) if tokens_long else (i % 2, i // 2)
                line, token = lines[half], 16 * pair + 8 * eight + g
                if rows:  # a slab is lines of inputs, one a token
                    inside = T.truncmod(line, K)
                    word = T.truncdiv(line, K) * SLAB + T.truncmod(inside, 4)
                    word = word + place(dtype, layout, token, T.truncdiv(inside, 4), K // 4)
                else:
                    word = place(dtype, layout, line, T.truncdiv(token, 4), TT // 4) + T.truncmod(token, 4)
                value = T.call_extern("uint32", "spa_to_tf32", as_float(shared[word]))
                T.buffer_store(xf, value, [4 * pair + i])

    def step(acc: Any, xf: Any, w: Any, b: Any, shared: Any, u: Any, at: Any, window: Any, warp: Any, lane: Any):
        """Multiplies one step of group u."""
        slot = T.bind(warp * HELD + T.bitwise_and(at, HELD - 1))
        own = T.address_of(shared[VALUES + slot * STEP + lane * (STEP // 32)])
        call(f"spa_load{STEP // 8}", T.address_of(w[0]), own)
        gather(xf, shared, COLUMNS + slot * LIST, window, lane)
        if size == 16:
            multiply(product, rows, J, acc, u * J * 4, xf, 0, w, b)
            return
        for pair in range(TT // 16):  # two groups are a piece of 16 outputs: the even parts and the odd ones
            d = acc[(T.truncdiv(u, 2) * J + 2 * pair + T.truncmod(u, 2)) * 4]
            call(product, T.address_of(d), T.address_of(xf[4 * pair]), T.address_of(w[0]))

    @T.prim_func(s_tir=True)
    def vectors(
        order_: T.handle("int32"),
        ends_: T.handle("int32"),
        columns_: T.handle("uint32"),
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
        T.func_attr({"global_symbol": "vectors", "tirx.noalias": True})
        order = T.decl_buffer((ANY,), "int32", data=order_)
        ends = T.decl_buffer((ANY,), "int32", data=ends_)
        columns = T.decl_buffer((ANY,), "uint32", data=columns_)
        values = T.decl_buffer((ANY,), "uint32", data=values_)
        x = T.decl_buffer((ANY,), number, data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), number, data=residual_)
        y = T.decl_buffer((ANY,), number, data=y_)
        block_x = T.launch_thread("blockIdx.x", T.ceildiv(tokens, TT))
        block_y = T.launch_thread("blockIdx.y", T.ceildiv(n, tile.group))
        image = T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", NT)
        shared = T.alloc_buffer((shared_bytes(size, tile, dtype, layout) // 4,), "uint32", scope="shared.dyn")
        acc = T.alloc_buffer((2 * J * 4,), "float32", scope="local")
        xf = T.alloc_buffer((2 * J,), "uint32", scope="local")
        w = T.alloc_buffer((4,), "uint32", scope="local")
        b = T.alloc_buffer((4,), "uint32", scope="local")
        bound = T.alloc_buffer((GW + 1,), "int32", scope="local")
        coming = T.alloc_buffer((GW + 1,), "int32", scope="local")
        fetched = T.alloc_buffer((1,), "int32", scope="local")  # steps up to here are on the way
        landed = T.alloc_buffer((D + 1,), "int32", scope="local")  # have come: now, when the next slab has, ...
        done = T.alloc_buffer((1,), "int32", scope="local")

        # Outputs run first, so that thread blocks that run at a time share their activations in L2.
        linear: T.let[T.int32] = block_y * T.ceildiv(tokens, TT) + block_x
        strip: T.let[T.int32] = T.truncmod(linear, T.ceildiv(n, tile.group))
        token: T.let[T.int32] = T.truncdiv(linear, T.ceildiv(n, tile.group)) * TT
        x_image: T.let[T.int32] = image * k * tokens
        y_image: T.let[T.int32] = image * n * tokens
        warp: T.let[T.int32] = T.truncdiv(thread, 32)
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        slabs: T.let[T.int32] = T.ceildiv(k, K)
        pieces: T.let[T.int32] = T.ceildiv(n, PIECE)
        piece: T.let[T.int32] = strip * tile.across + warp
        # Warps past the last piece have nothing to do, but to bring activations.
        own: T.let[T.int32] = T.min(piece, pieces - 1) * slabs * GW
        count: T.let[T.int32] = T.if_then_else(piece < pieces, slabs, 0)
        x_align: T.let[T.int32] = align_of(k if rows else tokens, E)
        y_align: T.let[T.int32] = align_of(n if rows else tokens, E)

        for i in T.unroll(2 * J * 4):
            acc[i] = T.float32(0)
        for u in T.unroll(GW + 1):
            coming[u] = ends[own]
        for d in T.unroll(D + 1):
            landed[d] = coming[0]
        fetched[0] = coming[0]
        last: T.let[T.int32] = ends[own + count * GW]
        for i in T.serial(slabs + LATER):
            call(f"spa_cp_async_wait{D - 1}")
            T.tvm_storage_sync("shared")
            for d in T.unroll(D):
                landed[d] = T.max(landed[d], landed[d + 1])
            for u in T.unroll(GW + 1):
                bound[u] = coming[u]
            if i < slabs:
                fetch(
                    tile,
                    dtype,
                    layout,
                    K,
                    shared,
                    (COMING + T.truncmod(i, tile.stages) * SLAB) if TURN else T.truncmod(i, NR) * SLAB,
                    x,
                    x_image,
                    i * K,
                    token,
                    thread,
                    k,
                    tokens,
                    x_align,
                )
            top_up(shared, values, columns, fetched, T.min(bound[0] + HELD, last), warp, lane)
            call("spa_cp_async_commit")
            landed[D] = fetched[0]
            if i + 1 - LATER >= 0 and i + 1 - LATER < count:
                for u in T.unroll(GW + 1):
                    coming[u] = ends[own + (i + 1 - LATER) * GW + u]
            if TURN:
                if i >= D and i < slabs + D:
                    turn(shared, i, warp, lane)
            window: T.let[T.int32] = T.truncmod(i - LATER + (NR - BACK), NR) * K
            done[0] = bound[0]
            while done[0] < bound[GW]:
                if landed[0] <= done[0]:
                    # more steps than the ring holds, or than were asked for in time
                    call("spa_syncwarp")
                    top_up(shared, values, columns, fetched, T.min(done[0] + HELD, last), warp, lane)
                    call("spa_cp_async_commit")
                    call("spa_cp_async_wait0")
                    call("spa_syncwarp")
                    landed[0] = fetched[0]
                    landed[D] = fetched[0]
                until: T.let[T.int32] = T.min(landed[0], bound[GW])
                for u in T.unroll(GW):
                    start: T.let[T.int32] = T.max(bound[u], done[0])
                    for s in T.serial(T.min(bound[u + 1], until) - start):
                        step(acc, xf, w, b, shared, u, start + s, window, warp, lane)
                done[0] = until

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
            lambda row: T.if_then_else(
                strip * (tile.group // 16) + T.truncdiv(row, 16) < pieces * 2,
                order[T.min(strip * (tile.group // 16) + T.truncdiv(row, 16), pieces * 2 - 1)] * 16
                + T.truncmod(row, 16),
                n,
            ),
            warp,
            0,
            token,
            thread,
            n,
            tokens,
            y_align,
            low,
            high,
            outputs_long=not tokens_long,
        )

    return vectors
