"""Reshape, Flatten, Squeeze, Unsqueeze, Transpose: axes are merged, dealt out and permuted."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.rules.reshape import blocks
from tests.analysis import nets
from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, group_members, group_sizes, pins_of, units_of, weighted


def exact(text: str, opset: int = 21) -> int:
    """Random units and single ones; the number of groups."""
    model = weighted(text, opset)
    assert check_each_unit(model)
    return check_exact(model, seeds=(0,))


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ([2, 5, 12], [2, 5, 3, 4], [("2", "2"), ("5", "5"), ("12", "3,4")]),
        ([2, 5, 3, 4], [10, 12], [("2,5", "10"), ("3,4", "12")]),
        ([4, 6], [6, 4], [("4,6", "6,4")]),
        ([2, 1, 3], [2, 3], [("2", "2"), ("1,3", "3")]),
        ([2, 3], [2, 3, 1], [("2", "2"), ("3", "3,1")]),
        ([2, 3, 1], [2, 3], [("2", "2"), ("3,1", "3")]),
        ([1, 6], [6], [("1,6", "6")]),
        ([6], [1, 6], [("6", "1,6")]),
        ([1], [1, 1], [("1", "1,1")]),
        ([], [1], [("", "1")]),
        ([1], [], [("1", "")]),
        ([12, 5], [3, 4, 5], [("12", "3,4"), ("5", "5")]),
    ],
)
def test_blocks(old: list[int], new: list[int], expected: list[tuple[str, str]]) -> None:
    def told(sizes: list[int], part: range) -> str:
        return ",".join(str(sizes[place]) for place in part)

    assert [(told(old, taken), told(new, made)) for taken, made in blocks(old, new)] == expected


# --- Reshape ----------------------------------------------------------------------------------------------------------

HEADS = """g (float[N, 5, 2] x, float[2, 12] w, float[12] b, float[{heads}, 1] s, float[{width}] t, float[12, 3] v)
    => (float[N, 5, 3] y) {{
  a0 = MatMul(x, w)
  a = Add(a0, b)
  shape = Constant <value_ints = [0, 0, {heads}, {width}]> ()
  h = Reshape(a, shape)
  i = Mul(h, s)
  j = Sigmoid(i)
  k = Mul(j, t)
  back = Constant <value_ints = [0, 0, -1]> ()
  m = Reshape(k, back)
  y = MatMul(m, v)
}}"""


@pytest.mark.parametrize("heads, width", [(3, 4), (6, 2), (4, 3)])
def test_a_head_is_a_run_of_columns(heads: int, width: int) -> None:
    text = HEADS.format(heads=heads, width=width)
    assert group_sizes(text) == sorted([heads, width])
    analysis = analysis_of(text)
    (head,) = units_of(analysis, "s", 0, 1)
    assert head == {("w", 1): (own := list(range(width, 2 * width))), ("b", 0): own, ("s", 0): [1], ("v", 0): own}
    (place,) = units_of(analysis, "t", 0, 1)
    every = list(range(1, 12, width))
    assert place == {("w", 1): every, ("b", 0): every, ("t", 0): [1], ("v", 0): every}
    assert exact(text) == 2


@pytest.mark.parametrize("opset", [7, 13])
def test_reshape_of_older_opsets(opset: int) -> None:
    text = HEADS.format(heads=3, width=4)
    for sizes in ("0, 0, 3, 4", "0, 0, -1"):
        count = sizes.count(",") + 1
        text = text.replace(f"value_ints = [{sizes}]", f"value = int64[{count}] {{{sizes}}}")
    assert exact(text, opset) == 2


def two(first: str, second: str) -> str:
    """[N, 12] in two factorisations, one after the other."""
    return f"""g (float[N, 2] x, float[2, 12] w, float[{first}] s, float[{second}] t, float[12, 3] v)
        => (float[N, 3] y) {{
      a = MatMul(x, w)
      s1 = Constant <value_ints = [-1, {first}]> ()
      b = Reshape(a, s1)
      c = Mul(b, s)
      s2 = Constant <value_ints = [-1, {second}]> ()
      d = Reshape(c, s2)
      e = Mul(d, t)
      back = Constant <value_ints = [-1, 12]> ()
      f = Reshape(e, back)
      y = MatMul(f, v)
    }}"""


def test_factorisations_refine_each_other() -> None:
    """12 -> 3 x 4 and 6 x 2 is 3 x 2 x 2."""
    text = two("3, 4", "6, 2")
    assert group_sizes(text) == [2, 2, 3]
    assert exact(text) == 3


def test_factorisations_that_do_not_fit_pin() -> None:
    """4 and 6 have no common refinement."""
    text = two("3, 4", "2, 6")
    assert group_sizes(text) == []
    reason = "incompatible factorisations 4 and 6"
    assert {("c", 1, "Reshape", reason), ("c", 2, "Reshape", reason), ("d", 1, "Reshape", reason)} <= pins_of(text)


def test_a_run_of_equal_blocks_of_a_concatenated_axis() -> None:
    """Two projections one after the other, in heads of one width."""
    text = """g (float[N, 2] x, float[2, 8] q, float[2, 4] k, float[4] t, float[12, 3] v) => (float[N, 3] y) {
      a = MatMul(x, q)
      b = MatMul(x, k)
      c = Concat <axis = 1> (a, b)
      shape = Constant <value_ints = [0, 3, 4]> ()
      d = Reshape(c, shape)
      e = Mul(d, t)
      f = Flatten(e)
      y = MatMul(f, v)
    }"""
    assert group_sizes(text) == [2, 4]  # heads of q, and the width; the one head of k stays
    assert exact(text) == 2


def test_reshape_to_sizes_that_cannot_be_told() -> None:
    text = """g (float[N, 2] x, int64[3] xs, float[2, 12] w, float[4, 3] v) => (float[A, B, 3] y) {
      a = MatMul(x, w)
      b = Reshape(a, xs)
      y = MatMul(b, v)
    }"""
    assert group_sizes(text) == []
    assert ("a", 1, "Reshape", "reshapes to sizes that cannot be told") in pins_of(text)


def test_a_merged_batch_passes() -> None:
    text = """g (float[N, 5, 2] x, float[2, 6] w, float[6, 3] v) => (float[N, 5, 3] y) {
      a = MatMul(x, w)
      flat = Constant <value_ints = [-1, 6]> ()
      b = Reshape(a, flat)
      c = Relu(b)
      d = MatMul(c, v)
      back = Constant <value_ints = [-1, 5, 3]> ()
      y = Reshape(d, back)
    }"""
    assert group_members(text) == [{("w", 1), ("a", 2), ("b", 1), ("c", 1), ("v", 0)}]
    assert exact(text) == 1


def test_heads_merged_with_the_batch() -> None:
    """[N, S, H * d] -> [N * H, S, d], all sizes computed from the input's: heads and their width can go."""
    text = """g (float[N, S, 6] x, float[6, 12] w, float[12, 3] v) => (float[N, S, 3] y) {
      a = MatMul(x, w)
      sizes = Shape(x)
      zero = Constant <value_ints = [0]> ()
      one = Constant <value_ints = [1]> ()
      three = Constant <value_ints = [3]> ()
      four = Constant <value_ints = [4]> ()
      batch = Gather(sizes, zero)
      length = Gather(sizes, one)
      s1 = Concat <axis = 0> (batch, length, three, four)
      b = Reshape(a, s1)
      c = Transpose <perm = [0, 2, 1, 3]> (b)
      rows = Mul(batch, three)
      s2 = Concat <axis = 0> (rows, length, four)
      q = Reshape(c, s2)
      k = Transpose <perm = [0, 2, 1]> (q)
      scores = MatMul(q, k)
      p = Softmax <axis = -1> (scores)
      o = MatMul(p, q)
      s3 = Concat <axis = 0> (batch, three, length, four)
      d = Reshape(o, s3)
      e = Transpose <perm = [0, 2, 1, 3]> (d)
      rest = Constant <value_ints = [12]> ()
      s4 = Concat <axis = 0> (batch, length, rest)
      f = Reshape(e, s4)
      y = MatMul(f, v)
    }"""
    assert group_sizes(text) == [3, 4]
    assert check_exact(weighted(text), seeds=(0,), sizes={"N": 2, "S": 5}) == 2
    assert check_exact(weighted(text), seeds=(0,), sizes={"N": 3, "S": 4}) == 2


