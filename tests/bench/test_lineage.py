"""Which nodes of the original a node stands for, when fusions have renamed it."""

from __future__ import annotations

import onnx
import onnx.parser

from spa_compiler.bench.lineage import Whole
from spa_compiler.bench.trace import Op, ops_of
from tests.onnx_text import HEADER

TEXT = """g (float[n, 8, 4, 4] x) => (float[n, 8, 4, 4] y) {
  c1 = Conv(x, w) r1 = Relu(c1)
  c2 = Conv(r1, w) s = Add(c2, r1) r2 = Relu(s)
  m = MatMul(r2, v) a = Add(m, b) e = Erf(a) g = Mul(a, e)
  p = Transpose(g) q = Softmax(p) y = Add(q, g)
}"""


def whole() -> Whole:
    proto = onnx.parser.parse_model(HEADER + TEXT)
    for node in proto.graph.node:
        node.name = f"n_{node.output[0]}"
    return Whole(ops_of(proto))


def claimed(*parts: Op) -> list[list[str]]:
    graph = whole()
    return [[graph.ops[i].outputs[0] for i in own] for own in graph.claims(parts)]


def op(name: str, kind: str, inputs: tuple[str, ...], *outputs: str, activation: str = "", **more: object) -> Op:
    return Op(name, kind, "", inputs, outputs, activation, **more)  # type: ignore[arg-type]


def test_a_fused_node_stands_for_all_between_its_tensors() -> None:
    parts = (
        op("Conv", "FusedConv", ("x", "w"), "r1"),
        op("fused", "FusedConv", ("r1", "w", "", "r1"), "r2"),
        op("MatMul_fused", "BiasGelu", ("r2",), "g"),
        op("rest", "Blob", ("g",), "y"),
    )
    assert claimed(*parts) == [["c1", "r1"], ["c2", "s", "r2"], ["m", "a", "e", "g"], ["p", "q", "y"]]


def test_no_node_is_claimed_twice() -> None:
    parts = (op("one", "Blob", (), "q"), op("two", "Blob", (), "e"))
    assert claimed(*parts) == [["c1", "r1", "c2", "s", "r2", "m", "a", "g", "p", "q"], ["e"]]


def test_blocked_convolutions_are_found_by_their_names() -> None:
    """Sum and activation were taken in after the node was named, which the next node's tensors do not tell."""
    parts = (
        op("r1_nchwc", "Conv", ("x", "reorder"), "reorder_token_0", activation="Relu"),
        op("c2_nchwc", "Conv", ("reorder_token_0", "reorder_token_1", "", "reorder_token_0"), "t2", activation="Relu"),
        op("ReorderOutput", "ReorderOutput", ("t2",), "reorder_token_2"),
        op("n_m", "MatMul", ("r2", "v"), "m"),
    )
    assert claimed(*parts) == [["c1", "r1"], ["c2", "s", "r2"], [], ["m"]]


def test_a_blocked_convolution_that_took_in_nothing() -> None:
    parts = (op("c2_bn_nchwc_token_7", "Conv", ("a", "b"), "t"), op("n_r2", "Relu", ("t",), "u"))
    assert claimed(*parts) == [["c1", "r1", "c2"], ["s", "r2"]]


def test_names_are_what_is_left_when_tensors_have_new_ones() -> None:
    parts = (
        op("n_a", "Add", ("z",), "InsertedPrecisionFreeCast_a"),
        op("new", "Region", ("k",), "l", sources=("n_q", "n_y")),
        op("cast", "Cast", ("l",), "o"),
    )
    assert claimed(*parts)[1:] == [["e", "g", "p", "q", "y"], []]


def test_readers() -> None:
    graph = whole()
    made = graph.ops[graph.maker["r1"]]
    assert {graph.ops[i].outputs[0] for i in graph.readers(made)} == {"c2", "s"}
