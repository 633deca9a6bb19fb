"""The cut itself: constants are sliced once for all their readers, and what a Patch may ask and do is as it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from spa_compiler.analysis import analyze
from spa_compiler.analysis.analyze import Analysis
from spa_compiler.analysis.cut import Cut, cut, removed_slabs
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import open_model, run
from spa_compiler.graph.weights import array_of
from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import weighted
from tests.onnx_text import text_of

CHAIN = """g (float[N, 4] x, float[4, 6] w, float[6] b, float[6, 2] v) => (float[N, 2] y) {
  h = Gemm(x, w, b)
  r = Exp(h)
  y = MatMul(r, v)
}"""

TWO = np.array(2, np.float32)


def of(text: str) -> tuple[Model, Analysis]:
    model = load(weighted(text))
    return model, analyze(model)


def the_cut(text: str, removed: Mapping[int, Sequence[int]]) -> tuple[Cut, Callable[[str], gs.Node]]:
    """A Cut whose Patches have not run, and its nodes by their first output."""
    model, analysis = of(text)
    work = Cut(model.copy(), analysis, removed)
    return work, lambda name: next(node for node in work.graph.nodes if node.outputs[0].name == name)


def values(model: Model, name: str) -> Any:
    return array_of(model.graph.tensors()[name])


# --- constants --------------------------------------------------------------------------------------------------------


def test_constants_lose_the_slabs_of_the_units() -> None:
    model, analysis = of(CHAIN)
    smaller = cut(model, analysis, {0: [1, 4]})
    left = [0, 2, 3, 5]
    np.testing.assert_array_equal(values(smaller, "w"), values(model, "w")[:, left])
    np.testing.assert_array_equal(values(smaller, "b"), values(model, "b")[left])
    np.testing.assert_array_equal(values(smaller, "v"), values(model, "v")[left])


def test_the_model_given_is_not_changed() -> None:
    model, analysis = of(CHAIN)
    before, weight = text_of(model), values(model, "w").copy()
    cut(model, analysis, {0: [0, 5]})
    assert text_of(model) == before
    np.testing.assert_array_equal(values(model, "w"), weight)


def test_nothing_removed_changes_nothing() -> None:
    model, analysis = of(CHAIN)
    assert text_of(cut(model, analysis, {})) == text_of(model)


def test_a_constant_that_several_read_is_cut_once() -> None:
    """One weight in two places: its axes hang together, so that both readers take what is left."""
    text = """g (float[N, 4] x, float[4, 6] w0, float[6, 6] w, float[6] s, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w0)
      b = Mul(a, s)
      c = MatMul(b, w)
      d = Mul(c, s)
      e = MatMul(d, w)
      y = MatMul(e, v)
    }"""
    model, analysis = of(text)
    smaller = cut(model, analysis, {0: [2]})
    assert values(smaller, "w").shape == (5, 5)
    assert values(smaller, "s").shape == (5,)
    assert check_exact(weighted(text)) == 1


def test_constant_nodes_are_cut_too() -> None:
    text = """g (float[N, 2] x, float[3, 2] v) => (float[N, 2] y) {
      w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()
      a = MatMul(x, w)
      y = MatMul(a, v)
    }"""
    model, analysis = of(text)
    smaller = cut(model, analysis, {0: [1]})
    assert [node.op for node in smaller.graph.nodes] == ["MatMul", "MatMul"]
    np.testing.assert_array_equal(values(smaller, "w"), [[1, 3], [4, 6]])
    assert [node.op for node in model.graph.nodes] == ["Constant", "MatMul", "MatMul"]
    assert check_exact(weighted(text)) == 1


def test_stated_sizes_of_what_shrank_are_forgotten() -> None:
    model, analysis = of(CHAIN)
    model.graph.tensors()["h"].shape = ["N", 6]
    assert cut(model, analysis, {0: [1]}).graph.tensors()["h"].shape is None


def test_removed_slabs() -> None:
    _, analysis = of(CHAIN)
    parameters, activations = removed_slabs(analysis, {0: [4, 1]})
    assert {place: indices.tolist() for place, indices in parameters.items()} == {
        ("w", 1): [1, 4],
        ("b", 0): [1, 4],
        ("v", 0): [1, 4],
    }
    assert {place: indices.tolist() for place, indices in activations.items()} == {("h", 1): [1, 4], ("r", 1): [1, 4]}
    assert removed_slabs(analysis, {}) == removed_slabs(analysis, {0: []}) == ({}, {})


def test_slabs_of_several_groups_on_one_axis() -> None:
    text = """g (float[2, 3] x, float[3, 6] w, float[2, 1] s, float[3] t, float[6, 2] v) => (float[2, 2] y) {
      a = MatMul(x, w)
      shape = Constant <value_ints = [2, 2, 3]> ()
      b = Reshape(a, shape)
      c = Mul(b, s)
      d = Mul(c, t)
      back = Constant <value_ints = [2, 6]> ()
      e = Reshape(d, back)
      y = MatMul(e, v)
    }"""
    _, analysis = of(text)
    assert [group.size for group in analysis.groups] == [2, 3]
    parameters, _ = removed_slabs(analysis, {0: [1], 1: [0]})
    assert parameters["w", 1].tolist() == [0, 3, 4, 5]
    assert check_exact(weighted(text)) == 2


# --- what a Patch may ask ---------------------------------------------------------------------------------------------


def test_keep_and_sizes() -> None:
    work, node = the_cut(CHAIN, {0: [1, 4]})
    kept = work.keep("h", 1)
    assert kept is not None
    assert kept.tolist() == [0, 2, 3, 5]
    assert work.keep(node("h").outputs[0], 0) is None
    assert work.keep("nowhere", 0) is None
    assert (work.sizes("h", 1), work.sizes("w", 0)) == ((6, 4), (4, 4))


def test_value_is_that_of_a_constant() -> None:
    work, node = the_cut(CHAIN, {0: [1]})
    found = work.value(node("h"), 2)
    assert found is not None
    assert found.shape == (6,)
    assert work.value(node("y"), 0) is None
    assert work.value(node("y"), 7) is None


# --- what a Patch may do ----------------------------------------------------------------------------------------------


def test_set_input_leaves_other_readers_alone() -> None:
    text = """g (float[4, 6] x, float[2] s) => (float[4, 6] y, float[4, 6] z) {
      shape = Constant <value_ints = [4, 6]> ()
      y = Reshape(x, shape)
      z = Reshape(x, shape)
    }"""
    work, node = the_cut(text, {})
    work.set_input(node("y"), 1, np.array([6, 4]))
    assert array_of(node("y").inputs[1]).tolist() == [6, 4]
    assert node("z").inputs[1].name == "shape"


def test_set_input_behind_the_last() -> None:
    work, node = the_cut("g (float[4, 6] x) => (float[4, 6] y) { y = Identity(x) }", {})
    work.set_input(node("y"), 3, np.array([1]))
    assert [tensor.name for tensor in node("y").inputs] == ["x", "", "", "y_3"]


def test_before_changes_one_reader() -> None:
    text = "g (float[4, 6] x) => (float[4, 6] y, float[4, 6] z) { h = Exp(x)\n y = Neg(h)\n z = Abs(h) }"
    work, node = the_cut(text, {})
    new = work.before(node("y"), 0, "Mul", [TWO])
    assert new.inputs[0].name == "h"
    assert node("y").inputs[0] is new.outputs[0]
    assert node("z").inputs[0].name == "h"
    assert [own.op for own in work.graph.nodes] == ["Exp", "Mul", "Neg", "Abs"]


def test_after_changes_every_reader_and_the_output() -> None:
    """The new node makes the tensor of the old name; what is behind stands in the order it had."""
    text = "g (float[4, 6] x) => (float[4, 6] h, float[4, 6] y) { h = Exp(x)\n y = Neg(h) }"
    work, node = the_cut(text, {})
    old = node("h")
    new = work.after(old, 0, "Mul", [TWO])
    assert node("h") is new
    assert new.inputs[0] is old.outputs[0]
    assert node("y").inputs[0].name == "h"
    assert [own.op for own in work.graph.nodes] == ["Exp", "Mul", "Neg"]
    assert {tensor.name for tensor in work.graph.outputs} == {"h", "y"}


def test_before_and_after_by_turns() -> None:
    """What is put behind a node first is last; names are new every time."""
    text = "g (float[3] x) => (float[3] y) { y = Neg(x) }"
    model, analysis = of(text)
    work = Cut(model, analysis, {})
    node = work.graph.nodes[0]
    for number in (2.0, 3.0):
        work.after(node, 0, "Pow", [np.array(number, np.float32)])
        work.before(node, 0, "Add", [np.array(number, np.float32)])
    assert [own.op for own in work.graph.nodes] == ["Add", "Add", "Neg", "Pow", "Pow"]
    got = run(open_model(model), {"x": np.array([1, 2, 3], np.float32)})["y"]
    np.testing.assert_allclose(got, [((-(v + 5.0)) ** 3) ** 2 for v in (1, 2, 3)])


def test_names_are_free() -> None:
    text = "g (float[3] x) => (float[3] y) { y_whole = Neg(x)\n y_Mul = Abs(y_whole)\n y = Exp(y_Mul) }"
    model, analysis = of(text)
    work = Cut(model, analysis, {})
    last = work.graph.nodes[-1]
    work.after(last, 0, "Mul", [TWO])
    work.before(last, 0, "Mul", [TWO])
    names = [tensor.name for node in work.graph.nodes for tensor in node.outputs]
    assert len(set(names)) == len(names) == 5
    assert len({node.name for node in work.graph.nodes if node.name}) == len([n for n in work.graph.nodes if n.name])
    assert work.constant(np.zeros(2), "x").name == "x_1"
    got = run(open_model(model), {"x": np.array([1, -2, 0], np.float32)})["y"]
    np.testing.assert_allclose(got, 2 * np.exp([2.0, 4.0, 0.0]), rtol=1e-6)


def test_replace() -> None:
    work, node = the_cut("g (float[3] x) => (float[3] y) { h = Neg(x)\n y = Exp(h) }", {})
    old = node("h")
    (result,) = list(old.outputs)
    old.outputs.clear()
    new = gs.Node("Abs", "new", {}, list(old.inputs), [result])
    old.inputs.clear()
    work.replace(old, [new])
    assert [own.op for own in work.graph.nodes] == ["Abs", "Exp"]


# --- sizes ------------------------------------------------------------------------------------------------------------


def reshaped(shape: str, extra: str = "") -> str:
    """[N, 5, 12] -> [N, 5, 3, 4] in the way that `shape` says; heads and their width can go."""
    return f"""g (float[N, 5, 2] x, float[2, 12] w, float[3, 1] s, float[4] t, float[3, 4] o) => (float[N, 5] y) {{
      a = MatMul(x, w)
      {extra}
      shape = {shape}
      b = Reshape(a, shape)
      c = Mul(b, s)
      d = Mul(c, t)
      e = Mul(d, o)
      axes = Constant <value_ints = [2, 3]> ()
      y = ReduceSum <keepdims = 0> (e, axes)
    }}"""


@pytest.mark.parametrize(
    "before, after",
    [
        ([-1, 5, 3, 4], [-1, 5, 2, 3]),
        ([0, 0, 3, 4], [0, 0, 2, 3]),
        ([0, 0, -1, 4], [0, 0, -1, 3]),
        ([0, 0, 3, -1], [0, 0, 2, -1]),
    ],
)
def test_sizes_of_a_constant(before: list[int], after: list[int]) -> None:
    text = reshaped(f"Constant <value_ints = {before}> ()")
    model, analysis = of(text)
    assert [group.size for group in analysis.groups] == [3, 4]
    smaller = cut(model, analysis, {0: [1], 1: [3]})
    node = next(node for node in smaller.graph.nodes if node.op == "Reshape")
    assert array_of(node.inputs[1]).tolist() == after
    assert check_exact(weighted(text)) == 2


def test_sizes_follow_on_their_own_axis_alone() -> None:
    """Heads of 3 and a sequence of 3: the same number, another axis."""
    text = """g (float[N, 3, 2] x, float[2, 9] w, float[3, 1] s, float[3, 3] o) => (float[N, 3, 3] y) {
      a = MatMul(x, w)
      shape = Constant <value_ints = [-1, 3, 3, 3]> ()
      b = Reshape(a, shape)
      c = Mul(b, s)
      axes = Constant <value_ints = [2]> ()
      d = ReduceSum <keepdims = 0> (c, axes)
      y = MatMul(d, o)
    }"""
    model, analysis = of(text)
    assert [group.size for group in analysis.groups] == [3, 3]
    (heads,) = [group.id for group in analysis.groups if ("s", 0) in {(m.tensor, m.axis) for m in group.members}]
    smaller = cut(model, analysis, {heads: [0]})
    node = next(node for node in smaller.graph.nodes if node.op == "Reshape")
    assert array_of(node.inputs[1]).tolist() == [-1, 3, 2, 3]
    assert check_exact(weighted(text)) == 2


@pytest.mark.parametrize(
    "shape, extra",
    [
        # batch and positions are read from the tensor, heads are literals
        (
            "Concat <axis = 0> (front, heads)",
            "sizes = Shape(a)\n zero = Constant <value_ints = [0]> ()\n two = Constant <value_ints = [2]> ()\n"
            "front = Slice(sizes, zero, two)\n heads = Constant <value_ints = [3, 4]> ()",
        ),
        # the width of a head is the number of channels by 3
        (
            "Concat <axis = 0> (front, three, width)",
            "sizes = Shape(a)\n zero = Constant <value_ints = [0]> ()\n two = Constant <value_ints = [2]> ()\n"
            "front = Slice(sizes, zero, two)\n three = Constant <value_ints = [3]> ()\n"
            "all = Gather(sizes, two)\n width = Div(all, three)",
        ),
        # the same, with what is left to -1
        (
            "Concat <axis = 0> (front, three, rest)",
            "sizes = Shape(x)\n zero = Constant <value_ints = [0]> ()\n two = Constant <value_ints = [2]> ()\n"
            "front = Slice(sizes, zero, two)\n three = Constant <value_ints = [3]> ()\n"
            "rest = Constant <value_ints = [-1]> ()",
        ),
    ],
)
def test_sizes_that_the_graph_computes(shape: str, extra: str) -> None:
    text = reshaped(shape, extra)
    model = weighted(text)
    assert check_exact(model, sizes={"N": 2}) == 2
    assert check_exact(model, sizes={"N": 3}) == 2
    assert check_each_unit(model)


def test_sizes_used_as_numbers_stay() -> None:
    """A mean over what a graph counts itself is that of the whole model; what takes them as a shape follows."""
    text = """g (float[N, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, 2] y, int64[2] s, int64 n) {
      a = MatMul(x, w)
      s = Shape(a)
      n = Size(a)
      count = Cast <to = 1> (n)
      b = Div(a, count)
      one = Constant <value = float {1}> ()
      ones = Expand(one, s)
      c = Add(b, ones)
      y = MatMul(c, v)
    }"""
    model = load(weighted(text))
    analysis = analyze(model)
    assert [group.size for group in analysis.groups] == [6]
    got = run(open_model(cut(model, analysis, {0: [1, 3]})), {"x": np.ones((5, 4), np.float32)})
    assert (got["s"].tolist(), int(got["n"])) == ([5, 6], 30)
    assert check_exact(model) == 1
