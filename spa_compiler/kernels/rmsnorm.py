"""RMS normalization of a panel: y = x / sqrt(mean of x^2 + epsilon) * gamma over the features.

Features are the rows of a panel, so a reduction over them never mixes lanes; one token has a lane to itself, and its
features fill the register instead. Definition: ONNX operator RMSNormalization-23 with one normalized axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, AVX512, Isa, at, const, spread, store

F32 = NDArray[np.float32]

_SUMS = 4  # partial sums of one lane: shorter dependency chains, and less rounding


def reference(x: F32, gamma: F32, epsilon: float) -> F32:
    """`x` [features, lanes] in float64."""
    wide = x.astype(np.float64)
    scale = 1.0 / np.sqrt((wide**2).mean(axis=0) + epsilon)
    return np.asarray(wide * scale * gamma[:, None], np.float32)


def name(lanes: int) -> str:
    return f"spa_rmsnorm_{lanes}"


def _add_square(sums, index, x, W):
    x = T.bind(x)
    store(sums, sums[at(index, W)] + x * x, index, W)


def _sum(buffer, count):
    """The sum of `count` scalars, a power of two, in pairs."""
    values = [buffer[i] for i in range(count)]
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def kernel(lanes: int, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_rmsnorm_<lanes>(x, gamma, beta, out, features, epsilon): one tile; `out` may be `x`.

    `beta` is not read: the signature is that of a LayerNormalization, and C calls both through one table.
    """
    return _one(isa) if lanes == 1 else _several(lanes, isa)


def _several(lanes, isa):
    W, V = isa.widths(lanes)
    S = max(1, _SUMS // V)

    @T.prim_func(s_tir=True)
    def rmsnorm(
        x_: T.handle("float32"),
        gamma_: T.handle("float32"),
        beta_: T.handle("float32"),
        out_: T.handle("float32"),
        features: T.int32,
        epsilon: T.float32,
    ):
        T.func_attr({"global_symbol": name(lanes)})
        X = T.decl_buffer((ANY,), "float32", data=x_)
        gamma = T.decl_buffer((ANY,), "float32", data=gamma_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        square = T.alloc_buffer((S * V * W,), "float32", scope="local")
        scale = T.alloc_buffer((V * W,), "float32", scope="local")
        inverse: T.let[T.float32] = T.float32(1.0) / T.Cast("float32", features)
        for i in T.unroll(S * V):
            store(square, const(0.0, W), i * W, W)
        for f in T.serial(T.truncdiv(features, S)):
            for i in T.unroll(S * V):
                _add_square(square, i * W, X[at(f * (S * lanes) + i * W, W)], W)
        for f in T.serial(T.truncmod(features, S)):
            for v in T.unroll(V):
                _add_square(square, v * W, X[at((features - 1 - f) * lanes + v * W, W)], W)
        for s in T.unroll(S - 1):
            for v in T.unroll(V):
                store(square, square[at(v * W, W)] + square[at(((s + 1) * V + v) * W, W)], v * W, W)
        for v in T.unroll(V):
            mean = T.bind(square[at(v * W, W)] * spread(inverse, W))
            store(scale, const(1.0, W) / T.sqrt(mean + spread(epsilon, W)), v * W, W)
        for f in T.serial(features):
            for v in T.unroll(V):
                x = X[at(f * lanes + v * W, W)]
                store(out, x * (scale[at(v * W, W)] * spread(gamma[f], W)), f * lanes + v * W, W)

    return rmsnorm


def _one(isa):
    W = isa.width

    @T.prim_func(s_tir=True)
    def rmsnorm_one(
        x_: T.handle("float32"),
        gamma_: T.handle("float32"),
        beta_: T.handle("float32"),
        out_: T.handle("float32"),
        features: T.int32,
        epsilon: T.float32,
    ):
        T.func_attr({"global_symbol": name(1)})
        X = T.decl_buffer((ANY,), "float32", data=x_)
        gamma = T.decl_buffer((ANY,), "float32", data=gamma_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        square = T.alloc_buffer((_SUMS * W,), "float32", scope="local")
        blocks: T.let[T.int32] = T.truncdiv(features, _SUMS * W)
        for i in T.unroll(_SUMS):
            store(square, const(0.0, W), i * W, W)
        for b in T.serial(blocks):
            for i in T.unroll(_SUMS):
                _add_square(square, i * W, X[at((b * _SUMS + i) * W, W)], W)
        for f in T.serial(features - blocks * (_SUMS * W)):
            _add_square(square, 0, X[features - 1 - f], 1)
        total: T.let[T.float32] = _sum(square, _SUMS * W)
        mean: T.let[T.float32] = total / T.Cast("float32", features)
        scale: T.let[T.float32] = T.float32(1.0) / T.sqrt(mean + epsilon)
        whole: T.let[T.int32] = T.truncdiv(features, W)
        for b in T.serial(whole):
            x = X[at(b * W, W)]
            store(out, x * (spread(scale, W) * gamma[at(b * W, W)]), b * W, W)
        for f in T.serial(features - whole * W):
            out[whole * W + f] = X[whole * W + f] * (scale * gamma[whole * W + f])

    return rmsnorm_one
