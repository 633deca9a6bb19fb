"""Panels: activations feature-major, one tile of tokens after the other.

    tile of `lanes` tokens:   [features, lanes], float32
    panel:                    tile 0 | tile 1 | ...            all tiles of a call have the same number of lanes

`lanes` is one of LANE_COUNTS: whole 512-bit registers for many tokens, 1, 4 or 8 lanes for few. Lanes past the last
token hold copies of it, so that they stay finite and nothing is read out of bounds.

Outside there are `rows`, [tokens, features], of MatMul and Gemm. (Convolutions need no panels: `runtime/images.py`.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, AVX512, ZMM, Isa, emit_transpose

LANE_COUNTS = (1, 4, 8, 16, 32, 48, 64)
MAX_LANES = LANE_COUNTS[-1]

F32 = NDArray[np.float32]


def lanes_for(tokens: int) -> int:
    """Lanes of each tile for `tokens` tokens: the fewest tiles of at most 64, then the narrowest that fit."""
    tiles = max(1, -(-tokens // MAX_LANES))
    each = -(-tokens // tiles)
    return next(lanes for lanes in LANE_COUNTS if lanes >= each)


def pack_reference(x: F32, lanes: int) -> F32:
    """`x` [tokens, features] of one tile -> [features, lanes]."""
    last = np.minimum(np.arange(lanes), len(x) - 1)
    return np.ascontiguousarray(x[last].T)


def pack_kernel(lanes: int, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_pack_rows_<lanes>(x, panel, tokens, features, stride): one tile.

    `x` points at the tile's first token; `stride` is the distance of two tokens.
    """
    if lanes < ZMM:

        @T.prim_func(s_tir=True)
        def pack_few(
            x_: T.handle("float32"), p_: T.handle("float32"), tokens: T.int32, features: T.int32, stride: T.int32
        ):
            T.func_attr({"global_symbol": f"spa_pack_rows_{lanes}", "tirx.noalias": True})
            X = T.decl_buffer((ANY,), "float32", data=x_)
            P = T.decl_buffer((ANY,), "float32", data=p_)
            for f in T.serial(features):
                for t in T.unroll(lanes):
                    P[f * lanes + t] = X[T.min(t, tokens - 1) * stride + f]

        return pack_few

    @T.prim_func(s_tir=True)
    def pack(x_: T.handle("float32"), p_: T.handle("float32"), tokens: T.int32, features: T.int32, stride: T.int32):
        T.func_attr({"global_symbol": f"spa_pack_rows_{lanes}", "tirx.noalias": True})
        X = T.decl_buffer((ANY,), "float32", data=x_)
        P = T.decl_buffer((ANY,), "float32", data=p_)
        for b in T.serial(lanes // 16):
            for f in T.serial(T.truncdiv(features, 16)):
                emit_transpose(
                    X,
                    lambda i: T.min(b * 16 + i, tokens - 1) * stride + f * 16,
                    P,
                    lambda i: (f * 16 + i) * lanes + b * 16,
                    isa,
                )
        for f in T.serial(T.truncmod(features, 16)):
            for t in T.serial(lanes):
                P[(features - 1 - f) * lanes + t] = X[T.min(t, tokens - 1) * stride + (features - 1 - f)]

    return pack


def unpack_kernel(lanes: int, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_unpack_rows_<lanes>(panel, y, tokens, features, stride): the way back, valid tokens alone."""
    if lanes < ZMM:

        @T.prim_func(s_tir=True)
        def unpack_few(
            p_: T.handle("float32"), y_: T.handle("float32"), tokens: T.int32, features: T.int32, stride: T.int32
        ):
            T.func_attr({"global_symbol": f"spa_unpack_rows_{lanes}", "tirx.noalias": True})
            P = T.decl_buffer((ANY,), "float32", data=p_)
            Y = T.decl_buffer((ANY,), "float32", data=y_)
            for t in T.serial(tokens):
                for f in T.serial(features):
                    Y[t * stride + f] = P[f * lanes + t]

        return unpack_few

    @T.prim_func(s_tir=True)
    def unpack(p_: T.handle("float32"), y_: T.handle("float32"), tokens: T.int32, features: T.int32, stride: T.int32):
        T.func_attr({"global_symbol": f"spa_unpack_rows_{lanes}", "tirx.noalias": True})
        P = T.decl_buffer((ANY,), "float32", data=p_)
        Y = T.decl_buffer((ANY,), "float32", data=y_)
        # Tokens outside: 16 write streams. The other way round, strides that are multiples of 4 KiB thrash L1.
        for b in T.serial(T.truncdiv(tokens + 15, 16)):
            for f in T.serial(T.truncdiv(features + 15, 16)):
                if tokens - b * 16 >= 16 and features - f * 16 >= 16:
                    emit_transpose(
                        P,
                        lambda i: (f * 16 + i) * lanes + b * 16,
                        Y,
                        lambda i: (b * 16 + i) * stride + f * 16,
                        isa,
                    )
                else:
                    for t in T.serial(T.min(tokens - b * 16, 16)):
                        for r in T.serial(T.min(features - f * 16, 16)):
                            Y[(b * 16 + t) * stride + f * 16 + r] = P[(f * 16 + r) * lanes + b * 16 + t]

    return unpack
