"""Shapes of ONNX Runtime's attention operators: outputs, and the caches and states for the next step."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graph.sizes.fused import Shape, shapes_of, types_of

X = "float[batch, sequence, 12] x"
PAST = "float[2, 2, 3, 5, 4] p"

OPERATORS: dict[str, tuple[str, str, list[Shape]]] = {
    "attention": ("Attention<num_heads = 3>(x, w, b)", X + ", float[12, 36] w, float[36] b", [(2, 13, 12)]),
    "attention, sizes apart": (
        "Attention<num_heads = 3, qkv_hidden_sizes = [12, 12, 15]>(x, w)",
        X + ", float[12, 39] w",
        [(2, 13, 15)],
    ),
    "attention, past": (
        "Attention<num_heads = 3>(x, w, , , p)",
        "float[2, 7, 12] x, float[12, 36] w, " + PAST,
        [(2, 7, 12), (2, 2, 3, 12, 4)],
    ),
    "attention, buffer": (
        "Attention<num_heads = 3, past_present_share_buffer = 1>(x, w, , , p)",
        "float[2, 1, 12] x, float[12, 36] w, " + PAST,
        [(2, 1, 12), (2, 2, 3, 5, 4)],
    ),
    "attention of codes": (
        "QAttention<num_heads = 3>(x, w, b, s, s, , u, i, p)",
        "uint8[2, 7, 12] x, int8[12, 36] w, float[36] b, " + PAST,
        [(2, 7, 12), (2, 2, 3, 12, 4)],
    ),
    "packed attention": (
        "PackedAttention<num_heads = 3>(x, w, b, o, c)",
        "float[9, 12] x, float[12, 36] w, float[36] b, int32[2, 5] o, int32[3] c",
        [(9, 12)],
    ),
    "heads": (
        "MultiHeadAttention<num_heads = 3>(x, k, v)",
        X + ", float[batch, 7, 12] k, float[batch, 7, 24] v",
        [(2, 13, 24), (2, 3, 7, 4), (2, 3, 7, 8), (2, 3, 13, 7)],
    ),
    "heads, apart": (
        "MultiHeadAttention<num_heads = 3>(x, k, v)",
        X + ", float[batch, 3, 7, 4] k, float[batch, 3, 7, 8] v",
        [(2, 13, 24), (2, 3, 7, 4), (2, 3, 7, 8)],
    ),
    "heads, all in one": ("MultiHeadAttention<num_heads = 3>(q)", "float[2, 5, 3, 3, 4] q", [(2, 5, 12)]),
    "heads, two in one": (
        "MultiHeadAttention<num_heads = 3>(x, kv)",
        X + ", float[batch, 7, 3, 2, 4] kv",
        [(2, 13, 12), (2, 3, 7, 4)],
    ),
    "heads, past": (
        "MultiHeadAttention<num_heads = 3>(x, x, x, , , , p, p)",
        "float[2, 7, 12] x, float[2, 3, 5, 4] p",
        [(2, 7, 12), (2, 3, 12, 4), (2, 3, 12, 4)],
    ),
    "packed heads": (
        "PackedMultiHeadAttention<num_heads = 3>(q, q, v, , o, c)",
        "float[9, 12] q, float[9, 15] v, int32[2, 5] o, int32[3] c",
        [(9, 15)],
    ),
    "packed heads, all in one": (
        "PackedMultiHeadAttention<num_heads = 3>(q, , , , o, c)",
        "float[9, 3, 3, 4] q, int32[2, 5] o, int32[3] c",
        [(9, 12)],
    ),
    "groups": (
        "GroupQueryAttention<num_heads = 3, kv_num_heads = 1>(x, k)",
        X + ", float[batch, sequence, 4] k",
        [(2, 13, 12), (2, 1, 13, 4), (2, 1, 13, 4)],
    ),
    "groups, all in one": (
        "GroupQueryAttention<num_heads = 4, kv_num_heads = 1>(x)",
        X,
        [(2, 13, 8), (2, 1, 13, 2), (2, 1, 13, 2)],
    ),
    "groups, past": (
        "GroupQueryAttention<num_heads = 3, kv_num_heads = 1>(x, k, k, p, p)",
        X + ", float[batch, sequence, 4] k, float[batch, 1, 5, 4] p",
        [(2, 13, 12), (2, 1, None, 4), (2, 1, None, 4)],
    ),
    "linear": (
        "LinearAttention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)",
        "float[2, 5, 24] q, float[2, 5, 12] k, float[2, 5, 10] v",
        [(2, 5, 20), (2, 2, 6, 5)],
    ),
    "linear, states of several positions": (
        "LinearAttention<q_num_heads = 2, kv_num_heads = 4, state_window = 3>(q, k, v)",
        "float[2, 5, 12] q, float[2, 5, 24] k, float[2, 5, 20] v",
        [(2, 5, 20), (3, 2, 4, 6, 5)],
    ),
    "gates": (
        "LinearAttentionGate(a, b, b, c)",
        "float[2, 5, 3] a, float[3] b, float[2, 5, 3] c",
        [(2, 5, 3), (2, 5, 3)],
    ),
    "rotation": (
        "GemmaRotaryEmbedding(e, q, q, k, k)",
        "float[2, 5, 4] e, float16[2, 3, 5, 4] q, float16[2, 1, 5, 4] k",
        [(2, 3, 5, 4), (2, 1, 5, 4)],
    ),
    "rotation in sections": (
        "MRotaryEmbedding<mrope_section = [1, 1]>(x, p, t, t)",
        X + ", int64[3, batch, sequence] p, float[9, 2] t",
        [(2, 13, 12)],
    ),
    "distances": ("RelativePositionBias<max_distance = 8>(t, five, five)", "float[8, 3] t", [(1, 3, 5, 5)]),
    "distances not known": (
        "RelativePositionBias<max_distance = 8>(t, n, n)",
        "float[8, 3] t, int64 n",
        [(1, 3, None, None)],
    ),
    "gated distances": (
        "GatedRelativePositionBias<num_heads = 3>(x, b, r, w, w0, e)",
        X + ", float[12] b, float[1, 3, sequence, sequence] r, float[4, 8] w, float[8] w0, float[1, 3, 1, 1] e",
        [(2, 3, 13, 13)],
    ),
    "gated distances of tokens": (
        "GatedRelativePositionBias<num_heads = 3>(q, b, r, w, w0, e, o)",
        "float[9, 12] q, float[12] b, float[1, 3, 7, 7] r, float[4, 8] w, float[8] w0, float[1, 3, 1, 1] e, int32[2, 7] o",
        [(2, 3, 7, 7)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes(name: str) -> None:
    call, inputs, wanted = OPERATORS[name]
    assert shapes_of(call, inputs, len(wanted)) == wanted


def test_attention_of_codes_makes_floats() -> None:
    call, inputs, _ = OPERATORS["attention of codes"]
    assert types_of(call, inputs, 2) == [np.dtype(np.float32)] * 2
