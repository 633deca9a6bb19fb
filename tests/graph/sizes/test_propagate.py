"""Passes over a graph: operators that nobody knows."""

from __future__ import annotations

from spa_compiler.graph.settle import settle
from tests.onnx_text import model_from


def test_what_the_file_states_behind_unknown_operators() -> None:
    model = model_from("""<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
      g (float[batch, 4] x) => (float[batch, 9] z) <float[batch, 9] y> { y = own.Thing(x) z = Relu(y) }""")
    settled = settle(model)
    assert settled.shapes["z"] == (2, 9)
    assert settled.varies["z"] == (True, False)
