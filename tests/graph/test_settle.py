"""Sizes, small values and what varies in both bindings; writing them into a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spa_compiler.graph import weights
from spa_compiler.graph.load import load
from spa_compiler.graph.settle import Settled, apply, settle
from tests.graph.protos import large_mlp
from tests.onnx_text import model_from

ATTENTION = """g (float[batch, sequence, 12] x) => (float[batch, sequence, 12] y)
  <int64 zero = {0}, int64 one = {1}, int64[1] heads = {3}, int64[1] rest = {-1}, int64[1] at = {0}> {
  s = Shape(x)
  b = Gather(s, zero)
  l = Gather(s, one)
  b1 = Unsqueeze(b, at)
  l1 = Unsqueeze(l, at)
  split = Concat<axis = 0>(b1, l1, heads, rest)
  h = Reshape(x, split)
  t = Transpose<perm = [0, 2, 1, 3]>(h)
  back = Transpose<perm = [0, 2, 1, 3]>(t)
  merge = Concat<axis = 0>(b1, l1, rest)
  y = Reshape(back, merge)
}"""


def test_a_chain_of_shape_operators() -> None:
    settled = settle(model_from(ATTENTION))
    assert settled.shapes["x"] == (2, 13, 12)
    assert settled.shapes["t"] == (2, 3, 13, 4)
    assert settled.varies["t"] == (True, False, True, False)
    assert settled.values["split"].array.tolist() == [2, 13, 3, -1]
    assert settled.values["split"].fixed.tolist() == [False, False, True, True]
    assert settled.values["heads"].fixed.all()
    assert "h" not in settled.values
    assert settled.shapes["y"] == (2, 13, 12)


def test_given_shapes_are_the_first_binding() -> None:
    settled = settle(model_from(ATTENTION), {"x": (5, 7, 12)})
    assert settled.shapes["t"] == (5, 3, 7, 4)
    assert settled.varies["t"] == (True, False, True, False)


def test_without_open_dimensions_all_is_fixed() -> None:
    settled = settle(model_from("g (float[2, 6] x) => (int64[2] y) { s = Shape(x) y = Neg(s) }"))
    assert settled.values["y"].array.tolist() == [-2, -6]
    assert settled.values["y"].fixed.all()
    assert settled.varies["x"] == (False, False)


def test_sizes_that_depend_on_values() -> None:
    settled = settle(
        model_from("""g (float[4, 6] x) => (int64[2, n] y, float[4, m] z) <int64[2] keep = {4, -1}> {
      y = NonZero(x) c = Cast<to = 1>(y) z = Reshape(c, keep) }""")
    )
    assert settled.shapes["y"] == (2, None)
    assert settled.varies["y"] == (False, True)
    assert settled.shapes["z"] == (4, None)


def test_weights_stay_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(large_mlp(400, 300))

    def refuse(_: Any) -> Any:
        raise AssertionError("a large weight was read")

    monkeypatch.setattr(weights.Weight, "load", refuse)
    assert settle(model).shapes == {"x": (2, 400), "w": (400, 300), "y": (2, 300)}


def test_apply() -> None:
    model = model_from(ATTENTION).copy()
    apply(model, settle(model))
    tensors = model.graph.tensors()
    assert tensors["t"].shape == [2, 3, 13, 4]
    assert tensors["t"].dtype == np.float32
    assert tensors["split"].dtype == np.int64
    assert tensors["x"].shape == [2, 13, 12]
    assert model.graph.outputs[0].shape == [2, 13, 12]


def test_apply_with_nothing_known() -> None:
    model = model_from(ATTENTION).copy()
    apply(model, Settled())
    assert model.graph.tensors()["x"].shape == ["batch", "sequence", 12]


def test_counting_is_noticed_whatever_the_length() -> None:
    model = model_from("""g (float[N, 4] x) => (float[M, 4] y) {
      s = Shape(x)
      zero = Constant <value = int64 {0}> ()
      one = Constant <value = int64 {1}> ()
      n = Gather(s, zero)
      r = Range(zero, n, one)
      t = Add(r, one)
      y = Gather(x, r)
    }""")
    assert settle(model).counting == {"r"}


@pytest.mark.parametrize("by", range(2, 13))
def test_a_remainder_of_a_size_is_not_fixed(by: int) -> None:
    model = model_from(f"""g (float[sequence] x) => (int64[1] y) <int64[1] by = {{{by}}}> {{
      s = Shape(x)
      y = Mod(s, by)
    }}""")
    assert not settle(model).values["y"].fixed.any()
