"""Tiles of activations in shared memory, and from there as operands of `mma`. All functions emit into a script.

A tile has `depth` inputs of all tokens of a thread block. In shared memory it is a few lines of chunks of 16 bytes:

    rows      a line is a token, along it inputs         operand A, tokens x inputs, by ldmatrix
    planes    a line is an input, along it tokens        operand B, inputs x tokens, by ldmatrix that transposes;
                                                         in TF32 word by word, since ldmatrix transposes 16 bits alone

Chunks of a line are permuted by the line's number (XOR), so that the eight lines that are read at a time are in
different banks of memory.
"""

from __future__ import annotations

from tvm.script import tirx as T

from spa_compiler.kernels.cuda.script import as_float, call


def tile_words(tile, dtype, depth):
    """Words of a tile of `depth` inputs."""
    return depth * tile.tokens * _size(dtype) // 4


def align_of(length, size):
    """The largest power of two, up to 16, that divides lines of `length` numbers of `size` bytes."""
    return T.bitwise_and(T.bitwise_or(length * size, 16), -T.bitwise_or(length * size, 16))


def clamp16(size):
    """Of `size` bytes from a chunk's first one to the end, those in the chunk."""
    return T.max(0, T.min(16, size))


def fetch(tile, dtype, layout, depth, shared, base, x, image, column, token, thread, k, tokens, align):
    """Begins to copy `depth` inputs from `column` on, of all tokens from `token` on, to words `base` and following.

    What is beyond k or `tokens` becomes zero.
    """
    size = _size(dtype)
    lines, chunks = _lines(tile, dtype, layout, depth)
    with T.unroll(-(-lines * chunks // tile.threads)) as i:
        index = T.bind(i * tile.threads + thread)
        line, chunk = T.bind(T.truncdiv(index, chunks)), T.bind(T.truncmod(index, chunks))
        along = T.bind(chunk * (16 // size))
        if layout == "rows":
            there = T.if_then_else(token + line < tokens, clamp16((k - column - along) * size), 0)
            source = (token + line) * k + column + along
        else:
            there = T.if_then_else(column + line < k, clamp16((tokens - token - along) * size), 0)
            source = (column + line) * tokens + token + along
        there = T.bind(there)
        to = T.address_of(shared[base + place(dtype, layout, line, chunk, chunks)])
        # a chunk of which nothing is there has no address
        arguments = to, T.address_of(x[T.if_then_else(there > 0, image + source, 0)]), there, align
        if lines * chunks % tile.threads:
            with T.If(index < lines * chunks), T.Then():
                call("spa_copy16", *arguments)
        else:
            call("spa_copy16", *arguments)


def load_operands(tile, dtype, layout, depth, operands, into, shared, base, step, first, lane):
    """The 32 bytes of inputs number `step`, for all tokens of a warp from `first` on, into registers `into` and
    following: for each 16 tokens four, which are one operand A (`rows`) or two operands B (`planes`)."""
    _, chunks = _lines(tile, dtype, layout, depth)
    matrix, line = T.truncdiv(lane, 8), T.truncmod(lane, 8)
    for pair in range(tile.warp_tokens // 16):
        register = into + 4 * pair
        if layout == "rows":  # (tokens, chunk 0), (tokens + 8, chunk 0), (tokens, chunk 1), (tokens + 8, chunk 1)
            token = first + 16 * pair + T.truncmod(matrix, 2) * 8 + line
            at = base + place(dtype, layout, token, 2 * step + T.truncdiv(matrix, 2), chunks)
            call("spa_ldmatrix_x4", T.address_of(operands[register]), T.address_of(shared[at]))
        elif dtype != "fp32":  # (inputs, tokens), (inputs + 8, tokens), (inputs, tokens + 8), (inputs + 8, tokens + 8)
            chunk = T.truncdiv(first, 8) + 2 * pair + T.truncdiv(matrix, 2)
            at = base + place(dtype, layout, 16 * step + T.truncmod(matrix, 2) * 8 + line, chunk, chunks)
            call("spa_ldmatrix_x4_trans", T.address_of(operands[register]), T.address_of(shared[at]))
        else:
            for i in range(4):
                token = first + 16 * pair + 8 * (i // 2) + T.truncdiv(lane, 4)
                own = 8 * step + 4 * (i % 2) + T.truncmod(lane, 4)
                at = base + place(dtype, layout, own, T.truncdiv(token, 4), chunks) + T.truncmod(token, 4)
                T.buffer_store(operands, shared[at], [register + i])
    if dtype == "fp32":
        for i in range(tile.warp_tokens // 4):
            value = T.call_extern("uint32", "spa_to_tf32", as_float(operands[into + i]))
            T.buffer_store(operands, value, [into + i])


def load_four(tile, dtype, layout, depth, operands, into, shared, base, step, first, lane):
    """32 inputs of 16 bits, number `step`, for all tokens of a warp from `first` on, into registers `into` and
    following: for each 8 tokens four, an operand B of `mma.sp`."""
    _, chunks = _lines(tile, dtype, layout, depth)
    for part in range(tile.warp_tokens // 8):
        if layout == "rows":
            at = place(dtype, layout, first + 8 * part + T.truncmod(lane, 8), 4 * step + T.truncdiv(lane, 8), chunks)
        else:
            at = place(dtype, layout, 32 * step + lane, T.truncdiv(first, 8) + part, chunks)
        name = "spa_ldmatrix_x4" if layout == "rows" else "spa_ldmatrix_x4_trans"
        call(name, T.address_of(operands[into + 4 * part]), T.address_of(shared[base + at]))


def _size(dtype):
    return 4 if dtype == "fp32" else 2


def _lines(tile, dtype, layout, depth):
    """(lines of a tile, chunks of a line)."""
    each = 16 // _size(dtype)
    return (tile.tokens, depth // each) if layout == "rows" else (depth, tile.tokens // each)


def place(dtype, layout, line, chunk, chunks):
    """The first word of a chunk in its tile."""
    if dtype == "fp32" and layout == "planes":
        chunk = T.bitwise_xor(chunk, 2 * T.bitwise_and(line, 3))  # four lines of 32 bytes are read at a time
    elif chunks >= 8:
        chunk = T.bitwise_xor(chunk, T.bitwise_and(line, 7))
    else:
        chunk = T.bitwise_xor(chunk, T.bitwise_and(T.shift_right(line, (8 // chunks).bit_length() - 1), chunks - 1))
    return (line * chunks + chunk) * 4