def test_one_constant_of_sizes_for_several() -> None:
    """Two projections of their own, reshaped by the same sizes; only the heads of one are scaled."""
    text = """g (float[N, 6] x, float[6, 12] w, float[6, 12] u, float[3, 1] s, float[12, 3] v, float[12, 3] z)
        => (float[N, 3] y) {
      a = MatMul(x, w)
      b = MatMul(x, u)
      shape = Constant <value_ints = [-1, 3, 4]> ()
      c = Reshape(a, shape)
      d = Reshape(b, shape)
      e = Mul(c, s)
      f = Sigmoid(d)
      back = Constant <value_ints = [0, 12]> ()
      g1 = Reshape(e, back)
      g2 = Reshape(f, back)
      h1 = MatMul(g1, v)
      h2 = MatMul(g2, z)
      y = Add(h1, h2)
    }"""
    assert group_sizes(text) == [3, 3, 4, 4]
    assert exact(text) == 4


def test_weights_that_are_reshaped_when_the_model_runs() -> None:
    text = """g (float[N, 6] x, float[6, 3, 4] w, float[12, 3] v) => (float[N, 3] y) {
      shape = Constant <value_ints = [6, 12]> ()
      w2 = Reshape(w, shape)
      a = MatMul(x, w2)
      y = MatMul(a, v)
    }"""
    assert group_sizes(text) == [3, 4]
    assert exact(text) == 2


