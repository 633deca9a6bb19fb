"""Shapes of ONNX Runtime's operators, as its documentation and its own runs have them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graph.sizes.fused import Shape, shapes_of, types_of

X = "float[batch, sequence, 12] x"
CODES = "uint8[2, 9, 10, 4] x, int8[6, 4, 3, 3] w"
WINDOW = "channels_last = 1, kernel_shape = [3, 3], strides = [2, 2]"

OPERATORS: dict[str, tuple[str, str, list[Shape]]] = {
    "activation": ("FastGelu(x)", X, [(2, 13, 12)]),
    "scaled activation": ("ScaledSiLU<alpha = 2.0>(x)", X, [(2, 13, 12)]),
    "gate": ("GatedAdd(x, x, g)", X + ", float[batch, sequence, 1] g", [(2, 13, 12)]),
    "halves": ("BiasSplitGelu(x, b)", X + ", float[12] b", [(2, 13, 6)]),
    "triangle": ("Trilu(x)", X, [(2, 13, 12)]),
    "norm": (
        "SkipLayerNormalization(x, x, g)",
        X + ", float[12] g",
        [(2, 13, 12), (2, 13, 1), (2, 13, 1), (2, 13, 12)],
    ),
    "gated norm": ("GatedRMSNorm(x, g, x)", X + ", float[4] g", [(2, 13, 12)]),
    "matmul": ("FusedMatMul<transB = 1>(x, w)", X + ", float[7, 12] w", [(2, 13, 7)]),
    "matmul of columns": ("FusedMatMul<transA = 1>(x, x)", X, [(2, 12, 12)]),
    "product": ("GemmFastGelu(x, w)", X + ", float[12, 7] w", [(2, 13, 7)]),
    "gemm": ('FusedGemm<activation = "Relu">(x, w)', "float[batch, 3] x, float[3, 5] w", [(2, 5)]),
    "bits": ("MatMulNBits<K = 12, N = 5, block_size = 16>(x, w, w)", X + ", float[5, 1, 8] w", [(2, 13, 5)]),
    "bits for attention": (
        "MatMulNBitsQkv<K = 12, Nq = 8, Nkv = 4, block_size = 16>(x, x)",
        X,
        [(2, 13, 8), (2, 13, 4), (2, 13, 4), (2, 13, 12)],
    ),
    "experts": (
        "MoE<k = 2>(x, r, a, , b)",
        X + ", float[t, 3] r, float[3, 5, 12] a, float[3, 12, 5] b",
        [(2, 13, 12)],
    ),
    "conv": (
        'FusedConv<activation = "Relu">(x, w, b, z0)',
        "float[batch, 3, 32, 32] x, float[8, 3, 3, 3] w, float[8] b, float[batch, 8, 30, 30] z0",
        [(2, 8, 30, 30)],
    ),
    "nhwc": ("NhwcConv(x, w)", "float[batch, 32, 30, 3] x, float[8, 3, 3, 3] w", [(2, 30, 28, 8)]),
    "nhwc, kernels too": ("NhwcConv(x, w)", "float[batch, 32, 30, 4] x, float[8, 3, 3, 4] w", [(2, 30, 28, 8)]),
    "codes nhwc": (f"QLinearConv<{WINDOW}>(x, s, u, w, s, i, s, u)", CODES, [(2, 4, 4, 6)]),
    "codes": (
        "QLinearConv(x, s, u, w, s, i, s, u)",
        "uint8[batch, 4, 9, 10] x, int8[6, 4, 3, 3] w",
        [(2, 6, 7, 8)],
    ),
    "pooled nhwc": (f"QLinearAveragePool<{WINDOW}>(x, s, u, s, u)", CODES, [(2, 4, 4, 4)]),
    "pooled": ("QLinearAveragePool<kernel_shape = [3, 3]>(x, s, u, s, u)", "uint8[2, 4, 9, 10] x", [(2, 4, 7, 8)]),
    "pooled whole": ("QLinearGlobalAveragePool<channels_last = 1>(x, s, u, s, u)", CODES, [(2, 1, 1, 4)]),
    "choice": (
        "QLinearWhere(c, x, s, u, y, s, u, s, u)",
        "bool[4, 1] c, uint8[batch, 4, 8] x, uint8[8] y",
        [(2, 4, 8)],
    ),
    "concat": (
        "QLinearConcat<axis = 1>(s, u, x, s, u, y, s, u)",
        "uint8[batch, 4] x, uint8[batch, 5] y",
        [(2, 9)],
    ),
    "window over time": (
        "CausalConvWithState<dilation = 2>(x, w)",
        "float[2, 6, 9] x, float[6, 1, 3] w",
        [(2, 6, 9), (2, 6, 4)],
    ),
    "channels last": (
        "CausalConvWithState<channels_last = 1>(x, w)",
        "float[2, 9, 2, 3] x, float[6, 1, 3] w",
        [(2, 9, 2, 3), (2, 2, 2, 3)],
    ),
    "states of several positions": (
        "CausalConvWithState<state_window = 2>(x, w)",
        "float[2, 6, 9] x, float[6, 1, 3] w",
        [(2, 6, 9), (2, 2, 6, 2)],
    ),
    "a state that is given": (
        "CausalConvWithState<ndim = 2>(x, w, , p)",
        "float[2, 6, 9, 9] x, float[6, 1, 3, 3] w, float[2, 6, 9, 2] p",
        [(2, 6, 9, 9), (2, 6, 9, 2)],
    ),
    "embedding of codes": (
        "GatherBlockQuantized<bits = 4, block_size = 16>(t, ids, c)",
        "uint8[6, 16] t, int64[batch, sequence] ids, float[6, 2] c",
        [(2, 13, 32)],
    ),
    "unheard of": ("Nothing(x)", X, [None]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes(name: str) -> None:
    call, inputs, wanted = OPERATORS[name]
    assert shapes_of(call, inputs, len(wanted)) == wanted


@pytest.mark.parametrize("opset", [9, 17])
def test_operators_named_like_newer_ones_of_onnx(opset: int) -> None:
    assert shapes_of("Trilu(x)", X, opset=opset) == [(2, 13, 12)]
    assert shapes_of("Pad(x, p)", "float[4] x, int64[2] p", opset=opset) == [(None,)]


def test_types() -> None:
    assert types_of(f"QLinearAveragePool<{WINDOW}>(x, s, u, s, u)", CODES) == [np.dtype(np.uint8)]
    assert types_of("DynamicQuantizeMatMul(x, w, s)", X + ", int8[12, 3] w") == [np.dtype(np.float32)]
    assert types_of("QGemm(x, s, u, w, s, i)", "uint8[2, 3] x, int8[3, 5] w") == [np.dtype(np.float32)]
