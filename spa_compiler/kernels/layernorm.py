"""LayerNormalization of a panel: y = (x - mean) / sqrt(variance + epsilon) * gamma + beta over the features.

Features are the rows of a panel, so a reduction over them never mixes lanes. Two passes over the data, which is in L2:
no cancellation. Definition: ONNX operator LayerNormalization-17 with one normalized axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, AVX512, Isa, at, const, spread, store

F32 = NDArray[np.float32]


def reference(x: F32, gamma: F32, beta: F32, epsilon: float) -> F32:
    """`x` [features, lanes] in float64."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=0)
    scale = 1.0 / np.sqrt((centred**2).mean(axis=0) + epsilon)
    return np.asarray(centred * scale * gamma[:, None] + beta[:, None], np.float32)


def name(lanes: int) -> str:
    return f"spa_layernorm_{lanes}"


def _zero(buffer, count, W):
    for i in range(count):
        store(buffer, const(0.0, W), i * W, W)


def _accumulate(buffer, index, value, W):
    store(buffer, buffer[at(index, W)] + value, index, W)


def _square(x, mean, W):
    d = T.bind(x - mean)
    return d * d


def kernel(lanes: int, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_layernorm_<lanes>(x, gamma, beta, out, features, epsilon): one tile; `out` may be `x`."""
    W, V = isa.widths(lanes)  # no passes: with few registers, reading rows in parts costs more than sums on the stack

    @T.prim_func(s_tir=True)
    def layernorm(
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
        beta = T.decl_buffer((ANY,), "float32", data=beta_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        # two partial sums: shorter dependency chains, and half the rounding
        total = T.alloc_buffer((2 * V * W,), "float32", scope="local")
        square = T.alloc_buffer((2 * V * W,), "float32", scope="local")
        mean = T.alloc_buffer((V * W,), "float32", scope="local")
        scale = T.alloc_buffer((V * W,), "float32", scope="local")
        inverse: T.let[T.float32] = T.float32(1.0) / T.Cast("float32", features)
        _zero(total, 2 * V, W)
        _zero(square, 2 * V, W)
        for f in T.serial(T.truncdiv(features, 2)):
            for i in T.unroll(2 * V):
                _accumulate(total, i * W, X[at(f * (2 * lanes) + i * W, W)], W)
        if T.truncmod(features, 2) != 0:
            for v in T.unroll(V):
                _accumulate(total, v * W, X[at((features - 1) * lanes + v * W, W)], W)
        for v in T.unroll(V):
            store(mean, (total[at(v * W, W)] + total[at((V + v) * W, W)]) * spread(inverse, W), v * W, W)
        for f in T.serial(T.truncdiv(features, 2)):
            for r in T.unroll(2):
                for v in T.unroll(V):
                    _accumulate(
                        square,
                        (r * V + v) * W,
                        _square(X[at(f * (2 * lanes) + (r * V + v) * W, W)], mean[at(v * W, W)], W),
                        W,
                    )
        if T.truncmod(features, 2) != 0:
            for v in T.unroll(V):
                _accumulate(square, v * W, _square(X[at((features - 1) * lanes + v * W, W)], mean[at(v * W, W)], W), W)
        for v in T.unroll(V):
            store(
                scale,
                const(1.0, W)
                / T.sqrt((square[at(v * W, W)] + square[at((V + v) * W, W)]) * spread(inverse, W) + spread(epsilon, W)),
                v * W,
                W,
            )
        for f in T.serial(features):
            for v in T.unroll(V):
                store(
                    out,
                    (X[at(f * lanes + v * W, W)] - mean[at(v * W, W)]) * (scale[at(v * W, W)] * spread(gamma[f], W))
                    + spread(beta[f], W),
                    f * lanes + v * W,
                    W,
                )

    return layernorm
