"""Products of N:M weights and panels: the scripts of `grouped.py`."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.grouped import ROWS, STEP, Groups, name
from spa_compiler.kernels.rxc import tile_of
from spa_compiler.kernels.sums import ACCUMULATE, BIAS, RESIDUAL, activate_in_place, finish, fma, start
from spa_compiler.kernels.vector import AHEAD, ANY, AVX512, ZMM, Isa, at, const, gather, pick, prefetch, spread, store


def kernel(kept: int, of: int, lanes: int, act: str, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_grouped_<N>of<M>_<lanes>_<act>(...): one tile on one panel tile, arguments of `rx1_products.kernel`."""
    return _one_lane(kept, of, act, isa) if lanes == 1 else _many_lanes(kept, of, lanes, act, isa)


def _word(columns, index):
    """32 bits of codes."""
    low, high = (T.Cast("int32", columns[index + i]) for i in range(2))
    return T.bitwise_or(low, T.shift_left(high, T.int32(16)))


def _places(columns, index, first, N, M, W):
    """Of values first .. first + W of a row, within the inputs of a step; `index`: where the row's codes begin."""
    bits = Groups(N, M).bits
    each = 32 // bits  # codes of 32 bits
    words = [T.bind(_word(columns, index + 2 * w)) for w in range(first // each, (first + W - 1) // each + 1)]
    codes = T.Broadcast(words[0], W)
    if len(words) > 1:
        halves = [T.Broadcast(word, W // 2) for word in words]
        codes = tirx.Shuffle(halves, [tirx.IntImm("int32", i) for i in range(W)])
    shifts = _constants([(first + i) % each * bits for i in range(W)])
    base = _constants([(first + i) // N * M for i in range(W)])
    return T.bind(T.bitwise_and(T.shift_right(codes, shifts), T.Broadcast(T.int32(M - 1), W)) + base)


def _constants(values):
    return tirx.Shuffle(
        [tirx.IntImm("int32", v) for v in values], [tirx.IntImm("int32", i) for i in range(len(values))]
    )


def _picked(P, column, places, N, M, W, isa):
    """The activations at `places`, from `column` on."""
    if isa.gathers and W == ZMM:
        return pick([T.bind(P[at(column + i, W)]) for i in range(0, STEP * M // N, W)], places)
    return gather(P, places + spread(column, W), W, isa)


def _add_step(regs, P, columns, values, step, column, N, M, isa):
    """One step of 4 rows; its inputs begin at `column`. Python unrolls it: shifts depend on the number of a value."""
    W, words = isa.width, Groups(N, M).words
    for r in range(ROWS):
        for first in range(0, STEP, W):
            places = _places(columns, (step * ROWS + r) * words, first, N, M, W)
            value = values[at(step * (ROWS * STEP) + r * STEP + first, W)]
            fma(regs, r * W, value, _picked(P, column, places, N, M, W, isa), W)


def _one_lane(N, M, act, isa):
    W = isa.width
    SPAN = STEP * M // N
    WORDS = Groups(N, M).words
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def grouped(
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
        T.func_attr({"global_symbol": name(N, M, 1, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            regs = T.alloc_buffer((ROWS * W,), "float32", scope="local")
            row: T.let[T.int32] = order[g] * ROWS
            begin: T.let[T.int32] = indptr[g]
            for i in T.unroll(ROWS):
                store(regs, const(0.0, W), i * W, W)
            for j in T.serial(indptr[g + 1] - begin):
                for i in T.unroll(ROWS):
                    prefetch(values, (begin + j) * (ROWS * STEP) + i * ZMM + AHEAD)
                prefetch(columns, (begin + j + AHEAD // (ROWS * STEP)) * (ROWS * WORDS))
                _add_step(regs, P, columns, values, begin + j, j * SPAN, N, M, isa)
            if mode == ACCUMULATE:
                finish(regs, ROWS, W, W, out, row, ACCUMULATE, bias, base)
            elif mode == RESIDUAL:
                finish(regs, ROWS, W, W, out, row, RESIDUAL, bias, base)
            else:
                finish(regs, ROWS, W, W, out, row, BIAS, bias, base)
            if epilogue:
                if last != 0:
                    activate_in_place(out, row, act, low, high, ROWS, isa)

    return grouped


def _column(columns, index, i, N, M):
    """Of value `i` of a row, within the inputs of a step; `index`: where the row's codes begin."""
    bits = Groups(N, M).bits
    per_word = 16 // bits
    word = T.Cast("int32", columns[index + T.truncdiv(i, per_word)])
    code = T.bitwise_and(T.shift_right(word, T.truncmod(i, per_word) * bits), T.int32(M - 1))
    return T.truncdiv(i, N) * M + code


def _many_lanes(N, M, lanes, act, isa):
    W, Q, V = tile_of(ROWS, lanes, isa)
    passes = lanes // (V * W)
    SPAN = STEP * M // N
    WORDS = Groups(N, M).words
    BODY = 4  # values of a row
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def grouped(
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
        T.func_attr({"global_symbol": name(N, M, lanes, act), "tirx.noalias": True})
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
            for p in T.serial(ROWS // Q * passes):
                first: T.let[T.int32] = T.truncdiv(p, passes) * Q
                row: T.let[T.int32] = order[g] * ROWS + first
                lane: T.let[T.int32] = T.truncmod(p, passes) * (V * W)
                regs = T.alloc_buffer((Q * V * W,), "float32", scope="local")
                if mode == ACCUMULATE:
                    for i in T.unroll(Q * V):
                        start(
                            regs,
                            i * W,
                            ACCUMULATE,
                            bias,
                            0,
                            out,
                            (row + T.truncdiv(i, V)) * lanes + lane + T.truncmod(i, V) * W,
                            W,
                        )
                elif mode == RESIDUAL:
                    for i in T.unroll(Q * V):
                        start(
                            regs,
                            i * W,
                            RESIDUAL,
                            bias,
                            row + T.truncdiv(i, V),
                            base,
                            (row + T.truncdiv(i, V)) * lanes + lane + T.truncmod(i, V) * W,
                            W,
                        )
                else:
                    for i in T.unroll(Q * V):
                        start(regs, i * W, BIAS, bias, row + T.truncdiv(i, V), out, 0, W)
                for j in T.serial(count):
                    for i in T.unroll(ROWS):
                        prefetch(values, (begin + j) * (ROWS * STEP) + i * ZMM + AHEAD, lanes)
                    prefetch(columns, (begin + j + AHEAD // (ROWS * STEP)) * (ROWS * WORDS), lanes)
                    for part in T.serial(STEP // BODY):
                        for b in T.unroll(BODY):
                            for i in T.unroll(Q * V):
                                fma(
                                    regs,
                                    i * W,
                                    spread(
                                        values[
                                            (begin + j) * (ROWS * STEP)
                                            + (first + T.truncdiv(i, V)) * STEP
                                            + part * BODY
                                            + b
                                        ],
                                        W,
                                    ),
                                    P[
                                        at(
                                            (
                                                j * SPAN
                                                + _column(
                                                    columns,
                                                    ((begin + j) * ROWS + first + T.truncdiv(i, V)) * WORDS,
                                                    part * BODY + b,
                                                    N,
                                                    M,
                                                )
                                            )
                                            * lanes
                                            + lane
                                            + T.truncmod(i, V) * W,
                                            W,
                                        )
                                    ],
                                    W,
                                )
                for i in T.unroll(Q * V):
                    store(
                        out,
                        regs[at(i * W, W)],
                        (row + T.truncdiv(i, V)) * lanes + lane + T.truncmod(i, V) * W,
                        W,
                    )
                if epilogue:
                    # a loop over what was just stored, not over registers: one copy of the activation's code
                    if last != 0:
                        for i in T.serial(Q * V):
                            activate_in_place(
                                out,
                                (row + T.truncdiv(i, V)) * lanes + lane + T.truncmod(i, V) * W,
                                act,
                                low,
                                high,
                                W,
                                isa,
                            )

    return grouped
