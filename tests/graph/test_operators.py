"""Weighted operators look alike, whatever the layout of their weight."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, reaches_output_bare, weighted_ops
from tests.onnx_text import model_from

W23 = "{1, 2, 3, 4, 5, 6}"


def only(model: Model) -> WeightedOp:
    (op,) = weighted_ops(model.graph)
    return op


def gemm(attributes: str, dims: str = "3, 2") -> Model:
    return model_from(f"""g (float[N, 3] x) => (float[N, 2] y) <float[{dims}] w = {W23}, float[2] b = {{7, 8}}> {{
      y = Gemm{attributes}(x, w, b)
    }}""")


def test_matmul() -> None:
    op = only(model_from(f"g (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {W23}> {{ y = MatMul(x, w) }}"))
    assert (op.kind, op.n, op.k, op.group, op.kernel, op.pointwise, op.bias) == ("MatMul", 2, 3, 1, (), True, None)
    assert op.rows().tolist() == [[1, 3, 5], [2, 4, 6]]
    op.replace(np.array([[0, 0, 1], [2, 0, 0]], np.float64))
    assert op.weight.values.tolist() == [[0, 2], [0, 0], [1, 0]]
    assert op.weight.values.dtype == np.float32


def test_gemm() -> None:
    op = only(gemm(""))
    assert op.rows().tolist() == [[1, 3, 5], [2, 4, 6]]
    assert op.bias is not None
    assert op.bias.tolist() == [7, 8]
    op = only(gemm("<transB = 1>", "2, 3"))
    assert op.rows().tolist() == [[1, 2, 3], [4, 5, 6]]
    op.replace(np.zeros((2, 3), np.float32))
    assert op.weight.shape == (2, 3)


@pytest.mark.parametrize("attributes", ["<alpha = 2.0>", "<beta = 0.5>"])
def test_scaled_gemm_is_none(attributes: str) -> None:
    assert weighted_ops(gemm(attributes).graph) == []


def conv(attributes: str, dims: str, channels: int = 4) -> WeightedOp:
    count = int(np.prod([int(size) for size in dims.split(",")]))
    values = ", ".join(str(i) for i in range(count))
    return only(
        model_from(f"""g (float[N, {channels}, 8, 8] x) => (float[N, C, H, W] y) <float[{dims}] w = {{{values}}}> {{
      y = Conv{attributes}(x, w)
    }}""")
    )


def test_conv() -> None:
    op = conv("<pads = [1, 1, 1, 1]>", "6, 4, 3, 3")
    assert (op.n, op.k, op.group, op.kernel, op.pointwise, op.depthwise) == (6, 36, 1, (3, 3), False, False)
    assert op.rows().shape == (6, 36)
    op.replace(np.ones((6, 36), np.float32))
    assert op.weight.shape == (6, 4, 3, 3)
    assert op.is_first_conv
    assert conv("", "6, 4, 1, 1").pointwise
    assert not conv("<strides = [2, 2]>", "6, 4, 1, 1").pointwise
    assert not conv("<group = 2>", "6, 2, 1, 1").pointwise
    assert conv("<group = 4>", "4, 1, 3, 3").depthwise


def test_only_the_first_conv_is_first() -> None:
    model = model_from("""g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y)
      <float[1, 1, 1, 1] a = {1}, float[1, 1, 1, 1] b = {1}> {
      [one] h = Conv(x, a)
      r = Relu(h)
      [two] y = Conv(r, b)
    }""")
    assert [(op.name, op.is_first_conv) for op in weighted_ops(model.graph)] == [("one", True), ("two", False)]


def test_what_is_no_weighted_operator() -> None:
    model = model_from("""g (float[2, 2] x, int32[2, 2] i) => (float[2, 2] y, int32[2, 2] j)
      <float[2, 2] w = {1, 2, 3, 4}, float[1, 2, 2] deep = {1, 2, 3, 4}, int32[2, 2] n = {1, 2, 3, 4}> {
      a = MatMul(w, x)
      b = MatMul(x, a)
      c = MatMul(b, deep)
      y = Squeeze(c)
      j = MatMul(i, n)
    }""")
    assert weighted_ops(model.graph) == []


def test_a_shared_weight_is_cloned() -> None:
    model = model_from(f"""g (float[N, 3] x) => (float[N, 2] y, float[N, 2] z) <float[3, 2] w = {W23}> {{
      y = MatMul(x, w)
      z = MatMul(x, w)
    }}""")
    first, second = weighted_ops(model.graph)
    first.replace(np.zeros((2, 3), np.float32))
    assert not first.rows().any()
    assert second.rows().any()
    assert first.weight.name == "w_y"
    assert [op.weight.name for op in weighted_ops(model.graph)] == ["w_y", "w"]


BARE = """g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2] k = {1, 2}> {
  h = MatMul(x, w)
  %s
}"""


@pytest.mark.parametrize(
    "rest,bare",
    [
        ("y = Add(h, k)", True),
        ("a = Add(h, k) y = Softmax(a)", True),
        ("s = Sigmoid(h) y = Mul(h, s)", True),
        ("y = Add(h, x)", False),
        ("y = LayerNormalization(h, k)", False),
        ("m = ReduceMean<keepdims = 1>(h) c = Sub(h, m) q = Mul(c, c) v = ReduceMean(q) y = Div(c, v)", False),
        ("n = ReduceL2(h) y = Div(h, n)", False),
        ("y = MatMul(h, w)", False),
        ("t = Transpose(h) y = MatMul(t, x)", False),
    ],
)
def test_reaching_an_output_bare(rest: str, bare: bool) -> None:
    model = model_from(BARE % rest)
    assert reaches_output_bare(weighted_ops(model.graph)[0], model.graph) is bare
