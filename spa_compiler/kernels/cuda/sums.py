"""Sums of a thread block in registers: how they grow by `mma`, and how they become results.

A warp has `warp_rows` outputs x `warp_tokens` tokens. Its sums are pieces of 16 outputs, of each piece parts of 8
tokens, of each part four floats of a lane. In `rows` the operands are tokens x inputs and inputs x outputs, in
`planes` outputs x inputs and inputs x tokens: so that in both two sums of a lane lie side by side in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from spa_compiler.kernels.cuda.activations import clamp16
from spa_compiler.kernels.cuda.form import Dtype, Layout
from spa_compiler.kernels.cuda.script import act, as_float, as_uint, call

ANY = 1 << 30  # the length of a buffer that has any


@dataclass(frozen=True)
class Tile:
    """How a thread block shares its work: `group` outputs x `tokens`, by `across` x `along` warps, `stages` in
    flight."""

    group: int
    tokens: int
    across: int
    along: int
    stages: int
    min_blocks: int = 1

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return 32 * self.across * self.along

    @property
    def warp_rows(self) -> int:
        """Outputs of a warp."""
        return self.group // self.across

    @property
    def warp_tokens(self) -> int:
        """Tokens of a warp: a multiple of 16."""
        return self.tokens // self.along

    def __str__(self) -> str:
        """As part of a kernel's name."""
        return f"{self.group}x{self.tokens}_{self.across}x{self.along}x{self.stages}"


