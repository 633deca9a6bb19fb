"""Tensors made of nothing but a number get a reader each."""

from __future__ import annotations

import numpy as np

from spa_compiler.graph.fold import fold_sizes, lift_constants
from spa_compiler.graph.generators import unshare_generators
from spa_compiler.graph.load import load
from spa_compiler.graph.session import open_model, run
from tests.analysis.told import weighted

SHARED = """g (float[N, 4] x, float[4] w) => (float[N, 4] y, float[N, 4] z) {
  s = Shape(x)
  c = ConstantOfShape <value = float[1] {2.0}> (s)
  y = Mul(x, c)
  t = Mul(c, w)
  z = Add(t, c)
}"""


def test_every_reader_gets_its_own() -> None:
    model = load(weighted(SHARED))
    feeds = {"x": np.ones((3, 4), np.float32)}
    before = run(open_model(model), feeds)
    assert unshare_generators(model.graph) == 2
    assert [len(node.outputs[0].outputs) for node in model.graph.nodes if node.op == "ConstantOfShape"] == [1, 1, 1]
    after = run(open_model(model), feeds)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_what_is_computed_from_data_stays_shared() -> None:
    model = load(
        weighted("""g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
      s = Shape(x)
      c = Expand(x, s)
      y = Mul(x, c)
      z = Add(x, c)
    }""")
    )
    assert unshare_generators(model.graph) == 0


def test_sizes_and_types_of_weights_are_constants() -> None:
    model = load(
        weighted("""g (float[N, 4] x, float[4, 3] w) => (float[N, 4] y) {
      s = Shape <start = 0, end = 1> (w)
      zero = Constant <value = int64 {0}> ()
      c = CastLike(zero, w)
      e = Expand(c, s)
      y = Add(x, e)
    }""")
    )
    lift_constants(model.graph)
    assert fold_sizes(model.graph) == 2
    assert [node.op for node in model.graph.nodes] == ["Cast", "Expand", "Add"]
    feeds = {"x": np.ones((2, 4), np.float32)}
    np.testing.assert_array_equal(run(open_model(model), feeds)["y"], feeds["x"])
