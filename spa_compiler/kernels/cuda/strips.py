"""Weights in strips and windows, for few tokens: what `few.py` and `bitmap.py` have in common.

    strip    32 rows: those of a thread block
    window   64 columns (fp32: 32) of a strip: what a warp multiplies at a time, 4 KB in shared memory, in the order in
             which its lanes hold fragments
    place    of an element in a window, in bytes, where a step is 16 columns (fp32: 8):
             ((step * 2 + half) * 32 + lane) * 16 + 4 * register [+ 2 * column % 2]

    lane 4 g + q has rows g + 8 i, i = 0..3 (half i / 2), and of every 32 columns 8 q .. 8 q + 7: the order of columns
    in a sum is free, so they are dealt such that a lane needs 16 (32) consecutive bytes of each token of x, straight
    from global memory

A warp has windows warp, warp + W, ... of its block's strip to itself. At the end the W sums of an element meet in
shared memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.cuda.form import F32, Dtype
from spa_compiler.kernels.cuda.script import add_up, as_uint, call, store_result

ROWS = 32
TILE = 4096  # bytes of a window in shared memory
BINS = (8, 16, 32, 64)  # tokens of a thread block


def columns(dtype: Dtype) -> int:
    """Of a window."""
    return 32 if dtype == "fp32" else 64


def places_of(dtype: Dtype) -> NDArray[np.int64]:
    """Place in bytes of every element of a window: [32, columns]."""
    width = columns(dtype)
    row, column = np.meshgrid(np.arange(ROWS), np.arange(width), indexing="ij")
    block, inner = column // 32, column % 32
    lane = row % 8 * 4 + inner // 8
    half, upper = row // 16, row // 8 % 2
    zero = np.zeros_like(row)
    if dtype == "fp32":  # a step of 8 columns has 2 of each lane
        step, register, within = inner % 8 // 2, 2 * (inner % 2) + upper, zero
    else:
        step, register, within = 2 * block + inner % 8 // 4, 2 * (inner % 4 // 2) + upper, 2 * (inner % 2)
    return np.asarray(((step * 2 + half) * 32 + lane) * 16 + 4 * register + within)


def windows_of(weight: F32, dtype: Dtype) -> F32:
    """[windows of all strips, 32 x columns], padded with zeros."""
    n, k = weight.shape
    width = columns(dtype)
    strips, across = -(-n // ROWS), -(-k // width)
    padded = np.zeros((strips * ROWS, across * width), np.float32)
    padded[:n, :k] = weight
    return padded.reshape(strips, ROWS, across, width).transpose(0, 2, 1, 3).reshape(strips * across, ROWS * width)


def weight_of(tiles: F32, n: int, k: int) -> F32:
    """What `windows_of` made, as a weight [n, k] again."""
    strips, width = -(-n // ROWS), tiles.shape[1] // ROWS
    return tiles.reshape(strips, -1, ROWS, width).transpose(0, 2, 1, 3).reshape(strips * ROWS, -1)[:n, :k]


def rank_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal ones are before each of sorted `keys`."""
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return np.arange(len(keys)) - np.repeat(first, np.diff(first, append=len(keys)))


_PITCH = ROWS + 1  # floats of a token's row of sums: lanes of a column meet different banks


def sums_bytes(tokens: int) -> int:
    """Of a warp's sums in shared memory."""
    return 4 * tokens * _PITCH


def finish(S, sums, Y, bias, residual, dtype, epilogue, tile, warps, strip, first, warp, lane, n, tokens, low, high):
    """Adds up what all warps of a block have of a strip and `tile` tokens, through shared memory, and stores y."""
    tiles = tile // 8
    with T.unroll(2) as m, T.unroll(tiles) as t, T.unroll(4) as j:
        column, row = t * 8 + T.truncmod(lane, 4) * 2 + j % 2, m * 16 + T.truncdiv(j, 2) * 8 + T.truncdiv(lane, 4)
        where = T.address_of(S[((warp * tile + column) * _PITCH + row) * 4])
        call("spa_store4", where, as_uint(sums[(m * tiles + t) * 4 + j]))
    T.evaluate(T.tvm_storage_sync("shared.dyn"))
    with T.serial(-(-tile // warps)) as i:  # a warp has a token
        column, row = T.bind(i * warps + warp), T.bind(strip * ROWS + lane)
        with T.If(tirx.And(row < n, tirx.And(column < tile, first + column < tokens))), T.Then():
            total = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(total, bias[row], [0])
            add_up(S, total, warps, tile * _PITCH, column * _PITCH + lane)
            store_result(Y, residual, total, T.bind((first + column) * n + row), dtype, epilogue, low, high)