# --- shuffles ---------------------------------------------------------------------------------------------------------

SHUFFLE = """g (float[N, 3, 4, 4] x, float[12, 3, 1, 1] w, float[12, 1, 3, 3] d, float[5, 12, 1, 1] v)
    => (float[N, 5, 4, 4] y) {{
  a = Conv(x, w)
  s1 = Constant <value_ints = [{front}]> ()
  b = Reshape(a, s1)
  c = Transpose <perm = [{perm}]> (b)
  s2 = Constant <value_ints = [{back}]> ()
  e = Reshape(c, s2)
  f = Conv <group = 12, pads = [1, 1, 1, 1]> (e, d)
  g = Sigmoid(f)
  y = Conv(g, v)
}}"""


@pytest.mark.parametrize(
    "front, perm, back",
    [
        ("0, 3, 4, 4, 4", "0, 2, 1, 3, 4", "0, 12, 4, 4"),
        ("-1, 2, 6, 4, 4", "0, 2, 1, 3, 4", "-1, 12, 4, 4"),
        ("0, 2, 3, 2, 4, 4", "0, 3, 1, 2, 4, 5", "0, 12, 4, 4"),
    ],
)
def test_every_channel_of_a_shuffle_can_go(front: str, perm: str, back: str) -> None:
    text = SHUFFLE.format(front=front, perm=perm, back=back)
    (group,) = analysis_of(text).groups
    assert group.size == 12
    assert exact(text) == 1


def test_a_shuffle_by_computed_sizes() -> None:
    text = """g (float[N, 6, 2, 2] x, float[12, 6, 1, 1] w, float[3, 12, 1, 1] v) => (float[N, 3, 2, 2] y) {
      a = Conv(x, w)
      sizes = Shape(a)
      zero = Constant <value_ints = [0]> ()
      one = Constant <value_ints = [1]> ()
      two = Constant <value_ints = [2]> ()
      four = Constant <value_ints = [4]> ()
      three = Constant <value_ints = [3]> ()
      batch = Gather(sizes, zero)
      channels = Gather(sizes, one)
      image = Slice(sizes, two, four)
      each = Div(channels, three)
      s1 = Concat <axis = 0> (batch, three, each, image)
      b = Reshape(a, s1)
      c = Transpose <perm = [0, 2, 1, 3, 4]> (b)
      s2 = Concat <axis = 0> (batch, channels, image)
      d = Reshape(c, s2)
      y = Conv(d, v)
    }"""
    assert group_sizes(text) == [12]
    assert exact(text) == 1


def test_a_shuffle_that_ends_in_flatten() -> None:
    text = """g (float[N, 6] x, float[6, 12] w, float[12, 3] v) => (float[N, 3] y) {
      a = MatMul(x, w)
      shape = Constant <value_ints = [-1, 3, 4]> ()
      b = Reshape(a, shape)
      c = Transpose <perm = [0, 2, 1]> (b)
      d = Flatten(c)
      y = MatMul(d, v)
    }"""
    assert group_sizes(text) == [12]
    assert exact(text) == 1


SHUFFLED_ROWS = """g (float[{rows}, 5] c, float[N, {size}, 6] x, float[6, 8] w, float[8, 3] v, float[4, 12] d)
    => (float[N, 4, 3] y) {{
  a0 = MatMul(x, w)
  a = {mixed}
  shape = Constant <value_ints = [-1, 3, 4, 8]> ()
  r = Reshape(a, shape)
  t = Transpose <perm = [0, 2, 1, 3]> (r)
  back = Constant <value_ints = [-1, 12, 8]> ()
  u = Reshape(t, back)
  y0 = MatMul(u, v)
  y = MatMul(d, y0)
}}"""


