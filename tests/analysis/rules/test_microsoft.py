"""ONNX Runtime's other operators: fused products and gates; packed weights and the rest are refused."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_exact
from tests.analysis.told import groups_of, net, pins_inside, pins_of, reasons_of


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("left", [0, 1])
def test_fused_matmul(left: int, right: int) -> None:
    weight = "5, 4" if right else "4, 5"
    x = "3, 6, 7" if left else "3, 7, 6"
    text = f"""g (float[{x}] x, float[6, 4] w0, float[{weight}] w, float[5, 2] v) => (float[3, 7, 2] y) {{
      h = com.microsoft.FusedMatMul <transA = {left}> (x, w0)
      i = com.microsoft.FusedMatMul <transB = {right}, alpha = 0.5> (h, w)
      y = MatMul(i, v)
    }}"""
    assert [members for _, members in groups_of(net(text)).values()] == [
        {("w0", 1), ("h", 2), ("w", right)},
        {("w", 1 - right), ("i", 2), ("v", 0)},
    ]
    check_exact(net(text))


def test_fused_matmul_with_the_batch_inside() -> None:
    text = """g (float[5, 3, 6] x, float[6, 8] w, float[3, 8, 4] u, float[4, 3, 2] v) => (float[3, 5, 2] y) {
      h = MatMul(x, w)
      i = com.microsoft.FusedMatMul <transBatchA = 1> (h, u)
      y = com.microsoft.FusedMatMul <transBatchB = 1> (i, v)
    }"""
    assert [members for _, members in groups_of(net(text)).values()] == [
        {("w", 1), ("h", 2), ("u", 1)},
        {("u", 2), ("i", 2), ("v", 0)},
    ]
    check_exact(net(text))


def test_fused_matmul_and_an_activation() -> None:
    text = """g (float[7, 6] x, float[4, 6] w, float[4, 2] v) => (float[7, 2] y) <float[7, 4] h> {
      h = com.microsoft.FusedMatMulActivation <activation = "Relu", transB = 1> (x, w)
      y = MatMul(h, v)
    }"""
    assert groups_of(net(text)) == {"channel": (4, {("w", 0), ("h", 1), ("v", 0)})}
    softmax = net(text.replace("Relu", "Softmax"))
    assert groups_of(softmax) == {}
    assert "Softmax of a product" in reasons_of(softmax, "h", 1)


def test_an_inverse_keeps_its_matrices() -> None:
    text = """g (float[2, 6] x, float[6, 32] w, float[16, 2] v) => (float[4, 2] y) <float[2, 2, 4, 4] i> {
      a = MatMul(x, w)
      s = Constant <value = int64[4] {2, 2, 4, 4}> ()
      h = Reshape(a, s)
      i = com.microsoft.Inverse(h)
      f = Constant <value = int64[2] {4, 16}> ()
      j = Reshape(i, f)
      y = MatMul(j, v)
    }"""
    reason = "rows and columns of a matrix"
    assert pins_of(net(text)) >= {("h", 2, "Inverse", reason), ("h", 3, "Inverse", reason)}


def test_a_gate_of_linear_attention() -> None:
    """Element by element over heads: with a head go its entries of bias and scale."""
    text = """g (float[2, 4, 6] x, float[6, 3] wa, float[6, 3] wb, float[3] bias, float[3] scale, float[3, 2] v)
        => (float[2, 4, 2] y) <float[2, 4, 3] d, float[2, 4, 3] e> {
      a = MatMul(x, wa)
      b = MatMul(x, wb)
      d, e = com.microsoft.LinearAttentionGate(a, bias, scale, b)
      f = Mul(d, e)
      y = MatMul(f, v)
    }"""
    members = {("wa", 1), ("wb", 1), ("bias", 0), ("scale", 0), ("v", 0)}
    ((size, found),) = groups_of(net(text)).values()
    assert (size, members <= found, ("d", 2) in found, ("e", 2) in found) == (3, True, True, True)


def test_fused_gemm() -> None:
    text = """g (float[7, 6] x, float[4, 6] w, float[4] b, float[4, 2] v) => (float[7, 2] y) {
      h = com.microsoft.FusedGemm <activation = "Relu", transB = 1> (x, w, b)
      y = MatMul(h, v)
    }"""
    assert groups_of(net(text)) == {"channel": (4, {("w", 0), ("b", 0), ("h", 1), ("v", 0)})}
    check_exact(net(text))
    assert "Softmax of a product" in reasons_of(net(text.replace("Relu", "Softmax")), "h", 1)


@pytest.mark.parametrize(
    "op", ["BiasGelu(h, b)", "FastGelu(h, b)", "FastGelu(h)", "QuickGelu(h)", "Gelu(h)", "BiasAdd(h, b, h)"]
)
def test_activations(op: str) -> None:
    text = f"""g (float[2, 4, 6] x, float[6, 8] w, float[8] b, float[8, 2] v) => (float[2, 4, 2] y) {{
      h = MatMul(x, w)
      i = com.microsoft.{op}
      y = MatMul(i, v)
    }}"""
    members = {("w", 1), ("h", 2), ("i", 2), ("v", 0)} | ({("b", 0)} if "b" in op.split("(")[1] else set())
    assert groups_of(net(text)) == {"channel": (8, members)}
    if "BiasAdd" not in op:  # no kernel for CPUs
        check_exact(net(text))


def test_bias_split_gelu() -> None:
    text = """g (float[2, 4, 6] x, float[6, 8] w, float[8] b, float[4, 2] v) => (float[2, 4, 2] y) {
      h = MatMul(x, w)
      i = com.microsoft.BiasSplitGelu(h, b)
      y = MatMul(i, v)
    }"""
    assert groups_of(net(text)) == {"channel": (4, {("w", 1), ("h", 2), ("b", 0), ("i", 2), ("v", 0)})}


def test_mixture_of_experts() -> None:
    text = """g (float[8, 6] x, float[6, 4] w, float[6, 3] r, float[3, 5, 4] in, float[3, 5] bi, float[3, 4, 5] out,
        float[3, 4] bo, float[4, 2] v) => (float[8, 2] y) <float[8, 4] m> {
      h = MatMul(x, w)
      p = MatMul(x, r)
      m = com.microsoft.MoE <k = 2, activation_type = "gelu"> (h, p, in, bi, out, bo)
      y = MatMul(m, v)
    }"""
    assert groups_of(net(text)) == {
        "channel": (4, {("w", 1), ("h", 1), ("in", 2), ("out", 1), ("bo", 1), ("m", 1), ("v", 0)})
    }
    assert {pin[:2] for pin in pins_inside(net(text))} >= {
        ("p", 1),
        ("in", 0),
        ("in", 1),
        ("out", 2),
        ("bi", 1),
    }
    check_exact(net(text))


def test_a_mixture_of_gated_experts() -> None:
    text = """g (float[8, 6] x, float[6, 4] w, float[6, 3] r, float[3, 5, 4] in, float[3, 4, 5] out, float[3, 5, 4] gate,
        float[4, 2] v) => (float[8, 2] y) <float[8, 4] m> {
      h = MatMul(x, w)
      p = MatMul(x, r)
      m = com.microsoft.MoE <k = 2, activation_type = "silu"> (h, p, in, , out, , gate)
      y = MatMul(m, v)
    }"""
    members = {("w", 1), ("h", 1), ("in", 2), ("out", 1), ("gate", 2), ("m", 1), ("v", 0)}
    assert groups_of(net(text)) == {"channel": (4, members)}
    assert {pin[:2] for pin in pins_inside(net(text))} >= {("gate", 0), ("gate", 1)}


def test_packed_weights_are_pinned() -> None:
    text = """g (float[2, 32] x, float[32, 16] w, uint8[8, 1, 8] codes, float[8] scales, float[8, 2] v)
        => (float[2, 2] y) {
      h = MatMul(x, w)
      i = com.microsoft.MatMulNBits <K = 16, N = 8, bits = 4, block_size = 16> (h, codes, scales)
      y = MatMul(i, v)
    }"""
    assert groups_of(net(text)) == {}
    reason = "weights are packed in blocks of bits"
    assert pins_of(net(text)) >= {("h", 1, "MatMulNBits", reason), ("i", 1, "MatMulNBits", reason)}
    check_exact(net(text))
