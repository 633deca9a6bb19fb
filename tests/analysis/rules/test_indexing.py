"""Operators that index, rank or scan one axis: that axis stays, the others pass."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.analysis.exactness import check_exact
from tests.analysis.told import group_members, pins_of, weighted


def between(lines: str, weights: str = "", last: str = "b") -> str:
    """`lines` make b [3, n, 6] from a [3, 4, 6], with 6 channels in the last axis."""
    return f"""net (float[3, 4, 5] x, int64[3, 4, 6] x_ids, float[5, 6] u{weights}, float[6, 2] v) => (float[3, T, 2] y) {{
      a = MatMul(x, u)
      {lines}
      y = MatMul({last}, v)
    }}"""


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()\n"


def scalar(name: str, value: int) -> str:
    return f"{name} = Constant <value = int64 {{{value}}}> ()\n"


PASSES = {
    "GatherElements": (
        "i = Cast <to = 7> (w)\n b = GatherElements <axis = 1> (a, i)",
        ", float[3, 2, 6] w",
    ),
    "ScatterElements": (
        "i = Cast <to = 7> (w)\n b = ScatterElements <axis = 1> (a, i, n)",
        ", float[3, 2, 6] w, float[3, 2, 6] n",
    ),
    "ScatterElements add": (
        'i = Cast <to = 7> (w)\n b = ScatterElements <axis = 1, reduction = "add"> (a, i, n)',
        ", float[3, 2, 6] w, float[3, 2, 6] n",
    ),
    "GatherND": (
        "i = Constant <value = int64[3, 2, 1] {0, 1, 3, 3, 2, 0}> ()\n b = GatherND <batch_dims = 1> (a, i)",
        "",
    ),
    "ScatterND": (
        "i = Constant <value = int64[2, 2] {0, 1, 2, 3}> ()\n b = ScatterND(a, i, n)",
        ", float[2, 6] n",
    ),
    "TopK": (ints("k", 2) + "b, i = TopK <axis = 1> (a, k)", ""),
    "ArgMax": ("i = ArgMax <axis = 1> (a)\n b = Cast <to = 1> (i)", ""),
    "ArgMin": ("i = ArgMin <axis = -2, keepdims = 1> (a)\n b = Cast <to = 1> (i)", ""),
    "Compress": ("c = Constant <value = bool[4] {1, 0, 1, 1}> ()\n b = Compress <axis = 1> (a, c)", ""),
    "CumSum": (scalar("k", 1) + "b = CumSum <reverse = 1> (a, k)", ""),
    "CumSum exclusive": (scalar("k", -2) + "b = CumSum <exclusive = 1> (a, k)", ""),
    "Trilu": (
        scalar("k", 0)
        + "t = Transpose <perm = [2, 0, 1]> (a)\n t2 = Trilu(t, k)\n b = Transpose <perm = [1, 2, 0]> (t2)",
        "",
    ),
    "ReverseSequence": (
        ints("k", 2, 4, 1) + "b = ReverseSequence <batch_axis = 0, time_axis = 1> (a, k)",
        "",
    ),
}


def proto(text: str) -> onnx.ModelProto:
    """Weights named w are small indices."""
    model = weighted(text)
    rng = np.random.default_rng(3)
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            shape = tuple(tensor.dims)
            orders = np.argsort(rng.random((*shape[:1], 4, *shape[2:])), axis=1)[:, : shape[1]]  # no index twice
            tensor.CopyFrom(onnx.numpy_helper.from_array(orders.astype(np.float32), "w"))
    return model


@pytest.mark.parametrize("case", PASSES)
def test_other_axes_pass(case: str) -> None:
    text = between(*PASSES[case])
    (members,) = group_members(text)
    assert {("u", 1), ("a", 2), ("b", 2), ("v", 0)} <= members
    assert check_exact(proto(text)) == 1


ON_CHANNELS = {
    "GatherElements": ("b = GatherElements <axis = 2> (a, x_ids)", "a", 2, "dynamic index"),
    "ScatterElements": ("b = ScatterElements <axis = -1> (a, x_ids, a)", "a", 2, "dynamic index"),
    "TopK": (ints("k", 6) + "b, i = TopK(a, k)", "a", 2, "ranked"),
    "ArgMax": ("i = ArgMax <axis = 2, keepdims = 0> (a)\n b = Identity(a)", "a", 2, "ranked"),
    "CumSum": (scalar("k", -1) + "b = CumSum(a, k)", "a", 2, "a running sum or product"),
    "Trilu": ("b = Trilu(a)", "a", 2, "triangle of a matrix"),
    "Compress": (
        "c = Constant <value = bool[6] {1, 1, 1, 1, 1, 1}> ()\n c2 = Compress <axis = 2> (a, c)\n b = Identity(a)",
        "a",
        2,
        "selected by a condition",
    ),
}


@pytest.mark.parametrize("op", ON_CHANNELS)
def test_the_axis_stays(op: str) -> None:
    lines, tensor, axis, reason = ON_CHANNELS[op]
    text = between(lines)
    assert group_members(text) == []
    assert (tensor, axis, op, reason) in pins_of(text)


def test_indices_for_a_part_of_an_axis() -> None:
    text = between(
        "i = Cast <to = 7> (w)\n b = ScatterElements <axis = 1> (a, i, n)", ", float[3, 2, 4] w, float[3, 2, 4] n"
    )
    assert group_members(text) == []
    assert ("a", 2, "ScatterElements", "indices for a part of the axis") in pins_of(text)


def test_table_of_rows() -> None:
    """GatherND out of a weight: what is not indexed passes."""
    text = """net (int64[2, 1] x_ids, float[9, 6] table, float[6, 2] v) => (float[2, 2] y) {
      b = GatherND(table, x_ids)
      y = MatMul(b, v)
    }"""
    assert group_members(text) == [{("table", 1), ("b", 1), ("v", 0)}]
    assert ("table", 0, "GatherND", "dynamic index") in pins_of(text)


ONE_HOT = """net (int64[3] x_ids, float[6, 4] w, float[4, 2] v) => (float[3, 2] y) {
  d = Constant <value = int64 {6}> ()
  o = Constant <value = float[2] {0.5, 2.0}> ()
  h = OneHot(x_ids, d, o)
  b = MatMul(h, w)
  y = MatMul(b, v)
}"""


def test_one_hot_depth_follows() -> None:
    feeds = {"x_ids": np.array([1, 5, -2])}
    assert check_exact(weighted(ONE_HOT), feeds=feeds) == 2
    first = ONE_HOT.replace("OneHot(", "OneHot <axis = 0> (").replace("MatMul(h, w)", "MatMul(t, w)")
    first = first.replace("  b =", "  t = Transpose(h)\n  b =")
    assert check_exact(weighted(first), feeds=feeds) == 2


def test_a_depth_that_is_computed_stays() -> None:
    text = ONE_HOT.replace("int64[3] x_ids", "int64[3] x_ids, int64 x_depth").replace(
        "OneHot(x_ids, d, o)", "OneHot(x_ids, x_depth, o)"
    )
    text = text.replace("=> (float[3, 2] y) {", "=> (float[3, 2] y) <float[3, 6] h> {")
    assert ("h", 1, "OneHot", "computed size") in pins_of(text)
    assert ("w", 0) not in {place for members in group_members(text) for place in members}


def test_single_elements_that_are_selected_keep_all_axes() -> None:
    text = between("c = Constant <value = bool[4] {1, 0, 1, 1}> ()\n c2 = Compress(a, c)\n b = Identity(a)")
    assert group_members(text) == []
    assert ("a", 2, "Compress", "selects single elements") in pins_of(text)


@pytest.mark.parametrize("time, reason", [(0, "steps of a sequence"), (1, "sequences with lengths")])
def test_a_reversed_sequence_keeps_its_steps_and_its_sequences(time: int, reason: str) -> None:
    lengths = ints("k", *([2, 4, 1] if time == 0 else [2, 3, 1, 2, 3, 1]))
    text = between(
        f"""{lengths} t = Transpose <perm = [2, 0, 1]> (a)
      r = ReverseSequence <time_axis = {time}, batch_axis = {1 - time}> (t, k)
      b = Transpose <perm = [1, 2, 0]> (r)"""
    )
    assert group_members(text) == []
    assert ("t", 0, "ReverseSequence", reason) in pins_of(text)


def test_updates_stay_with_the_indices_that_place_them() -> None:
    text = between(
        "i = Cast <to = 7> (w)\n n = MatMul(t, p)\n b = ScatterElements <axis = 1> (a, i, n)",
        ", float[3, 2, 6] w, float[3, 5, 6] t0, float[2, 5] p0",
    )
    text = text.replace("n = MatMul(t, p)", "t = Sin(t0)\n p = Sin(p0)\n n = MatMul(p, t)")
    assert ("p0", 0) not in {place for members in group_members(text) for place in members}


def test_batches_of_a_table_go_with_their_indices() -> None:
    text = """net (float[2, 4] x, float[4, 5] w, float[5, 6, 6] table, int64[5, 2, 1] ids, float[5, 3] v) => (float[2, 3] y) {
      a = MatMul(x, w)
      b = GatherND <batch_dims = 1> (table, ids)
      axes = Constant <value = int64[2] {1, 2}> ()
      s = ReduceSum <keepdims = 0> (b, axes)
      c = Mul(a, s)
      y = MatMul(c, v)
    }"""
    (members,) = [members for members in group_members(text) if ("w", 1) in members]
    assert {("table", 0), ("ids", 0), ("b", 0), ("v", 0)} <= members
    assert check_exact(weighted(text))
