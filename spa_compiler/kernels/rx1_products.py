"""Products of R x 1 blocks and panels, or images: the scripts of `rx1.py`.

R x V accumulators (V registers of tokens) stay in registers for the whole group.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation
from spa_compiler.kernels.rx1 import name
from spa_compiler.kernels.sums import ACCUMULATE, BIAS, RESIDUAL, activate_in_place, add, fma, start
from spa_compiler.kernels.vector import AHEAD, ANY, AVX512, ZMM, Isa, at, const, prefetch, spread, store


def kernel(
    rows: int, lanes: int, act: str, window: bool = False, isa: Isa = AVX512, pitched: bool = False
) -> tirx.PrimFunc:
    """void spa_rx1_<R>_<lanes>_<act>(panel, offsets, indptr, order, columns, values, bias, base, out, groups, mode,
    last, base_pitch, out_pitch, low, high)

    One tile on one panel tile. `panel` points at the k_block's first feature, `indptr` and `order` at the tile's
    first group, `bias`, `base` (the residual) and `out` at the chunk's first row. mode: ACCUMULATE, BIAS or RESIDUAL;
    the activation is applied when `last` is not 0.

    Args:
        window: the tile is part of an image. Column c of the block is not row c of a panel tile, but lies `offsets[c]`
            floats behind `panel` (`kernels/window.py`), and the rows of `base` and `out` are `base_pitch` and
            `out_pitch` floats apart; whole registers of lanes alone. Otherwise these three are not read.
        pitched: the same, where columns are `offsets[0]` floats apart: a multiplication is faster than a table.
    """
    window = window or pitched
    if window and lanes < ZMM:
        raise ValueError(f"a window of {lanes} lanes: whole registers of {ZMM} alone")
    return _one_lane(rows, act, isa) if lanes == 1 else _many_lanes(rows, lanes, act, window, isa, pitched)


def rows_at_once(rows: int, isa: Isa) -> int:
    """Of a group: where registers are few, the sums of 16 rows do not fit, and the group is gone over again."""
    return next(part for part in range(rows, 0, -1) if rows % part == 0 and part + 2 < isa.registers)


def _accumulator_sets(rows: int, vectors: int) -> int:
    """Independent multiply-add chains hide the latency of 4 cycles at 2 a cycle: at least 8 are wanted, but for
    R = 1 more than two sets lose at the short groups that K blocks leave."""
    if rows == 1:
        return {1: 4, 2: 2}.get(vectors, 1)
    return 2 if rows * vectors < 8 else 1


def _place(offsets, column, lanes, window, pitched):
    """Where the activations of a column begin."""
    column = T.Cast("int32", column)
    return column * offsets[0] if pitched else offsets[column] if window else column * lanes


def _position(i, vectors, width, row, lane, pitch):
    """Where sum number `i` of a group belongs, of rows that are `pitch` floats apart."""
    return (row + T.truncdiv(i, vectors)) * pitch + lane + T.truncmod(i, vectors) * width


def _put(regs, i, out, row, lane, pitch, vectors, act, low, high, width, isa):
    """Stores sum number `i` of a group, activated on the way."""
    value = activation.emit(regs[at(i * width, width)], act, low, high, width, isa)
    store(out, value, _position(i, vectors, width, row, lane, pitch), width)


def _many_lanes(R, lanes, act, window, isa, pitched):
    Q = rows_at_once(R, isa)
    W, V, passes = isa.passes(Q, lanes)
    U = _accumulator_sets(Q, V)
    inline_prefetch = R > 1
    short = act in ("relu", "clip")  # an instruction or two, applied on the way out of the registers
    epilogue = act != "none" and not short
    # A long chain of operations wants others beside it. A row by itself has those of the next row, which is short.
    at_end = epilogue and R > 1 and Q * V < 8
    # Of the kind of factor that there are more of one stays in a register, of the other all.
    row_of, vector_of = (
        (lambda i: T.truncdiv(i, V), lambda i: T.truncmod(i, V))
        if Q > V
        else (lambda i: T.truncmod(i, Q), lambda i: T.truncdiv(i, Q))
    )

    @T.prim_func(s_tir=True)
    def rx1(
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
        T.func_attr({"global_symbol": name(R, lanes, act, window, pitched), "tirx.noalias": True})
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
                # only constant indices after unrolling: LLVM keeps `regs` in registers
                regs = T.alloc_buffer((U * Q * V * W,), "float32", scope="local")
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
                for i in T.unroll((U - 1) * Q * V):
                    store(regs, const(0.0, W), (Q * V + i) * W, W)
                if not inline_prefetch:
                    for i in T.serial(T.truncdiv(count + 15, 16)):
                        prefetch(values, begin + i * 16 + AHEAD, lanes)
                    for i in T.serial(T.truncdiv(count + 31, 32)):
                        prefetch(columns, begin + i * 32 + AHEAD, lanes)
                for j in T.serial(T.truncdiv(count, U)):
                    if inline_prefetch:
                        prefetch(values, (begin + j * U) * R + AHEAD, lanes)
                        prefetch(columns, begin + j * U + AHEAD // R, lanes)
                    for u in T.unroll(U):
                        for i in T.unroll(Q * V):
                            fma(
                                regs,
                                (u * Q * V + row_of(i) * V + vector_of(i)) * W,
                                spread(values[(begin + j * U + u) * R + first + row_of(i)], W),
                                P[
                                    at(
                                        _place(offsets, columns[begin + j * U + u], lanes, window, pitched)
                                        + lane
                                        + vector_of(i) * W,
                                        W,
                                    )
                                ],
                                W,
                            )
                if U > 1:
                    for j in T.serial(T.truncmod(count, U)):
                        for i in T.unroll(Q * V):
                            fma(
                                regs,
                                (row_of(i) * V + vector_of(i)) * W,
                                spread(values[(begin + count - 1 - j) * R + first + row_of(i)], W),
                                P[
                                    at(
                                        _place(offsets, columns[begin + count - 1 - j], lanes, window, pitched)
                                        + lane
                                        + vector_of(i) * W,
                                        W,
                                    )
                                ],
                                W,
                            )
                    for u in T.unroll(U - 1):
                        for i in T.unroll(Q * V):
                            add(regs, i * W, ((u + 1) * Q * V + i) * W, W)
                if short:  # known while the script is parsed; `last` is not
                    if last != 0:
                        for i in T.unroll(Q * V):
                            _put(regs, i, out, row, lane, out_pitch if window else lanes, V, act, low, high, W, isa)
                    else:
                        for i in T.unroll(Q * V):
                            _put(regs, i, out, row, lane, out_pitch if window else lanes, V, "none", low, high, W, isa)
                else:
                    for i in T.unroll(Q * V):
                        _put(regs, i, out, row, lane, out_pitch if window else lanes, V, "none", low, high, W, isa)
                if epilogue and not at_end:
                    # a loop over what was just stored, not over registers: one copy of the polynomial's code
                    if last != 0:
                        for i in T.serial(Q * V):
                            activate_in_place(
                                out,
                                _position(i, V, W, row, lane, out_pitch if window else lanes),
                                act,
                                low,
                                high,
                                W,
                                isa,
                            )
        if at_end:
            if last != 0:
                for r in T.serial(groups * R):
                    for i in T.serial(T.truncdiv(lanes, W)):
                        activate_in_place(out, r * (out_pitch if window else lanes) + i * W, act, low, high, W, isa)

    return rx1


def _one_lane(R, act, isa):
    """One token: the R rows of a group fill the register instead, four columns at a time."""
    U = 4
    E = R & -R  # rows that are activated at once: instructions have widths that are powers of two
    lines = max(1, U * R // 16)  # of values, read in one turn of the loop
    epilogue = act != "none"

    @T.prim_func(s_tir=True)
    def rx1(
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
        T.func_attr({"global_symbol": name(R, 1, act), "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        indptr = T.decl_buffer((ANY,), "int32", data=indptr_)
        order = T.decl_buffer((ANY,), "int32", data=order_)
        columns = T.decl_buffer((ANY,), "uint16", data=columns_)
        values = T.decl_buffer((ANY,), "float32", data=values_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        base = T.decl_buffer((ANY,), "float32", data=base_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for g in T.serial(groups):
            regs = T.alloc_buffer((U * R,), "float32", scope="local")
            row: T.let[T.int32] = order[g] * R
            begin: T.let[T.int32] = indptr[g]
            count: T.let[T.int32] = indptr[g + 1] - begin
            if mode == ACCUMULATE:
                store(regs, out[at(row, R)], 0, R)
            elif mode == RESIDUAL:
                store(regs, base[at(row, R)] + bias[at(row, R)], 0, R)
            else:
                store(regs, bias[at(row, R)], 0, R)
            for u in T.unroll(U - 1):
                store(regs, const(0.0, R), (u + 1) * R, R)
            for j in T.serial(T.truncdiv(count, U)):
                for line in T.unroll(lines):
                    prefetch(values, (begin + j * U) * R + line * 16 + AHEAD)
                prefetch(columns, begin + j * U + AHEAD // R)
                for u in T.unroll(U):
                    fma(
                        regs,
                        u * R,
                        values[at((begin + j * U + u) * R, R)],
                        spread(P[T.Cast("int32", columns[begin + j * U + u])], R),
                        R,
                    )
            for j in T.serial(T.truncmod(count, U)):
                fma(
                    regs,
                    0,
                    values[at((begin + count - 1 - j) * R, R)],
                    spread(P[T.Cast("int32", columns[begin + count - 1 - j])], R),
                    R,
                )
            for u in T.unroll(U - 1):
                add(regs, 0, (u + 1) * R, R)
            store(out, regs[at(0, R)], row, R)
            if epilogue:
                if last != 0:
                    for i in T.unroll(R // E):
                        activate_in_place(out, row + i * E, act, low, high, E, isa)

    return rx1
