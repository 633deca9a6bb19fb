"""The attention core on panels: softmax(scale Q^T K + mask) V for one head and one tile of query tokens.

    scores   S[t2, t1] = scale sum_d K[d, t2] Q[d, t1] + mask[t2, t1]  query tokens t1 in the lanes
    softmax  over t2, that is over rows: lanes never talk to each other
    context  C[d, t1] = sum_t2 V[d, t2] P[t2, t1] / sum_t2 P[t2, t1]   a panel again

Keys come in tiles of as many tokens as queries, one call each; maximum and sum are kept from call to call and what
was accumulated is rescaled (online softmax, arXiv 1805.02867), so that any length needs one tile of scores. `scale` is
in units of log2, as the exponential is 2^x; `mask` is not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, AVX512, LOG2_E, Isa, at, const, exp2, spread, store

F32 = NDArray[np.float32]

ROWS = 4  # keys, and later features, that share one load of queries or probabilities; depth must be a multiple
LOWEST = -1e30  # a mask value that means never; finite, so that differences of two stay numbers
FIRST, LAST = 1, 2  # bits of `part`


def reference(q: F32, k: F32, v: F32, mask: F32, scale: float) -> F32:
    """`q` [depth, queries], `k`, `v` [depth, keys], `mask` [keys, queries] -> [depth, queries], in float64.

    `scale` is in natural units here.
    """
    s = scale * (k.astype(np.float64).T @ q.astype(np.float64)) + np.maximum(mask, LOWEST)
    p = np.exp(s - s.max(axis=0))
    return np.asarray(v.astype(np.float64) @ (p / p.sum(axis=0)), np.float32)


def name(lanes: int) -> str:
    return f"spa_attention_{lanes}"


def _power(S, index, top, total, v, W):
    p = exp2(S[at(index, W)] - top[at(v, W)], W)
    store(S, p, index, W)
    store(total, total[at(v, W)] + p, v, W)


def _fma(regs, index, value, x, W):
    store(regs, regs[at(index, W)] + value * x, index, W)


def kernel(lanes: int, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_attention_<lanes>(q, k, v, mask, scores, state, out, depth, keys, mask_stride, part, scale): one tile of
    keys.

    `q`, `k`, `v`, `out` point at the head's first feature in their tiles. `mask` has a row for each key of the tile,
    LOWEST past the last one: `lanes` floats, or one for all queries where `mask_stride` is 0. `scores` has room for
    [lanes, lanes], `state` for [2, lanes] (maximum and sum). `part` has FIRST set on the first call, LAST on the last.
    """
    W, V, passes = isa.passes(ROWS, lanes)
    R = min(ROWS, lanes)  # keys at a time; a tile of one token has one

    def score(regs, scale, shown, S, top, t, lane, r, v):
        """Stores the scores of key R t + r and queries `lane` + v W and following, and raises the maximum."""
        masked = T.max(shown * const(LOG2_E, W), const(LOWEST, W))
        x = T.bind(regs[at((r * V + v) * W, W)] * spread(scale, W) + masked)
        store(S, x, (t * R + r) * lanes + lane + v * W, W)
        store(top, T.max(top[at(v * W, W)], x), v * W, W)

    @T.prim_func(s_tir=True)
    def attention(
        q_: T.handle("float32"),
        k_: T.handle("float32"),
        v_: T.handle("float32"),
        mask_: T.handle("float32"),
        scores_: T.handle("float32"),
        state_: T.handle("float32"),
        out_: T.handle("float32"),
        depth: T.int32,
        keys: T.int32,
        mask_stride: T.int32,
        part: T.int32,
        scale: T.float32,
    ):
        T.func_attr({"global_symbol": name(lanes), "tirx.noalias": True})
        Q = T.decl_buffer((ANY,), "float32", data=q_)
        K = T.decl_buffer((ANY,), "float32", data=k_)
        VALUE = T.decl_buffer((ANY,), "float32", data=v_)
        mask = T.decl_buffer((ANY,), "float32", data=mask_)
        S = T.decl_buffer((ANY,), "float32", data=scores_)
        state = T.decl_buffer((ANY,), "float32", data=state_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        first: T.let[T.int32] = T.bitwise_and(part, 1)
        last: T.let[T.int32] = T.bitwise_and(part, 2)
        for p in T.serial(passes):  # over lanes, which have nothing to do with one another
            lane: T.let[T.int32] = p * (V * W)
            top = T.alloc_buffer((V * W,), "float32", scope="local")
            total = T.alloc_buffer((V * W,), "float32", scope="local")
            factor = T.alloc_buffer((V * W,), "float32", scope="local")
            if first != 0:
                for v in T.unroll(V):
                    store(state, const(LOWEST, W), lane + v * W, W)
                    store(state, const(0.0, W), lanes + lane + v * W, W)
            for v in T.unroll(V):
                store(top, state[at(lane + v * W, W)], v * W, W)
            for t in T.serial(T.truncdiv(keys + (R - 1), R)):
                regs = T.alloc_buffer((R * V * W,), "float32", scope="local")
                for i in T.unroll(R * V):
                    store(regs, const(0.0, W), i * W, W)
                for d in T.serial(depth):
                    for v in T.unroll(V):
                        for r in T.unroll(R):
                            _fma(
                                regs,
                                (r * V + v) * W,
                                spread(K[d * lanes + t * R + r], W),
                                Q[at(d * lanes + lane + v * W, W)],
                                W,
                            )
                if mask_stride == 0:
                    for r in T.unroll(R):
                        for v in T.unroll(V):
                            score(regs, scale, spread(mask[t * R + r], W), S, top, t, lane, r, v)
                else:
                    for r in T.unroll(R):
                        for v in T.unroll(V):
                            score(regs, scale, mask[at((t * R + r) * lanes + lane + v * W, W)], S, top, t, lane, r, v)
            for v in T.unroll(V):
                store(factor, exp2(state[at(lane + v * W, W)] - top[at(v * W, W)], W), v * W, W)
                store(state, top[at(v * W, W)], lane + v * W, W)
                store(total, state[at(lanes + lane + v * W, W)] * factor[at(v * W, W)], v * W, W)
            for t in T.serial(keys):
                for v in T.unroll(V):
                    _power(S, t * lanes + lane + v * W, top, total, v * W, W)
            for v in T.unroll(V):
                store(state, total[at(v * W, W)], lanes + lane + v * W, W)
                if last != 0:
                    store(total, const(1.0, W) / total[at(v * W, W)], v * W, W)
                else:
                    store(total, const(1.0, W), v * W, W)
            for b in T.serial(T.truncdiv(depth, ROWS)):
                regs = T.alloc_buffer((ROWS * V * W,), "float32", scope="local")
                if first != 0:
                    for i in T.unroll(ROWS * V):
                        store(regs, const(0.0, W), i * W, W)
                else:
                    for r in T.unroll(ROWS):
                        for v in T.unroll(V):
                            store(
                                regs,
                                out[at((b * ROWS + r) * lanes + lane + v * W, W)] * factor[at(v * W, W)],
                                (r * V + v) * W,
                                W,
                            )
                for t in T.serial(keys):
                    for v in T.unroll(V):
                        for r in T.unroll(ROWS):
                            _fma(
                                regs,
                                (r * V + v) * W,
                                spread(VALUE[(b * ROWS + r) * lanes + t], W),
                                S[at(t * lanes + lane + v * W, W)],
                                W,
                            )
                for r in T.unroll(ROWS):
                    for v in T.unroll(V):
                        store(
                            out,
                            regs[at((r * V + v) * W, W)] * total[at(v * W, W)],
                            (b * ROWS + r) * lanes + lane + v * W,
                            W,
                        )

    return attention
