"""Constant, Expand, Tile, Shape, Size: copies are Dims of their own, and sizes stay those of the whole model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa_compiler.analysis import analyze
from spa_compiler.analysis.cut import cut
from spa_compiler.graph.load import load
from spa_compiler.graph.session import open_model, run
from spa_compiler.graph.weights import array_of
from tests.analysis.builder import Net
from tests.analysis.chain import exact
from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, group_members, group_sizes, pins_of, units_of, weighted


def test_constant_nodes_are_parameters() -> None:
    text = """g (float[N, 2] x, float[3, 2] v) => (float[N, 2] y) {
      w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()
      a = MatMul(x, w)
      y = MatMul(a, v)
    }"""
    analysis = analysis_of(text)
    (group,) = analysis.groups
    assert {(m.tensor, m.axis) for m in group.parameters} == {("w", 1), ("v", 0)}
    assert analysis.params == 12
    assert exact(weighted(text)) == 1


def test_a_sparse_constant_stays() -> None:
    """No cut slices it, so nothing that meets it may shrink."""
    model = weighted("""g (float[N, 5] x, float[5, 4] w, float[4, 2] v) => (float[N, 2] y) <float[4] c> {
      c = Constant <value = float[4] {0, 1, 0, 2}> ()
      a = MatMul(x, w)
      b = Mul(a, c)
      y = MatMul(b, v)
    }""")
    values, at = (helper.make_tensor("", kind, [2], [1, 3]) for kind in (TensorProto.FLOAT, TensorProto.INT64))
    sparse = helper.make_sparse_tensor(values, at, [4])
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    analysis = analysis_of(model)
    assert ("c", 0, "Constant", "a sparse tensor or text") in pins_of(analysis)
    assert analysis.groups == ()


# --- Expand, Tile -----------------------------------------------------------------------------------------------------


def grouped_queries(target: str) -> onnx.ModelProto:
    """Three key heads, each for two query heads; a width of 4."""
    net = Net(f"repeat_kv_{target}", 17)
    x = net.input("x", "N", 5, 6)
    q = net.transpose(net.reshape(net.op("MatMul", x, net.weight(6, 24)), 0, 5, 6, 4), 0, 2, 1, 3)
    k = net.transpose(net.reshape(net.op("MatMul", x, net.weight(6, 12)), 0, 5, 3, 4), 0, 2, 1, 3)
    wide = net.unsqueeze(k, 2)
    if target == "constant":
        shape = net.ints(1, 3, 2, 5, 4)
    elif target == "copies":
        shape = net.ints(2, 1, 1)  # the other axes stay as they are
    else:
        sizes = net.op("Shape", wide)
        front, back = (net.op("Slice", sizes, net.ints(low), net.ints(high)) for low, high in ((0, 2), (3, 5)))
        shape = net.concat(front, net.ints(2), back, axis=0)
    wide = net.op("Expand", wide, shape)
    k = net.reshape(wide, 0, 6, 5, 4)
    scores = net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2))
    heads = net.mul(net.sigmoid(scores), net.gain(6, 1, 1))
    return net.model(net.op("MatMul", heads, net.weight(5, 2)))


@pytest.mark.parametrize("target", ["constant", "copies", "computed"])
def test_key_heads_that_are_repeated(target: str) -> None:
    """A key head takes its queries along, a copy the same query of all heads; the output has all heads, so it pins."""
    model = grouped_queries(target)
    analysis = analysis_of(model)
    assert [group.size for group in analysis.groups] == [4], "the width, as heads are given out"


@pytest.mark.parametrize("target", ["constant", "copies", "computed"])
def test_key_heads_that_are_repeated_and_summed(target: str) -> None:
    model = grouped_queries(target)
    last = model.graph.node[-1]
    axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
    model.graph.initializer.append(axes)
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("ReduceSum", [last.input[0], "axes"], ["sum"])
    )
    last.input[0] = "sum"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    analysis = analysis_of(model)
    assert sorted(group.size for group in analysis.groups) == [2, 3, 4]
    gain = next(tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [6, 1, 1])
    found = [unit[gain, 0] for head in range(6) for unit in units_of(analysis, gain, 0, head)]
    assert [0, 1] in found, "a key head and its two queries"
    assert [0, 2, 4] in found, "a copy: the same query of every key head"
    assert exact(model) == 3


@pytest.mark.parametrize("opset", [8, 13])
def test_expand_of_channels(opset: int) -> None:
    """Axes that are there already pass, whether the target names them or has a 1."""
    for target in ("2, 5, 6", "2, 1, 6", "5, 1"):
        count = target.count(",") + 1
        text = f"""g (float[1, 5, 4] x, float[4, 6] w, float[6, 2] v, float[2, 1, 1] s) => (float[2, 5, 2] y) {{
          a = MatMul(x, w)
          shape = Constant <value = int64[{count}] {{{target}}}> ()
          b = Expand(a, shape)
          c = Mul(b, s)
          y = MatMul(c, v)
        }}"""
        (members,) = [found for found in group_members(analysis_of(text, opset)) if ("w", 1) in found]
        assert {("a", 2), ("b", 2), ("v", 0)} <= members
        assert exact(weighted(text, opset)) == 1


def test_expand_to_the_size_of_the_input() -> None:
    """The batch's copies of a class token depend on the input; its channels can go."""
    text = """g (float[N, 5, 4] x, float[4, 6] w, float[1, 1, 6] token, float[6, 2] v) => (float[N, 6, 2] y) {
      a = MatMul(x, w)
      sizes = Shape(x)
      zero = Constant <value_ints = [0]> ()
      batch = Gather(sizes, zero)
      rest = Constant <value_ints = [-1, -1]> ()
      ones = Constant <value_ints = [1, 1]> ()
      target = Concat <axis = 0> (batch, ones)
      b = Expand(token, target)
      c = Concat <axis = 1> (b, a)
      y = MatMul(c, v)
    }"""
    assert group_members(text) == [{("w", 1), ("a", 2), ("token", 2), ("b", 2), ("c", 2), ("v", 0)}]
    assert exact(weighted(text)) == 1


