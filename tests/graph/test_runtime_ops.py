"""Files that ONNX Runtime writes have operators of its own in the default domain: they load, and compute what they did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from spa_compiler.errors import ModelError
from spa_compiler.graph import runtime_ops
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from spa_compiler.graph.save import save, to_proto
from spa_compiler.graph.session import open_session, run
from spa_compiler.graph.settle import settle

HEADER = '<ir_version: 10, opset_import: ["" : 17]>\n'
NORM = """g (float[N, 6] x) => (float[N, 6] y) <float[6] s = {1, 2, 3, 4, 5, 6}> {
  two = Constant <value = float {2.0}> ()
  e = Constant <value = float {0.1}> ()
  q = Pow(x, two)
  m = ReduceMean <axes = [-1]> (q)
  a = Add(m, e)
  r = Sqrt(a)
  d = Div(x, r)
  y = Mul(d, s)
}"""
FUSED = """g (float[N, 6] x) => (float[N, 6] y) <float[6] s = {1, 2, 3, 4, 5, 6}> {
  h, i = SimplifiedLayerNormalization <epsilon = 0.1> (x, s)
  y = Mul(h, i)
}"""
X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)


def test_what_the_optimizer_writes(tmp_path: Path) -> None:
    source = onnx.parser.parse_model(HEADER + NORM)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    (wanted,) = onnxruntime.InferenceSession(source.SerializeToString(), options).run(None, {"x": X})
    model = load(tmp_path / "fused.onnx")
    assert [(node.op, node.domain or "") for node in model.graph.nodes] == [("SimplifiedLayerNormalization", "")]
    result = canonicalize(model, [{"x": X}])
    assert result.notes == ()
    path = save(result.model, tmp_path / "written.onnx")[0]
    assert np.allclose(run(open_session(path), {"x": X})["y"], wanted, atol=1e-6)


def test_shapes() -> None:
    shapes = settle(load(onnx.parser.parse_model(HEADER + FUSED)), {"x": (3, 6)}).shapes
    assert (shapes["h"], shapes["i"]) == ((3, 6), (3, 1))


def test_in_branches() -> None:
    text = """g (bool c, float[2, 6] x) => (float[2, 6] y) <float[6] s = {1, 2, 3, 4, 5, 6}> {
      y = If(c) <then_branch = t () => (float[2, 6] a) { a = SimplifiedLayerNormalization(x, s) },
                 else_branch = e () => (float[2, 6] b) { b = Abs(x) }>
    }"""
    model = load(onnx.parser.parse_model(HEADER + text))
    feeds = {"c": np.array(True), "x": X[:2]}
    y = run(open_session(to_proto(model).SerializeToString()), feeds)["y"]
    root = np.sqrt(np.square(X[:2]).mean(-1, keepdims=True) + 1e-5)
    assert np.allclose(y, X[:2] / root * np.arange(1, 7, dtype=np.float32), atol=1e-5)


def test_hiding_leaves_the_rest_alone() -> None:
    proto = onnx.parser.parse_model(HEADER + FUSED)
    runtime_ops.hide(proto)
    assert [node.domain for node in proto.graph.node] == ["com.microsoft", ""]
    assert [entry.domain for entry in proto.opset_import] == ["", "com.microsoft"]
    plain = onnx.parser.parse_model(HEADER + NORM)
    before = plain.SerializeToString()
    runtime_ops.hide(plain)
    assert plain.SerializeToString() == before


def test_the_rest_is_checked_all_the_same() -> None:
    with pytest.raises(ModelError, match="not valid ONNX: Unrecognized attribute: alpha"):
        load(onnx.parser.parse_model(HEADER + FUSED.replace("Mul(h", "Mul <alpha = 1.0> (h")))
