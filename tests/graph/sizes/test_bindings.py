"""Sizes for open dimensions: apart where they may be, together where the graph wants them so."""

from __future__ import annotations

from spa_compiler.graph.settle import settle
from tests.onnx_text import model_from


def test_given_sizes_bind_the_symbols_of_other_inputs() -> None:
    model = model_from("g (float[N, 4] x, float[N, 3] z) => (float[N, 7] y) { y = Concat<axis = 1>(x, z) }")
    settled = settle(model, {"x": (9, 4)})
    assert settled.shapes["z"] == (9, 3)
    assert settled.shapes["y"] == (9, 7)
    assert settled.varies["z"] == (True, False)


def test_symbols_get_sizes_of_their_own() -> None:
    settled = settle(
        model_from("""g (int64[batch, source] a, int64[batch, target] b, float[?, ?] c) =>
      (int64[batch, n] y, float[?, ?] z) { y = Concat<axis = 1>(a, b) z = Relu(c) }""")
    )
    sizes = [*settled.shapes["a"], settled.shapes["b"][1], *settled.shapes["c"]]
    assert len(set(sizes)) == 5
    assert settled.shapes["b"][0] == settled.shapes["a"][0]
    assert settled.varies["y"] == (True, True)


def test_unnamed_sizes_are_equal_where_the_graph_wants_them_so() -> None:
    settled = settle(model_from("g (float[?, 4] a, float[?, 4] b) => (float[?, 4] y) { y = Add(a, b) }"))
    assert settled.shapes["y"] == (2, 4)
    assert settled.varies["y"] == (True, False)


def test_symbols_that_are_sums() -> None:
    model = model_from("""g (float[batch, 2, past, 4] cache, float[batch, 2, 1, 4] now, float[batch, 1, 1, "past + 1"] mask)
      => (float[batch, 2, n, 4] y, float[batch, 2, 4, n] z)
      { y = Concat<axis = 2>(cache, now) t = Transpose<perm = [0, 1, 3, 2]>(y) z = Add(t, mask) }""")
    settled = settle(model)
    past = settled.shapes["cache"][2]
    assert isinstance(past, int)
    assert settled.shapes["mask"] == (2, 1, 1, past + 1)
    assert settled.shapes["z"] == (2, 2, 4, past + 1)


def test_images_survive_strides_and_get_their_channels() -> None:
    settled = settle(
        model_from("""g (float[N, C, H, W] x, float[8, 3, 4, 4] w) => (float[N, 8, h, v] y)
      { p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x) y = Conv<strides = [4, 4]>(p, w) }""")
    )
    assert settled.shapes["x"] == (2, 3, 224, 288)
    assert settled.shapes["y"] == (2, 8, 28, 36)
    assert settled.varies["y"] == (True, False, True, True)


def test_other_sizes_where_the_first_do_not_divide() -> None:
    settled = settle(
        model_from("""g (float[batch, sequence, 6] x) => (float[n, 4, 6] y)
      <int64[3] windows = {-1, 4, 6}> { y = Reshape(x, windows) }""")
    )
    assert settled.shapes["y"] == (4, 4, 6)
    assert settled.varies["y"] == (True, False, False)


def test_sequences_no_longer_than_the_position_table() -> None:
    settled = settle(
        model_from("""g (float[batch, sequence, 2] x) => (float[batch, sequence, 2] y)
      <float[1, 8, 2] table = {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}, int64[1] zero = {0}, int64[1] one = {1}> {
      n = Shape<start = 1, end = 2>(x)
      part = Slice(table, zero, n, one)
      y = Add(x, part)
    }""")
    )
    length = settled.shapes["y"][1]
    assert isinstance(length, int)
    assert length <= 8
    assert settled.varies["y"] == (True, True, False)


def test_a_model_for_one_size_only() -> None:
    settled = settle(
        model_from("""g (float[batch, 6] x) => (float[6] y) <int64[1] flat = {6}>
      { y = Reshape(x, flat) }""")
    )
    assert settled.shapes["x"] == (1, 6)
    assert settled.shapes["y"] == (6,)