def multiply(product, rows, parts, acc, first, operands, own, w, b):
    """Adds the products of 16 outputs, in registers `w`, and the tokens of a warp to sums `first` and following.

    `operands` from `own` on are what `load_operands` made, `b` are four registers to use.
    """
    if rows:
        for i, register in enumerate((0, 2, 1, 3)):
            T.buffer_store(b, w[register], [i])
    for j in range(parts):
        d = T.address_of(acc[first + j * 4])
        if rows:
            call(product, d, T.address_of(operands[own + 4 * (j // 2)]), T.address_of(b[2 * (j % 2)]))
        else:
            call(product, d, T.address_of(w[0]), T.address_of(operands[own + 2 * j]))


def finish_bytes(tile: Tile, dtype: Dtype, layout: Layout) -> int:
    """Of shared memory that `finish` takes."""
    if dtype == "fp32":
        return 0
    lines, length = (tile.tokens, tile.group) if layout == "rows" else (tile.group, tile.tokens)
    return lines * (2 * length + 16)


def finish(
    tile: Tile,
    dtype: Dtype,
    layout: Layout,
    epilogue: Any,
    acc: Any,
    shared: Any,
    bias: Any,
    residual: Any,
    y: Any,
    image: Any,
    row_of: Any,
    part: Any,
    first: Any,
    token: Any,
    thread: Any,
    n: Any,
    tokens: Any,
    align: Any,
    low: Any,
    high: Any,
    *,
    outputs_long: bool | None = None,
) -> None:
    """Emits what makes results of sums: bias, residual, activation, and stores.

    Args:
        row_of: the output that a row of the thread block's group is; eight rows from a multiple of 8 on follow each
        other. part, first: which of the `across` parts of the group a warp has, and its first token in the tile.
        token: the tile's first token; `image` is where results of this image begin.
        outputs_long: whether outputs are the long side of a product (16 of 16 x 8), as they are in `planes` by default;
            where that is turned round, results of 16 bits go through shared memory number by number.
    """
    rows = layout == "rows"
    tokens_long = rows if outputs_long is None else not outputs_long
    pieces, parts = tile.warp_rows // 16, tile.warp_tokens // 8
    lane = T.truncmod(thread, 32)

    def result(value: Any, row: Any, before: Any) -> Any:
        value = value + bias[T.min(row, n - 1)]
        return act(epilogue.act, value + before if epilogue.residual else value, low, high)

    def place(j: Any, half: Any) -> tuple[Any, Any]:
        """(row in its piece, token in the warp's) of the first sum of a pair."""
        long, short = T.truncdiv(lane, 4) + half * 8, T.truncmod(lane, 4) * 2
        if tokens_long:
            return T.truncmod(j, 2) * 8 + short, T.truncdiv(j, 2) * 16 + long
        return long, j * 8 + short

    if dtype == "fp32":
        # Four lanes have 32 bytes of a line: whole sectors.
        with T.unroll(pieces) as piece:
            start = T.bind(row_of(part * tile.warp_rows + piece * 16))
            with T.unroll(parts) as j, T.unroll(4) as i:
                in_piece, in_warp = place(j, T.truncdiv(i, 2))
                second = T.truncmod(i, 2)
                row = T.bind(start + in_piece + (second if tokens_long else 0))
                own = T.bind(token + first + in_warp + (0 if tokens_long else second))
                with T.If(T.And(row < n, own < tokens)), T.Then():
                    index = T.bind(image + (own * n + row if rows else row * tokens + own))
                    before = as_float(residual[index]) if epilogue.residual else None
                    T.buffer_store(y, as_uint(result(acc[(piece * parts + j) * 4 + i], row, before)), [index])
        return

    # 16 bits: by way of shared memory, so that whole lines are stored. A residual comes the same way.
    lines, chunks = (tile.tokens, tile.group // 8) if rows else (tile.group, tile.tokens // 8)
    pitch = chunks * 4 + 4  # words; the four more keep lanes in different banks

    def target(index: Any) -> tuple[Any, Any, Any]:
        """(word in shared memory, index in y, bytes that are there) of a chunk of 16 bytes."""
        line, chunk = T.truncdiv(index, chunks), T.truncmod(index, chunks)
        if rows:
            row = T.bind(row_of(chunk * 8))
            there = T.if_then_else(token + line < tokens, clamp16((n - row) * 2), 0)
            return line * pitch + chunk * 4, image + (token + line) * n + row, there
        row = T.bind(row_of(line))
        there = T.if_then_else(row < n, clamp16((tokens - token - chunk * 8) * 2), 0)
        return line * pitch + chunk * 4, image + row * tokens + token + chunk * 8, there

    T.evaluate(T.tvm_storage_sync("shared"))
    if epilogue.residual:
        with T.unroll(lines * chunks // tile.threads) as i:
            word, index, there = target(i * tile.threads + thread)
            there = T.bind(there)
            source = T.address_of(residual[T.if_then_else(there > 0, index, 0)])
            call("spa_copy16", T.address_of(shared[word]), source, there, align)
        call("spa_cp_async_commit")
        call("spa_cp_async_wait0")
        T.evaluate(T.tvm_storage_sync("shared"))
    with T.unroll(pieces) as piece:
        start = T.bind(row_of(part * tile.warp_rows + piece * 16))
        with T.unroll(parts) as j, T.unroll(2) as half:
            in_piece, in_warp = place(j, half)
            row, own = part * tile.warp_rows + piece * 16 + in_piece, first + in_warp
            values = [acc[(piece * parts + j) * 4 + half * 2 + i] for i in range(2)]
            if rows != tokens_long:
                # in two lines, of two tokens or of two outputs: number by number
                for i, value in enumerate(values):
                    number = (own + i) * pitch * 2 + row if rows else (row + i) * pitch * 2 + own
                    where = T.address_of(shared[0]), number * 2
                    before = T.call_extern(
                        "float32", f"spa_from_{dtype}", T.call_extern("uint32", "spa_load2_at", *where)
                    )
                    value = result(value, start + in_piece + (i if tokens_long else 0), before)
                    bits = T.call_extern("uint16", f"spa_to_{dtype}", value)
                    call("spa_store2_at", *where, T.Cast("uint32", bits))
            else:
                word = T.bind(own * pitch + T.truncdiv(row, 2) if rows else row * pitch + T.truncdiv(own, 2))
                results = []
                for i, end in enumerate(("low", "high")):
                    before = T.call_extern("float32", f"spa_from_{dtype}x2_{end}", shared[word])
                    results.append(result(values[i], start + in_piece + (i if rows else 0), before))
                T.buffer_store(shared, T.call_extern("uint32", f"spa_to_{dtype}x2", *results), [word])
    T.evaluate(T.tvm_storage_sync("shared"))
    with T.serial(lines * chunks // tile.threads) as i:
        word, index, there = target(i * tile.threads + thread)
        there = T.bind(there)
        with T.If(there > 0), T.Then():
            registers = T.alloc_buffer((4,), "uint32", scope="local")
            call("spa_load16", T.address_of(registers[0]), T.address_of(shared[word]))
            call("spa_store16_part", T.address_of(y[index]), T.address_of(registers[0]), there, align)
