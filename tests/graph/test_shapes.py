"""Symbolic shapes survive; concrete ones are complete."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from tests.graph.protos import large_mlp
from tests.onnx_text import model_from

TEXT = """g (float["batch", "sequence", 4] x) => (float["batch", "sequence", 2] y)
  <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
  h = MatMul(x, w)
  y = Relu(h)
}"""


def test_symbols_are_kept() -> None:
    model = model_from(TEXT)
    shapes.infer(model)
    hidden = model.graph.tensors()["h"]
    assert hidden.shape == ["batch", "sequence", 2]
    assert hidden.dtype == np.float32


def test_stale_shapes_are_forgotten() -> None:
    model = model_from(TEXT)
    shapes.infer(model)
    model.graph.nodes[0].inputs[1].values = np.ones((4, 2), np.float32)
    model.graph.tensors()["h"].shape = [9, 9, 9]
    shapes.infer(model)
    assert model.graph.tensors()["h"].shape == ["batch", "sequence", 2]


def test_weights_outside_of_the_skeleton() -> None:
    model = load(large_mlp())
    assert shapes.fixed(model, {"x": np.zeros((3, 64), np.float32)}) == {"x": (3, 64), "w": (64, 32), "y": (3, 32)}


def test_shapes_that_depend_on_values_are_observed() -> None:
    model = model_from("""g (float[N] x) => (float[K] y) <int64[1] axes = {0}> {
      n = NonZero(x)
      f = Cast<to = 1>(n)
      y = ReduceSum<keepdims = 0>(f, axes)
    }""")
    got = shapes.fixed(model, {"x": np.array([0, 1, 0, 2], np.float32)})
    assert (got["n"], got["y"]) == ((1, 2), (2,))


def test_missing_and_bad_feeds() -> None:
    model = model_from("g (float[N] x) => (float[J, K] y) { n = NonZero(x) c = Cast<to = 1>(n) y = Flatten(c) }")
    with pytest.raises(UsageError, match="no value for the inputs"):
        shapes.fixed(model, {})
    with pytest.raises(ModelError, match="ONNX Runtime cannot run it"):
        shapes.fixed(model, {"x": np.zeros((2, 2), np.int64)})
