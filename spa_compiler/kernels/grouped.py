"""N:M: of every M inputs that follow each other, a row keeps N, and an index is a place among M.

    2:4       1 . . 4 | . 2 2 .      values [1, 4, 2, 2], codes [0, 3, 1, 2], of 2 bits each

    group     4 consecutive rows, in the order of the weight
    step      16 values of each row of a group; they come from the same SPAN = 16 M / N inputs in every row

    chunk, k_block, tile     as in `rx1.py`; SPAN divides k and k_block, so that all groups of a tile have as many steps

    indptr  int32  [groups of all tiles + 1]    where a group's steps begin
    order   int32  [groups of all tiles]        a group's place in its chunk: 0, 1, ...
    columns uint16 [steps, 4 WORDS]             row by row, the 16 codes of a row; the first in the lowest bits
    values  f32    [steps, 64]                  row by row; zero with code 0 where a row has fewer than N of M
    bias    f32    [rows, rounded up to 4]

A code has 2 bits where M is 4, else 4 bits, and WORDS is 2 or 4: 4.25 or 4.5 bytes a value, and none points outside of
its M inputs. With one token, codes are widened to places in a register and pick from activations that are in registers,
where unstructured weights have to gather them. With more, tokens fill the lanes, as in `rx1.py`.

Reference: Mishra et al., Accelerating Sparse Deep Neural Networks (2021), for the format.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import sums
from spa_compiler.kernels.form import tiled
from spa_compiler.kernels.rx1 import AHEAD, ARRAYS, default_blocking, pad_bias
from spa_compiler.kernels.rxc import tile_of
from spa_compiler.kernels.sums import ACCUMULATE, BIAS, RESIDUAL, activate_in_place, finish, fma, start
from spa_compiler.kernels.vector import ANY, AVX512, ZMM, Isa, at, const, gather, pick, prefetch, spread, store

F32 = NDArray[np.float32]

ROWS = 4  # of a group: that many independent sums
STEP = 16  # values of a row
KINDS = ((2, 4), (4, 8), (8, 16), (1, 4), (2, 8), (4, 16))  # N:M that have kernels
_FULL = 0.95  # of the places have a value


@dataclass(frozen=True)
class Groups:
    """The form: N = `kept` of M = `of`, in tiles of `chunk` x `k_block`, where None is the usual size."""

    kept: int
    of: int
    chunk: int | None = None
    k_block: int | None = None
    rows: int = ROWS
    windowed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """`2:4`; `2:4 in 128x768` with the tile."""
        return tiled(self.pattern, self.chunk, self.k_block)

    @property
    def pattern(self) -> str:
        """`N:M`."""
        return f"{self.kept}:{self.of}"

    @property
    def span(self) -> int:
        """Inputs of a step."""
        return STEP * self.of // self.kept

    @property
    def words(self) -> int:
        """Of 16 bits, for the codes of a row in a step."""
        return 2 if self.of <= 4 else 4

    @property
    def info(self) -> dict[str, int]:
        """Of `LinearInfo` in region.h."""
        return {"cols": STEP, "span": self.span, "codes": ROWS * self.words}

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of the kernel for tiles of `lanes` tokens."""
        return name(self.kept, self.of, lanes, act)

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store."""
        n, k = weight.shape
        return int(-(-n // ROWS) * ROWS * k * self.kept // self.of)

    def cut(self, chunk: int | None, k_block: int | None) -> Groups:
        """The same in other tiles."""
        return Groups(self.kept, self.of, chunk, k_block)

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias."""
        return pack(weight, None, self.kept, self.of, self.chunk, self.k_block)

    def takes(self, weight: F32) -> bool:
        """Whether a weight [n, k] has these zeros, and next to no others."""
        n, k = weight.shape
        most = n * k * self.kept // self.of
        if k % self.span or not _FULL * most <= np.count_nonzero(weight) <= most:
            return False
        return bool(((weight != 0).reshape(-1, self.of).sum(axis=1) <= self.kept).all())


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] in this format."""

    n: int
    k: int
    kept: int
    of: int
    chunk: int
    k_block: int
    indptr: NDArray[np.int32]
    order: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: F32
    bias: F32

    @property
    def form(self) -> Groups:
        """With its tile sizes."""
        return Groups(self.kept, self.of, self.chunk, self.k_block)

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """In the order in which a node takes them."""
        return {what: getattr(self, what) for what in ARRAYS}

    def with_bias(self, bias: F32 | None) -> Packed:
        """The same weight with `bias` [n]; None: zeros."""
        return dataclasses.replace(self, bias=pad_bias(bias, self.n, ROWS))


def pack(
    weight: F32, bias: F32 | None, kept: int, of: int, chunk: int | None = None, k_block: int | None = None
) -> Packed:
    """`weight` [n, k] and `bias` [n] (or None) -> Packed. Exact.

    Raises:
        ValueError: some M inputs of a row have more than N nonzeros, or SPAN does not divide k and k_block, or 4 chunk.
    """
    n, k = weight.shape
    form, groups = Groups(kept, of), -(-n // ROWS)
    default = default_blocking(n, k, ROWS)
    chunk, k_block = chunk or default[0], k_block or default[1]
    if k % form.span or k_block % form.span or chunk % ROWS:
        raise ValueError(f"tiles of {chunk} x {k_block} cut steps of {ROWS} x {form.span}")
    padded = np.zeros((groups * ROWS, k), np.float32)
    padded[:n] = weight
    each = padded.reshape(-1, of)
    counts = np.count_nonzero(each, axis=1)
    if counts.max(initial=0) > kept:
        raise ValueError(f"{counts.max()} nonzeros of {of}")
    first = np.argsort(each == 0, axis=1, kind="stable")[:, :kept]  # nonzeros come first, in their order
    value = np.take_along_axis(each, first, axis=1)
    code = np.where(value != 0, first, 0)
    steps = k // form.span

    def arranged(items: NDArray[np.generic]) -> NDArray[np.generic]:
        """[rows, places of a row] -> [steps of all tiles, 4, 16], tile by tile."""
        grouped = items.reshape(groups, ROWS, steps, STEP).transpose(0, 2, 1, 3)
        per_chunk, per_block = chunk // ROWS, k_block // form.span
        tiles = [
            grouped[g : g + per_chunk, s : s + per_block].reshape(-1, ROWS, STEP)
            for g in range(0, groups, per_chunk)
            for s in range(0, steps, per_block)
        ]
        return np.concatenate(tiles)

    codes = arranged(code).reshape(-1, ROWS, form.words, STEP // form.words).astype(np.uint32)
    bits = np.arange(STEP // form.words, dtype=np.uint32) * np.uint32(_bits(of))
    sizes = [
        (min(chunk // ROWS, groups - g), min(k_block, k - k0) // form.span)
        for g in range(0, groups, chunk // ROWS)
        for k0 in range(0, k, k_block)
    ]
    lengths = np.concatenate([np.full(count, length) for count, length in sizes])
    return Packed(
        n,
        k,
        kept,
        of,
        chunk,
        k_block,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        np.concatenate([np.arange(count) for count, _ in sizes]).astype(np.int32),
        (codes << bits).sum(axis=3).astype(np.uint16).reshape(-1, ROWS * form.words),
        np.ascontiguousarray(arranged(value).reshape(-1, ROWS * STEP), np.float32),
        pad_bias(bias, n, ROWS),
    )


def _bits(of: int) -> int:
    """Of a code."""
    return 2 if of <= 4 else 4


def unpack(packed: Packed) -> F32:
    """The dense weight [n, k]."""
    dense = np.zeros((len(packed.bias), packed.k), np.float32)
    form, entry = packed.form, 0
    place = np.arange(STEP) // packed.kept * packed.of
    bits, per_word = _bits(packed.of), STEP // form.words
    for first in range(0, len(dense), packed.chunk):
        for k0 in range(0, packed.k, packed.k_block):
            for _ in range(min(packed.chunk, len(dense) - first) // ROWS):
                row = first + int(packed.order[entry]) * ROWS
                for j, step in enumerate(range(packed.indptr[entry], packed.indptr[entry + 1])):
                    for r in range(ROWS):
                        words = packed.columns[step, r * form.words : (r + 1) * form.words].astype(np.int64)
                        code = np.array(
                            [words[i // per_word] >> i % per_word * bits & (packed.of - 1) for i in range(STEP)]
                        )
                        column = k0 + j * form.span + place + code
                        np.add.at(dense[row + r], column, packed.values[step, r * STEP : (r + 1) * STEP])
                entry += 1
    return dense[: packed.n]


def reference(
    panel: F32, packed: Packed, residual: F32 | None = None, act: str = "none", low: float = 0.0, high: float = 0.0
) -> F32:
    """What the kernel computes on a panel tile [k, lanes], in float64: [n, lanes]."""
    return sums.reference(unpack(packed), packed.bias, panel, residual, act, low, high)


def name(kept: int, of: int, lanes: int, act: str) -> str:
    return f"spa_grouped_{kept}of{of}_{lanes}_{act}"


def kernel(kept: int, of: int, lanes: int, act: str, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_grouped_<N>of<M>_<lanes>_<act>(...): one tile on one panel tile, arguments as those of `rx1.kernel`."""
    return _one_lane(kept, of, act, isa) if lanes == 1 else _many_lanes(kept, of, lanes, act, isa)


def _word(columns, index):
    """32 bits of codes."""
    low, high = (T.Cast("int32", columns[index + i]) for i in range(2))
    return T.bitwise_or(low, T.shift_left(high, T.int32(16)))


def _places(columns, index, first, N, M, W):
    """Of values first .. first + W of a row, within the inputs of a step; `index`: where the row's codes begin."""
    bits = _bits(M)
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
    bits = _bits(M)
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
