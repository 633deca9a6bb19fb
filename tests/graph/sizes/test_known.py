"""Constants, of the graph and of nodes, stated in every way there is."""

from __future__ import annotations

import onnx
from onnx import helper

from spa_compiler.graph.load import load
from spa_compiler.graph.settle import settle


def test_constant_nodes_of_every_kind() -> None:
    graph = onnx.parser.parse_graph("""g (float[3] x) => (float[3] y) { i = Constant<value_ints = [1, 2]>()
      f = Constant<value_float = 2.5>() t = Constant<value = float[1] {4}>() a = Mul(x, f) y = Add(a, t) }""")
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    settled = settle(model)
    assert {name: settled.values[name].array.tolist() for name in "ift"} == {"i": [1, 2], "f": 2.5, "t": [4.0]}