def test_beside_a_shuffle_other_axes_pass() -> None:
    text = SHUFFLED_ROWS.format(rows=12, size=12, mixed="Identity(a0)").replace("float[12, 5] c, ", "")
    assert group_members(text) == [
        {("w", 1), ("a0", 2), ("a", 2), ("r", 3), ("t", 3), ("u", 2), ("v", 0)},
    ]
    assert exact(text) == 1


def test_a_shuffle_and_other_axes_together() -> None:
    text = SHUFFLED_ROWS.format(rows=12, size=5, mixed="MatMul(c, a0)")
    assert group_sizes(text) == [8, 12]
    assert exact(text) == 2


@pytest.mark.parametrize("given", ["b", "c"])
def test_a_shuffle_that_the_graph_gives_out_stays(given: str) -> None:
    sizes = "3, 4" if given == "b" else "4, 3"
    text = f"""g (float[N, 6] x, float[6, 12] w, float[12, 3] v, float[6, 5] u, float[5, 3] z)
        => (float[N, 3] y, float[N, {sizes}] {given}) {{
      a = MatMul(x, w)
      shape = Constant <value_ints = [-1, 3, 4]> ()
      b = Reshape(a, shape)
      c = Transpose <perm = [0, 2, 1]> (b)
      d = Flatten(c)
      e = MatMul(d, v)
      f = MatMul(x, u)
      h = MatMul(f, z)
      y = Add(e, h)
    }}"""
    assert group_sizes(text) == [5]
    assert exact(text) == 1


def test_a_shuffle_that_others_read_splits_the_axis() -> None:
    text = """g (float[N, 6] x, float[6, 12] w, float[12, 3] v, float[3, 1] s) => (float[N, 3] y, float[1] z) {
      a = MatMul(x, w)
      shape = Constant <value_ints = [-1, 3, 4]> ()
      b = Reshape(a, shape)
      c = Transpose <perm = [0, 2, 1]> (b)
      d = Flatten(c)
      m = Mul(b, s)
      axes = Constant <value_ints = [0, 1, 2]> ()
      total = ReduceSum <keepdims = 0> (m, axes)
      one = Constant <value_ints = [0]> ()
      z = Unsqueeze(total, one)
      y = MatMul(d, v)
    }"""
    assert group_sizes(text) == [3, 4]
    assert exact(text) == 2


def test_a_shuffle_ties_channels_as_it_permutes_them() -> None:
    text = SHUFFLE.format(front="0, 3, 4, 4, 4", perm="0, 2, 1, 3, 4", back="0, 12, 4, 4")
    (unit,) = units_of(text, "w", 0, 5)  # row 1, column 1 of 3 x 4 -> row 1, column 1 of 4 x 3
    assert unit == {("w", 0): [5], ("d", 0): [4], ("v", 1): [4]}


def test_a_shuffle_between_grouped_convolutions_takes_what_fits() -> None:
    """The groups of the second convolution are made of slots of the first one's."""
    text = """g (float[N, 4, 3, 3] x, float[12, 2, 1, 1] w, float[12, 6, 1, 1] u, float[5, 12, 1, 1] v)
        => (float[N, 5, 3, 3] y) {
      a = Conv <group = 2> (x, w)
      s1 = Constant <value_ints = [0, 2, 6, 3, 3]> ()
      b = Reshape(a, s1)
      c = Transpose <perm = [0, 2, 1, 3, 4]> (b)
      s2 = Constant <value_ints = [0, 12, 3, 3]> ()
      d = Reshape(c, s2)
      e = Conv <group = 2> (d, u)
      f = Sigmoid(e)
      y = Conv(f, v)
    }"""
    assert exact(text)


def test_a_transposed_factor_is_no_shuffle_where_something_happens_in_between() -> None:
    text = """g (float[N, 12, 4] x, float[12, 4, 1] w, float[4] s, float[12, 3] v) => (float[N, 4, 3] y) {
      a = Conv <group = 3> (x, w)
      s1 = Constant <value_ints = [0, 3, 4, 4]> ()
      b = Reshape(a, s1)
      c = Transpose <perm = [0, 3, 2, 1]> (b)
      s2 = Constant <value_ints = [0, 4, 12]> ()
      d = Reshape(c, s2)
      y = MatMul(d, v)
    }"""
    assert exact(text) == 1
    (group,) = analysis_of(text).groups
    assert group.size == 4, "slots of the groups; the groups are bound to the input's channels"


# --- Flatten ----------------------------------------------------------------------------------------------------------


def test_flatten_makes_runs_of_columns() -> None:
    groups = analysis_of(nets.CONV_FLATTEN).groups
    unit = next(group for group in groups if group.size == 5).units[2]
    assert {s.name: (s.axis, s.indices) for s in unit.parameters} == {
        "w2": (0, [2]),
        "one": (1, [2]),
        "w3": (0, list(range(32, 48))),
    }
    assert {s.name: s.indices for s in unit.activations}["f"] == list(range(32, 48))