def test_expand_to_sizes_that_cannot_be_told() -> None:
    text = """g (float[N, 1, 4] x, int64[3] xs, float[4, 6] w, float[6, 2] v) => (float[A, B, 2] y) {
      a = MatMul(x, w)
      b = Expand(a, xs)
      y = MatMul(b, v)
    }"""
    assert group_sizes(text) == []
    assert ("a", 2, "Expand", "expands to sizes that cannot be told") in pins_of(text)


def tiled(repeats: str, size: int, extra: str = "") -> str:
    return f"""g (float[N, 5, 4] x, float[4, 6] w, float[{size}, 2] v) => (float[N, M, 2] y) {{
      a = MatMul(x, w)
      {extra}
      repeats = {repeats}
      b = Tile(a, repeats)
      c = Sigmoid(b)
      y = MatMul(c, v)
    }}"""


def test_tile() -> None:
    """Channels, with all copies; copies, with all channels."""
    text = tiled("Constant <value_ints = [1, 1, 3]> ()", 18)
    assert group_sizes(text) == [3, 6]
    analysis = analysis_of(text)
    assert {("w", 1): [2], ("v", 0): [2, 8, 14]} in units_of(analysis, "v", 0, 2)
    assert {("v", 0): list(range(6))} in units_of(analysis, "v", 0, 2)
    assert check_exact(weighted(text), seeds=(0,)) == 2


def test_the_repeats_follow() -> None:
    text = tiled("Constant <value_ints = [1, 1, 3]> ()", 18)
    model = load(weighted(text))
    analysis = analyze(model)
    (copies,) = [group.id for group in analysis.groups if group.size == 3]
    smaller = cut(model, analysis, {copies: [1]})
    (node,) = [node for node in smaller.graph.nodes if node.op == "Tile"]
    assert array_of(node.inputs[1]).tolist() == [1, 1, 2]


def test_tile_of_positions_leaves_channels_alone() -> None:
    text = tiled("Constant <value_ints = [1, 2, 1]> ()", 6)
    (group,) = [group for group in analysis_of(text).groups if group.size == 6]
    assert {(m.tensor, m.axis) for m in group.parameters} == {("w", 1), ("v", 0)}
    assert check_exact(weighted(text), seeds=(0,))


