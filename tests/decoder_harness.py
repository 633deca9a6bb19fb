"""Attention cores of decoders as regions: rotary positions, shared keys, a mask, with a cache or without; and in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from spa_compiler.kernels import attention, rotate
from spa_compiler.runtime.region import AttentionSpec, RegionBuilder, RegionSpec

F32 = NDArray[np.float32]

HEADS, SHARED, DEPTH, SCALE = 6, 3, 8, 0.3
KEY_HEADS = HEADS // SHARED


def core(cached: bool) -> RegionSpec:
    """Inputs: q, k, v, mask, cos, sin and, `cached`, past keys and values. Outputs: context, keys, values."""
    b = RegionBuilder()
    q, k, v = (b.pack(heads * DEPTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    mask, cos, sin = b.mask(), b.table(DEPTH), b.table(DEPTH)
    q, k = (b.rotate(x, cos, sin) for x in (q, k))
    b.unpack(b.attention(q, k, v, AttentionSpec(HEADS, DEPTH, SCALE, SHARED, cached), mask))
    return b.finish()


def inputs(
    cached: bool,
    batch: int,
    tokens: int,
    past: int = 0,
    mask: Sequence[int] | None = None,
    tables: int = 1,
    seed: int = 0,
) -> list[F32]:
    """Random; the mask is causal where it has a row for each token, and hides some keys besides.

    Args:
        mask: its first three axes; None: [batch, 1, tokens].
        tables: their first axis, 1 or `batch`.
    """
    rng = np.random.default_rng(seed)
    leading = (batch, 1, tokens) if mask is None else tuple(mask)
    hidden = rng.random((*leading, past + tokens)) < 0.2
    hidden[..., 0] = False
    if leading[-1] == tokens:
        hidden |= np.triu(np.ones((tokens, past + tokens), bool), past + 1)
    angles = rng.standard_normal((tables, 1, tokens, DEPTH))
    rows = [rng.standard_normal((batch, tokens, h * DEPTH)) for h in (HEADS, KEY_HEADS, KEY_HEADS)]
    caches = [rng.standard_normal((batch, KEY_HEADS, past, DEPTH)) for _ in range(2 * cached)]
    biased = np.where(hidden, np.finfo(np.float32).min, rng.standard_normal(hidden.shape))
    return [np.asarray(a, np.float32) for a in (*rows, biased, np.cos(angles), np.sin(angles), *caches)]


def expected(given: Sequence[F32]) -> list[NDArray[np.float64]]:
    """In float64, head by head."""
    q, k, v, mask, cos, sin, *caches = given
    batch, tokens, _ = q.shape
    q, k, v = (x.reshape(batch, tokens, -1, DEPTH).transpose(0, 2, 1, 3) for x in (q, k, v))
    cos, sin = (np.broadcast_to(t, (batch, 1, tokens, DEPTH)) for t in (cos, sin))

    def turned(x: F32) -> F32:
        parts = [
            [rotate.reference(x[b, h].T, cos[b, 0].T, sin[b, 0].T).T for h in range(x.shape[1])] for b in range(batch)
        ]
        return np.array(parts, np.float32).reshape(x.shape)

    q, k = turned(q), turned(k)
    if caches:
        k, v = (np.concatenate([past, new], axis=2) for past, new in zip(caches, (k, v), strict=True))
    mask = np.broadcast_to(mask, (batch, HEADS, tokens, k.shape[2]))
    out = np.empty((batch, tokens, HEADS, DEPTH))
    for b in range(batch):
        for h in range(HEADS):
            keys, values = k[b, h // SHARED], v[b, h // SHARED]
            out[b, :, h] = attention.reference(q[b, h].T, keys.T, values.T, mask[b, h].T, SCALE).T
    context = out.reshape(batch, tokens, HEADS * DEPTH)
    return [context, k.astype(np.float64), v.astype(np.float64)] if caches else [context]


def model(cached: bool, shapes: Sequence[Sequence[int | str]] | None = None) -> bytes:
    """The node alone; without `shapes` of its inputs, any shape reaches it."""
    count = 8 if cached else 6
    names, made = [f"x{i}" for i in range(count)], ["y0", "y1", "y2"][: 3 if cached else 1]
    node = helper.make_node(core(cached).op_type, names, made, domain="ai.spa", site="decoder/attention")
    dims = shapes or [None] * count
    graph = helper.make_graph(
        [node],
        "core",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in zip(names, dims, strict=True)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.spa", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def feeds(given: Sequence[F32]) -> dict[str, F32]:
    """The inputs by name."""
    return {f"x{i}": x for i, x in enumerate(given)}
