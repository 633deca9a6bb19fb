"""The attention core of one token over keys and values that lie as rows: softmax(scale q K^T + mask) V.

    q  [heads, depth]     query heads that share one head of keys and values
    K  [keys, depth]      as a cache has them, row by row
    V  [keys, depth]

One token leaves nothing for the lanes of a panel, so keys fill the register while scores are summed (squares of K are
transposed in registers), and features while values are. Keys come in tiles of at most KEYS, one call each, with the
running maximum and sum of online softmax (arXiv 1805.02867). `scale` is in units of log2; `mask` is not.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.attention import LOWEST
from spa_compiler.kernels.vector import ANY, AVX512, LOG2_E, Isa, at, const, exp2, spread, store, transpose

F32 = NDArray[np.float32]

KEYS = 128  # of a tile: its keys and values fit L2 beside anything, its scores L1
MOST_HEADS = 8  # that share what was loaded


def heads_at_once(shared: int) -> int:
    """Of `shared` query heads of one head of keys, those that one call takes."""
    return max(h for h in range(1, MOST_HEADS + 1) if shared % h == 0)


def reference(q: F32, k: F32, v: F32, mask: F32, scale: float) -> F32:
    """`q` [heads, depth], `k`, `v` [keys, depth], `mask` [heads, keys] -> [heads, depth], in float64.

    `scale` is in natural units here.
    """
    s = scale * (q.astype(np.float64) @ k.astype(np.float64).T) + np.maximum(mask, LOWEST)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True) @ v.astype(np.float64), np.float32)


def name(depth: int, heads: int) -> str:
    return f"spa_cached_{depth}_{heads}"


def _pairs(values, join):
    """Values joined in pairs, the results again, until one is left."""
    values = list(values)
    while len(values) > 1:
        values = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + values[len(values) & ~1 :]
    return values[0]


def _add_product(regs, index, value, x, W):
    store(regs, regs[at(index, W)] + value * x, index, W)


def _square(K, q, regs, key, keys, d, depth, G, W):
    """regs [G, W keys] += a square of W keys and W features, transposed; past the last key it reads that one again."""
    rows = [T.bind(K[at(T.min(key + i, keys - 1) * depth + d, W)]) for i in range(W)]
    for r, column in enumerate(transpose(rows) if W > 1 else rows):
        for g in range(G):
            _add_product(regs, g * W, spread(q[g * depth + d + r], W), column, W)


def _score(regs, g, S, scale, mask, mask_stride, key, top, W):
    masked = T.max(mask[at(g * mask_stride + key, W)] * const(LOG2_E, W), const(LOWEST, W))
    x = T.bind(regs[at(g * W, W)] * spread(scale, W) + masked)
    store(S, x, g * KEYS + key, W)
    store(top, T.max(top[at(g * W, W)], x), g * W, W)


def _power(S, g, key, largest, total, W, at_total=None):
    to = g * W if at_total is None else at_total
    p = exp2(S[at(g * KEYS + key, W)] - spread(largest[g], W), W)
    store(S, p, g * KEYS + key, W)
    store(total, total[at(to, W)] + p, to, W)


def _registers(depth, G, isa):
    """(floats of a register, registers of values at a time)."""
    W = math.gcd(depth, isa.width)
    whole = depth // W
    fits = (d for d in range(min(whole, 8), 0, -1) if whole % d == 0 and G * d + d + 1 < isa.registers)
    return W, next(fits, 1)


def kernel(depth: int, heads: int, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_cached_<depth>_<heads>(q, k, v, mask, scores, state, out, keys, mask_stride, part, scale).

    One tile of at most KEYS keys. `mask` has a row of KEYS for each head, `mask_stride` apart (0: one for all), and
    LOWEST behind the last key; `scores` has room for [heads, KEYS], `state` for [2, heads] (maximum and sum). `part` is
    that of `attention.py`.
    """
    G, (W, D) = heads, _registers(depth, heads, isa)

    @T.prim_func(s_tir=True)
    def cached(
        q_: T.handle("float32"),
        k_: T.handle("float32"),
        v_: T.handle("float32"),
        mask_: T.handle("float32"),
        scores_: T.handle("float32"),
        state_: T.handle("float32"),
        out_: T.handle("float32"),
        keys: T.int32,
        mask_stride: T.int32,
        part: T.int32,
        scale: T.float32,
    ):
        T.func_attr({"global_symbol": name(depth, heads), "tirx.noalias": True})
        q = T.decl_buffer((ANY,), "float32", data=q_)
        K = T.decl_buffer((ANY,), "float32", data=k_)
        VALUE = T.decl_buffer((ANY,), "float32", data=v_)
        mask = T.decl_buffer((ANY,), "float32", data=mask_)
        S = T.decl_buffer((ANY,), "float32", data=scores_)
        state = T.decl_buffer((ANY,), "float32", data=state_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        top = T.alloc_buffer((G * W,), "float32", scope="local")
        total = T.alloc_buffer((G * W,), "float32", scope="local")
        largest = T.alloc_buffer((G,), "float32", scope="local")
        factor = T.alloc_buffer((G,), "float32", scope="local")
        first: T.let[T.int32] = T.bitwise_and(part, 1)
        last: T.let[T.int32] = T.bitwise_and(part, 2)
        squares: T.let[T.int32] = T.truncdiv(keys + (W - 1), W)
        for g in T.unroll(G):
            store(top, const(LOWEST, W), g * W, W)
            store(total, const(0.0, W), g * W, W)
            if first != 0:
                state[g] = T.float32(LOWEST)
                state[G + g] = T.float32(0.0)
        for t in T.serial(squares):
            regs = T.alloc_buffer((G * W,), "float32", scope="local")
            for g in T.unroll(G):
                store(regs, const(0.0, W), g * W, W)
            for d in T.serial(depth // W):
                _square(K, q, regs, t * W, keys, d * W, depth, G, W)
            for g in T.unroll(G):
                _score(regs, g, S, scale, mask, mask_stride, t * W, top, W)
        for g in T.unroll(G):
            largest[g] = T.max(state[g], _pairs([top[g * W + i] for i in range(W)], T.max))
            factor[g] = exp2(state[g] - largest[g], 1)
            state[g] = largest[g]
        whole: T.let[T.int32] = T.truncdiv(keys, W)
        for t in T.serial(whole):
            for g in T.unroll(G):
                _power(S, g, t * W, largest, total, W)
        for t in T.serial(keys - whole * W):
            for g in T.unroll(G):
                _power(S, g, whole * W + t, largest, total, 1, g * W)
        for g in T.unroll(G):
            state[G + g] = state[G + g] * factor[g] + _pairs([total[g * W + i] for i in range(W)], lambda a, b: a + b)
        for b in T.serial(depth // W // D):
            regs = T.alloc_buffer((G * D * W,), "float32", scope="local")
            if first != 0:
                for i in T.unroll(G * D):
                    store(regs, const(0.0, W), i * W, W)
            else:
                for g in T.unroll(G):
                    for i in T.unroll(D):
                        before = out[at(g * depth + (b * D + i) * W, W)]
                        store(regs, before * spread(factor[g], W), (g * D + i) * W, W)
            for t in T.serial(keys):
                for i in T.unroll(D):
                    for g in T.unroll(G):
                        _add_product(
                            regs,
                            (g * D + i) * W,
                            spread(S[g * KEYS + t], W),
                            VALUE[at(t * depth + (b * D + i) * W, W)],
                            W,
                        )
            for g in T.unroll(G):
                for i in T.unroll(D):
                    sums = regs[at((g * D + i) * W, W)]
                    if last != 0:
                        store(out, sums / spread(state[G + g], W), g * depth + (b * D + i) * W, W)
                    else:
                        store(out, sums, g * depth + (b * D + i) * W, W)

    return cached