def test_repeats_that_are_computed() -> None:
    """As often as there are samples: channels pass."""
    extra = """sizes = Shape(x)
      zero = Constant <value_ints = [0]> ()
      batch = Gather(sizes, zero)
      one = Constant <value_ints = [1]> ()"""
    text = tiled("Concat <axis = 0> (one, batch, one)", 6, extra)
    assert {("w", 1), ("v", 0)} <= group_members(text)[0]
    assert check_exact(weighted(text), seeds=(0,), sizes={"N": 3})


def test_tile_that_is_reshaped() -> None:
    """Copies and channels in axes of their own."""
    text = """g (float[N, 6] x, float[6, 4] w, float[12, 3] v, float[3, 4] s) => (float[N, 3] y) {
      a = MatMul(x, w)
      repeats = Constant <value_ints = [1, 3]> ()
      b = Tile(a, repeats)
      shape = Constant <value_ints = [0, 3, 4]> ()
      c = Reshape(b, shape)
      d = Mul(c, s)
      e = Flatten(d)
      y = MatMul(e, v)
    }"""
    assert group_sizes(text) == [3, 4]
    assert exact(weighted(text)) == 2


# --- Shape, Size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start, end, told", [(0, None, [2, 5, 6]), (1, None, [5, 6]), (-2, -1, [5]), (0, 2, [2, 5])])
def test_shape_says_what_it_says_of_the_whole_model(start: int, end: int | None, told: list[int]) -> None:
    stop = "" if end is None else f", end = {end}"
    text = f"""g (float[N, 5, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, 5, 2] y, int64[{len(told)}] s) {{
      a = MatMul(x, w)
      s = Shape <start = {start}{stop}> (a)
      y = MatMul(a, v)
    }}"""
    model = load(weighted(text))
    analysis = analyze(model)
    assert [group.size for group in analysis.groups] == [6]
    smaller = cut(model, analysis, {0: [0, 3, 4]})
    assert run(open_model(smaller), {"x": np.ones((2, 5, 4), np.float32)})["s"].tolist() == told
    assert check_exact(model, seeds=(0,)) == 1


def test_a_scale_that_is_computed_from_a_size() -> None:
    """1 / sqrt(head width), read from Shape: the width shrinks, the scale stays."""
    text = """g (float[N, 5, 4] x, float[4, 6] q, float[4, 6] k, float[5, 2] v) => (float[N, 5, 2] y) {
      a = MatMul(x, q)
      b = MatMul(x, k)
      sizes = Shape(a)
      last = Constant <value_int = -1> ()
      width = Gather(sizes, last)
      number = Cast <to = 1> (width)
      root = Sqrt(number)
      t = Transpose <perm = [0, 2, 1]> (b)
      s = MatMul(a, t)
      scaled = Div(s, root)
      p = Softmax <axis = -1> (scaled)
      y = MatMul(p, v)
    }"""
    assert {("q", 1), ("k", 1)} <= group_members(text)[0]
    assert exact(weighted(text)) == 1


def test_sizes_that_nobody_reads_cost_nothing() -> None:
    """Only the batch is read from Shape: no node is put behind it."""
    text = """g (float[N, 5, 4] x, float[4, 6] w, float[30, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      sizes = Shape(a)
      zero = Constant <value_ints = [0]> ()
      batch = Gather(sizes, zero)
      rest = Constant <value_ints = [-1]> ()
      shape = Concat <axis = 0> (batch, rest)
      b = Reshape(a, shape)
      y = MatMul(b, v)
    }"""
    model = load(weighted(text))
    analysis = analyze(model)
    (channels,) = [group.id for group in analysis.groups if group.size == 6]
    ops = [node.op for node in cut(model, analysis, {channels: [1]}).graph.nodes]
    assert ops == ["MatMul", "Shape", "Gather", "Concat", "Reshape", "MatMul"]
    assert exact(weighted(text))


def test_size() -> None:
    text = """g (float[N, 5, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, 5, 2] y, int64 n) {
      a = MatMul(x, w)
      n = Size(a)
      y = MatMul(a, v)
    }"""
    model = load(weighted(text))
    smaller = cut(model, analyze(model), {0: [1, 2, 3, 5]})
    assert int(run(open_model(smaller), {"x": np.ones((2, 5, 4), np.float32)})["n"]) == 60
    assert exact(weighted(text)) == 1
