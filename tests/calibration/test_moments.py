"""Rows are what ONNX Runtime multiplies with the weight, and moments are products of them, however they come."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.calibration.moments import Geometry, Moments
from spa_compiler.graph.load import load
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import open_session, run
from tests.onnx_text import model_from


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[dict[str, object], tuple[int, ...], tuple[int, ...]]:
    """Attributes, shape of the input, shape of the weight."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    group = draw(st.integers(1, 3))
    kernel, strides = each(1, 3), each(1, 3)
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    same = auto.startswith("SAME")  # ONNX Runtime has no dilations with it
    attrs: dict[str, object] = {"group": group}
    dilations = [1] * rank if same else each(1, 2)
    if draw(st.booleans()):
        attrs["strides"] = strides
    if not same and draw(st.booleans()):
        attrs["dilations"] = dilations
    if auto != "NOTSET":
        attrs["auto_pad"] = auto
    elif draw(st.booleans()):
        attrs["pads"] = each(0, 2, 2 * rank)
    sizes = [(size - 1) * step + draw(st.integers(1, 4)) for size, step in zip(kernel, dilations, strict=True)]
    per = draw(st.integers(1, 3))
    x = (draw(st.integers(1, 2)), group * per, *sizes)
    return attrs, x, (group * draw(st.integers(1, 2)), per, *kernel)


@settings(max_examples=120, deadline=None)
@given(convolutions(), st.booleans())
def test_rows_times_the_weight_are_the_convolution(case: tuple, some: bool) -> None:
    attrs, x_shape, w_shape = case
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], **attrs)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [onnx.ValueInfoProto(name="y", type=helper.make_tensor_type_proto(TensorProto.FLOAT, [None] * len(x_shape)))],
        [numpy_helper.from_array(w, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    y = run(open_session(proto.SerializeToString()), {"x": x})["y"]
    (op,) = weighted_ops(load(proto).graph)
    geometry = Geometry.of(op)
    view = geometry.view(x)
    assert geometry.positions(view) == y.shape[0] * np.prod(y.shape[2:])
    which = np.arange(0, geometry.positions(view), 2) if some else None
    rows, results = geometry.rows(view, which), geometry.at(y, which, op.group)
    weights = op.rows().reshape(op.group, -1, op.k)
    assert rows.dtype == np.float32
    assert rows.shape[::2] == (op.group, op.k)
    np.testing.assert_allclose(rows @ weights.transpose(0, 2, 1), results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 5, 3), (2, 2, 2, 3)])
def test_rows_of_a_product_are_its_leading_axes(shape: tuple[int, ...]) -> None:
    geometry = Geometry("rows")
    x = normal(*shape).astype(np.float16)
    view = geometry.view(x)
    assert geometry.positions(view) == x.size // 3
    np.testing.assert_array_equal(geometry.rows(view)[0], x.reshape(-1, 3).astype(np.float32))
    np.testing.assert_array_equal(geometry.rows(view, np.array([0]))[0], x.reshape(-1, 3)[:1].astype(np.float32))


def test_no_positions_are_rows_too() -> None:
    """Of a feed that is all padding none is left."""
    none = np.zeros(0, np.int64)
    conv = Geometry("Conv", 2, (3, 2), (1, 1), (0, 0, 0, 0), (1, 1))
    for geometry, x, shape in ((Geometry("rows"), normal(4, 3), (1, 0, 3)), (conv, normal(2, 6, 4, 4), (2, 0, 18))):
        assert geometry.rows(geometry.view(x), none).shape == shape
    assert Geometry("rows").rows(Geometry("rows").view(normal(2, 0, 3))).shape == (1, 0, 3)
    assert conv.at(normal(2, 4, 2, 3), none, 2).shape == (2, 0, 2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.booleans(),
)
def test_moments_are_products_whatever_the_split(groups: int, k: int, n: int, sizes: list[int], merged: bool) -> None:
    count = sum(sizes)
    x, z, t = (normal(groups, count, width, seed=seed) for seed, width in enumerate((k, k, n)))
    moments, start = Moments(groups, k), 0
    for size in sizes:
        part = slice(start, start + size)
        into = Moments(groups, k) if merged else moments
        into.add(x[:, part], z[:, part], t[:, part])
        if merged:
            moments.merge(into)
        start += size
    assert moments.count == count
    wide_x, wide_z, wide_t = (array.astype(np.float64) for array in (x, z, t))
    turned = wide_x.transpose(0, 2, 1)
    expected = {
        "mean": wide_x.sum(axis=1),
        "gram": turned @ wide_x,
        "dense_mean": wide_z.sum(axis=1),
        "cross": turned @ wide_z,
        "target_mean": wide_t.sum(axis=1),
        "extra": turned @ wide_t,
    }
    for name, total in expected.items():
        assert moments.get(name).dtype == np.float64
        np.testing.assert_allclose(moments.get(name), total / max(1, count), atol=1e-5)
    np.testing.assert_array_equal(moments.get("gram"), moments.get("gram").transpose(0, 2, 1))


def test_one_input_twice_is_counted_once_each() -> None:
    x = normal(1, 9, 3)
    moments = Moments(1, 3)
    for _ in range(3):
        moments.add(x, x)
    np.testing.assert_array_equal(moments.get("cross"), moments.get("gram"))
    np.testing.assert_array_equal(moments.get("dense_mean"), moments.get("mean"))
    np.testing.assert_allclose(moments.get("mean")[0], x[0].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(moments.get("gram")[0], x[0].T @ x[0] / 9, atol=1e-6)
    assert "extra" not in moments


def test_merging_leaves_the_other_alone() -> None:
    x = normal(1, 9, 3)
    one, two = Moments(1, 3), Moments(1, 3)
    one.add(x)
    one.add(x)
    two.merge(one)
    two.merge(one)
    np.testing.assert_allclose(one.get("gram")[0], x[0].T @ x[0] / 9, atol=1e-6)
    assert (one.count, two.count) == (18, 36)


def test_operators_that_read_alike_share_a_geometry() -> None:
    model = model_from("""g (float[N, 2, 4, 4] x) => (float[N, 1, 4, 4] a, float[N, 3, 4, 4] b, float[N, 1, 2, 2] c)
      <float[1, 2, 1, 1] v = {1, 2}, float[3, 2, 1, 1] w = {1, 2, 3, 4, 5, 6}> {
      a = Conv(x, v)
      b = Conv<strides = [1, 1], pads = [0, 0, 0, 0]>(x, w)
      c = Conv<strides = [2, 2]>(x, v)
    }""")
    a, b, c = map(Geometry.of, weighted_ops(model.graph))
    assert a == b != c
    assert Geometry("rows") not in (a, c)


def test_the_half_has_what_was_merged_into_it_and_the_rest_what_was_not() -> None:
    parts = [normal(1, count, 3, seed=count) for count in (4, 5, 6, 7)]
    whole = Moments(1, 3)
    for number, x in enumerate(parts):
        part = Moments(1, 3)
        part.add(x, x)
        whole.merge(part, into_half=number % 2 == 1)
        if whole.half is not None:
            whole.without_half()  # asked too early: it is made anew for what comes later
    assert whole.half is not None
    for got, rows in (
        (whole, np.concatenate(parts, axis=1)),
        (whole.half, np.concatenate(parts[1::2], axis=1)),
        (whole.without_half(), np.concatenate(parts[::2], axis=1)),
    ):
        assert got.count == rows.shape[1]
        np.testing.assert_allclose(got.get("gram"), rows.transpose(0, 2, 1) @ rows / got.count, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.get("mean"), rows.mean(axis=1), rtol=1e-5, atol=1e-6)
