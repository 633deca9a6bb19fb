"""Values of small tensors: numpy agrees with the operators, nothing large is computed."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph.load import load
from spa_compiler.graph.settle import settle
from tests.onnx_text import model_from

ARITHMETIC = {
    "Div(a, b)": [-3, 3, 2],
    "Mod(a, b)": [1, 1, 0],
    "Mod<fmod = 1>(a, b)": [-1, 1, 0],
    "Max(a, b)": [2, 7, 4],
    "Where(c, a, b)": [-7, 2, 4],
    "Slice(a, last, first, zero, back)": [4, 7],
    "ReduceProd<keepdims = 0>(a)": -196,
    "CumSum<exclusive = 1, reverse = 1>(a, zero0)": [11, 4, 0],
    "ScatterND(a, at, one)": [-7, 1, 4],
    "ConstantOfShape<value = int64[1] {5}>(two)": [5, 5],
    "Range(zero0, three, two0)": [0, 2],
    "OneHot(first, three, values)": [[9, 8, 8]],
    "Trilu<upper = 0>(square)": [[1, 0], [3, 4]],
    "Tile(a, two)": [-7, 7, 4, -7, 7, 4],
    "Expand(two, three1)": [2, 2, 2],
    "Cast<to = 9>(a)": [True, True, True],
    "Pad(two, pads)": [2, 0],
}


@pytest.mark.parametrize("call", ARITHMETIC)
def test_values(call: str) -> None:
    settled = settle(
        model_from(f"""g (float[1] x) => (float[1] y) <int64[3] a = {{-7, 7, 4}}, int64[3] b = {{2, 2, 2}},
      bool[3] c = {{1, 0, 1}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] back = {{-1}},
      int64[1] last = {{-1}}, int64[1] first = {{0}}, int64[1, 1] at = {{1}}, int64 zero0 = {{0}}, int64 two0 = {{2}},
      int64 three = {{3}}, int64[1] three1 = {{3}}, int64[2] values = {{8, 9}}, int64[2, 2] square = {{1, 2, 3, 4}},
      int64[2] pads = {{0, 1}}> {{ v = {call} f = Cast<to = 1>(v) z = ReduceSum<keepdims = 0>(f) y = Add(x, z) }}""")
    )
    if "two)" in call and call.startswith("ConstantOfShape"):
        assert settled.values["v"].array.dtype == np.int64
    assert settled.values["v"].array.tolist() == ARITHMETIC[call]
    assert settled.values["v"].fixed.all()


def test_large_values_are_only_shapes() -> None:
    settled = settle(
        model_from("""g (float[1] x) => (float[300, 300] y) <int64[2] shape = {300, 300}>
      { v = ConstantOfShape(shape) w = Neg(v) y = Add(x, w) }""")
    )
    assert "v" not in settled.values
    assert settled.shapes["y"] == (300, 300)


def test_outer_products_are_not_computed() -> None:
    settled = settle(
        model_from("""g (float[1] x) => (bool[60000, 60000] y)
      <int64 zero = {0}, int64 n = {60000}, int64 one = {1}, int64[1] at = {1}>
      { r = Range(zero, n, one) c = Unsqueeze(r, at) y = Less(r, c) }""")
    )
    assert settled.shapes["y"] == (60000, 60000)
    assert "r" in settled.values
    assert "y" not in settled.values


def test_random_numbers_have_shapes_only() -> None:
    settled = settle(
        model_from("""g (float[N, 4] x) => (float[N, 4] y)
      { r = RandomNormalLike(x) u = RandomUniform<shape = [4]>() s = Add(r, u) y = Add(x, s) }""")
    )
    assert settled.shapes["r"] == (2, 4)
    assert "u" not in settled.values


def test_opset_before_axes_were_inputs() -> None:
    value = numpy_helper.from_array(np.array([3, 4, 5], np.int64), "a")
    nodes = [
        helper.make_node("Slice", ["a"], ["s"], starts=[-2], ends=[2**31 - 1], axes=[0]),
        helper.make_node("Unsqueeze", ["s"], ["u"], axes=[0]),
        helper.make_node("Squeeze", ["u"], ["q"], axes=[0]),
        helper.make_node("Split", ["q"], ["p", "r"], axis=0),
        helper.make_node("Reshape", ["x", "p"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [value],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4))
    assert settle(model).values["r"].array.tolist() == [5]
