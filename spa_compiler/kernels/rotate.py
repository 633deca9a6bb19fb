"""Rotary positions (RoPE, arXiv 2104.09864) on panels: y = x cos + turned(x) sin, head by head.

    turned(x) = (-x[half:], x[:half])     features of a head, in two halves

A head's features are rows of the panel, and cosines and sines are panels of as many rows, so all four are flat arrays
of one layout: what belongs together lies `half` rows apart, for any number of lanes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, AVX512, Isa, at, store

F32 = NDArray[np.float32]

NAME = "spa_rotate"


def reference(x: F32, cos: F32, sin: F32) -> F32:
    """All [depth, lanes], depth even, in float64."""
    half = len(x) // 2
    turned = np.concatenate([-x[half:], x[:half]]).astype(np.float64)
    return np.asarray(x * cos.astype(np.float64) + turned * sin, np.float32)


def _turn(X, C, S, out, low, high, W):
    a, b = T.bind(X[at(low, W)]), T.bind(X[at(high, W)])
    store(out, a * C[at(low, W)] - b * S[at(low, W)], low, W)
    store(out, b * C[at(high, W)] + a * S[at(high, W)], high, W)


def kernel(isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_rotate(x, cos, sin, out, count): a head, `count` floats in each half; `out` may be `x`."""
    W = isa.width

    @T.prim_func(s_tir=True)
    def rotate(
        x_: T.handle("float32"),
        cos_: T.handle("float32"),
        sin_: T.handle("float32"),
        out_: T.handle("float32"),
        count: T.int32,
    ):
        T.func_attr({"global_symbol": NAME})
        X = T.decl_buffer((ANY,), "float32", data=x_)
        C = T.decl_buffer((ANY,), "float32", data=cos_)
        S = T.decl_buffer((ANY,), "float32", data=sin_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        blocks: T.let[T.int32] = T.truncdiv(count, W)
        for b in T.serial(blocks):
            _turn(X, C, S, out, b * W, count + b * W, W)
        for i in T.serial(count - blocks * W):
            _turn(X, C, S, out, blocks * W + i, count + blocks * W + i, 1)

    return rotate
