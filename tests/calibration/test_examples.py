"""Example inputs stay within what the graph states."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.calibration.examples import bounds, example_feeds
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, open_model, run
from tests.onnx_text import model_from

BERT = """g (int64["b", "s"] input_ids, int64["b", "s"] attention_mask, int64["b", "s"] token_type_ids,
           int64["b", "s"] position_ids) => (float["b", "s", 2] y)
  <float[5, 2] words = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, float[2, 2] kinds = {1, 2, 3, 4},
   float[4, 2] places = {1, 2, 3, 4, 5, 6, 7, 8}, int64[1] axes = {2}> {
  cast = Cast<to = 6>(input_ids)
  w = Gather(words, cast)
  k = Gather(kinds, token_type_ids)
  p = Gather(places, position_ids)
  m = Cast<to = 1>(attention_mask)
  n = Unsqueeze(m, axes)
  a = Add(w, k)
  b = Add(a, p)
  y = Mul(b, n)
}"""


def drawn(model: Model, seed: int = 0, **shapes: tuple[int, ...]) -> Feeds:
    return example_feeds(model, shapes, np.random.default_rng(seed))


def test_text_models() -> None:
    model = model_from(BERT)
    shape = (3, 40)
    feeds = drawn(model, input_ids=shape, attention_mask=shape, token_type_ids=shape, position_ids=shape)
    assert set(np.unique(feeds["input_ids"])) == {0, 1, 2, 3, 4}
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all()
    assert feeds["position_ids"][0, :6].tolist() == [0, 1, 2, 3, 0, 1]
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int64)}
    run(open_model(model), feeds)


def test_the_same_seed_gives_the_same_feeds() -> None:
    model = model_from("g (float[N, 2] x, float16[N] h, bool[N] b) => (float[N, 2] y) { y = Relu(x) }")
    one, two = (drawn(model, seed=7, x=(4, 2), h=(3,), b=(2,)) for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert one["h"].dtype == np.float16
    assert one["b"].all()
    assert one["x"].std() > 0


def test_indices_into_computed_tensors_are_zero() -> None:
    model = model_from("g (float[N, 2] x, int64[M] i) => (float[M, 2] y) { r = Relu(x) y = Gather(r, i) }")
    assert drawn(model, x=(2, 2), i=(5,))["i"].tolist() == [0] * 5


def test_one_hot_depth_is_a_bound() -> None:
    model = model_from("""g (int64[N] i) => (float[N, 3] y) <int64 depth = {3}, float[2] values = {0, 1}> {
      y = OneHot(i, depth, values)
    }""")
    assert set(drawn(model, i=(50,))["i"].tolist()) == {0, 1, 2}


def test_missing_shape() -> None:
    with pytest.raises(UsageError, match="no shape for input 'x'"):
        drawn(model_from("g (float[N] x) => (float[N] y) { y = Relu(x) }"))


def test_bounds_are_those_of_what_indexes_as_it_is() -> None:
    """What is clipped before it indexes may be anything."""
    assert bounds(model_from(BERT)) == {"input_ids": 5, "token_type_ids": 2, "position_ids": 4}
    clipped = BERT.replace("Cast<to = 6>(input_ids)", "Clip(input_ids, low, high)")
    clipped = clipped.replace("int64[1] axes", "int64 low = {0}, int64 high = {4}, int64[1] axes")
    assert bounds(model_from(clipped)) == {"token_type_ids": 2, "position_ids": 4}


def test_where_a_slice_starts_is_no_index_of_what_is_sliced() -> None:
    model = model_from("""g (int64[1] start) => (float[n, 1] y)
    <int64[4] ids = {0, 1, 1, 0}, int64[1] end = {4}, float[2, 1] table = {5, 6}> {
      part = Slice(ids, start, end) y = Gather(table, part)
    }""")
    assert bounds(model) == {}
    assert drawn(model, start=(1,))["start"].tolist() == [1]
