"""The product of two panels, element by element, as in SwiGLU: x *= factor.

A linear step applies it to the chunk that it has just computed, while that is in L1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, AVX512, Isa, at, store

F32 = NDArray[np.float32]

NAME = "spa_gate"
_AT_ONCE = 4  # registers


def reference(x: F32, factor: F32) -> F32:
    """Arrays of one shape, in float64."""
    return np.asarray(x.astype(np.float64) * factor, np.float32)


def kernel(isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_gate(x, factor, count): `count` floats, in place."""
    W = isa.width

    @T.prim_func(s_tir=True)
    def gate(x_: T.handle("float32"), factor_: T.handle("float32"), count: T.int32):
        T.func_attr({"global_symbol": NAME, "tirx.noalias": True})
        X = T.decl_buffer((ANY,), "float32", data=x_)
        F = T.decl_buffer((ANY,), "float32", data=factor_)
        blocks: T.let[T.int32] = T.truncdiv(count, _AT_ONCE * W)
        for b in T.serial(blocks):
            for i in T.unroll(_AT_ONCE):
                index = (b * _AT_ONCE + i) * W
                store(X, X[at(index, W)] * F[at(index, W)], index, W)
        for i in T.serial(count - blocks * (_AT_ONCE * W)):
            X[blocks * (_AT_ONCE * W) + i] = X[blocks * (_AT_ONCE * W) + i] * F[blocks * (_AT_ONCE * W) + i]

    return gate