def test_flatten_of_open_sizes() -> None:
    """The file leaves the image open. What the analysis chooses does not fit the reader, so the caller says it."""
    text = """g (float[N, 3, H, W] x, float[8, 3, 1, 1] w, float[32, 4] v) => (float[N, 4] y) {
      a = Conv(x, w)
      f = Flatten(a)
      y = Gemm(f, v)
    }"""
    assert analysis_of(text).groups == ()
    assert any(pin.tensor == "v" and "differ" in pin.reason and pin.params for pin in analysis_of(text).pins)
    assert check_exact(weighted(text), seeds=(0,), sizes={"N": 3, "H": 2, "W": 2}) == 1


@pytest.mark.parametrize("axis", [2, -1])
def test_flatten_at_other_axes(axis: int) -> None:
    text = f"""g (float[5, 4] x, float[2, 4, 6] w, float[2, 1, 1] s, float[6, 2] v) => (float[10, 2] y) {{
      a = MatMul(x, w)
      b = Mul(a, s)
      f = Flatten <axis = {axis}> (b)
      y = MatMul(f, v)
    }}"""
    assert group_members(text) == [{("w", 2), ("a", 2), ("b", 2), ("f", 1), ("v", 0)}]
    assert exact(text) == 1


def test_flatten_at_the_first_axis() -> None:
    text = """g (float[4] x, float[4, 6] w, float[6, 2] v) => (float[1, 2] y) {
      a = MatMul(x, w)
      f = Flatten <axis = 0> (a)
      y = MatMul(f, v)
    }"""
    assert group_members(text) == [{("w", 1), ("a", 0), ("f", 1), ("v", 0)}]
    assert exact(text) == 1


# --- Transpose --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perm", ["", "<perm = [1, 0]>"])
def test_transpose(perm: str) -> None:
    text = f"""g (float[5, 4] x, float[4, 6] w, float[3, 6] v) => (float[3, 5] y) {{
      a = MatMul(x, w)
      t = Transpose {perm} (a)
      y = MatMul(v, t)
    }}"""
    assert group_members(text) == [{("w", 1), ("a", 1), ("t", 0), ("v", 1)}]
    assert exact(text) == 1


# --- Squeeze, Unsqueeze -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset, axis, back", [(7, 1, 1), (11, -2, 1), (13, 1, -2), (21, -2, -2)])
def test_unsqueeze_and_squeeze(opset: int, axis: int, back: int) -> None:
    up, down = f"Unsqueeze <axes = [{axis}]> (a)", f"Squeeze <axes = [{back}]> (s)"
    if opset >= 13:
        up, down = "Unsqueeze(a, up)", "Squeeze(s, down)"
    text = f"""g (float[N, 4] x, float[4, 6] w, int64[1] up, int64[1] down, float[6] k, float[6, 2] v)
        => (float[N, 2] y) {{
      a = MatMul(x, w)
      u = {up}
      s = Mul(u, k)
      d = {down}
      y = MatMul(d, v)
    }}"""
    model = weighted(text.replace("int64[1] up, int64[1] down, ", "") if opset < 13 else text, opset)
    listed = {"up": axis, "down": back}
    for tensor in model.graph.initializer:
        if tensor.name in listed:
            tensor.raw_data = listed[tensor.name].to_bytes(8, "little", signed=True)
    assert check_exact(model, seeds=(0,)) == 1
    assert check_each_unit(model)


@pytest.mark.parametrize("opset", [7, 21])
def test_squeeze_without_axes(opset: int) -> None:
    text = """g (float[5, 4] x, float[4, 1, 6] w, float[6, 2] v) => (float[5, 2] y) {
      w1 = Squeeze(w)
      a = MatMul(x, w1)
      y = MatMul(a, v)
    }"""
    assert group_members(analysis_of(text, opset)) == [{("w", 2), ("w1", 1), ("a", 1), ("v", 0)}]
    assert exact(text, opset) == 1


def test_several_new_axes() -> None:
    text = """g (float[N, 4] x, float[4, 6] w, float[1, 6, 1] k, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      new = Constant <value_ints = [0, -1]> ()
      u = Unsqueeze(a, new)
      s = Mul(u, k)
      d = Squeeze(s, new)
      y = MatMul(d, v)
    }"""
    assert [group.size for group in analysis_of(text).groups] == [6]
    assert exact(text) == 1
