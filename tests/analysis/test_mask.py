"""The masked model, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from spa_compiler.analysis.mask import mask
from spa_compiler.errors import UsageError
from spa_compiler.graph.load import load
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_model, run
from tests.analysis.builder import Net
from tests.onnx_text import model_from

X = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def masked(text: str, removed: dict[tuple[str, int], list[int]], feeds: Any = None, opset: int = 21) -> list[Any]:
    model = model_from(text, f'<ir_version: 8, opset_import: ["" : {opset}]>\n')
    return list(run(open_model(mask(model, removed), optimize="none"), feeds or {"x": X}).values())


def zeroed(rows: list[int], columns: list[int]) -> Any:
    out = X.copy()
    out[rows] = 0
    out[:, columns] = 0
    return out


def test_the_model_given_is_not_changed() -> None:
    model = model_from("g (float[3, 4] x) => (float[3, 4] y) { a = Relu(x)\n y = Relu(a) }")
    before = to_proto(model).SerializeToString(deterministic=True)
    mask(model, {("a", 1): [0]})
    assert to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("opset", [7, 8, 9, 21])
def test_all_readers_see_zeros_of_every_axis(opset: int) -> None:
    text = """g (float[3, 4] x) => (float[3, 4] y, float[3, 4] z) {
      a = Exp(x)
      b = Log(a)
      y = Exp(a)
      z = Exp(b)
    }"""
    removed = {("a", 0): [1], ("a", 1): [0, 2]}
    y, z = masked(text, removed, {"x": X / 10}, opset)
    inner = np.exp(X / 10) * (zeroed([1], [0, 2]) != 0)
    np.testing.assert_allclose(y, np.exp(inner), rtol=1e-5)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(z, np.exp(np.log(inner)), rtol=1e-5)


def test_what_is_not_finite_becomes_zero() -> None:
    (y,) = masked(
        "g (float[3, 4] x) => (float[3] y) { a = Reciprocal(x)\n axes = Constant <value_ints = [1]> ()\n"
        " y = ReduceSum <keepdims = 0> (a, axes) }",
        {("a", 1): [0]},
        {"x": X - 1},
    )
    assert np.isfinite(y[0])


def test_an_output_keeps_its_name() -> None:
    text = "g (float[3, 4] x) => (float[3, 4] y, float[3, 4] z) { y = Relu(x)\n z = Neg(y) }"
    y, z = masked(text, {("y", 1): [3], ("x", 0): [0]})
    np.testing.assert_array_equal(y, zeroed([0], [3]))
    np.testing.assert_array_equal(z, -zeroed([0], [3]))


def test_sizes_stay() -> None:
    (y,) = masked("g (float[3, 4] x) => (int64[2] y) { a = Relu(x)\n y = Shape(a) }", {("a", 1): [0]})
    assert y.tolist() == [3, 4]


@pytest.mark.parametrize("kind", ["bool", "float16", "int64", "int32", "uint8", "uint16", "double"])
def test_every_type(kind: str) -> None:
    number = getattr(onnx.TensorProto, {"float16": "FLOAT16"}.get(kind, kind.upper()))
    text = f"g (float[3, 4] x) => (float[3, 4] y) {{ a = Cast <to = {number}> (x)\n y = Cast <to = 1> (a) }}"
    (y,) = masked(text, {("a", 1): [1]})
    np.testing.assert_array_equal(y, (zeroed([], [1]) != 0) if kind == "bool" else zeroed([], [1]))


def test_branches_read_masked_tensors() -> None:
    text = """g (float[3, 4] x) => (float[3, 4] y) {
      a = Relu(x)
      yes = Constant <value = bool {1}> ()
      y = If (yes) <
        then_branch = g1 () => (float[3, 4] b1) { b1 = Neg(a) },
        else_branch = g2 () => (float[3, 4] b2) { b2 = Identity(a) }
      >
    }"""
    (y,) = masked(text, {("a", 1): [0, 1]})
    np.testing.assert_array_equal(y, -zeroed([], [0, 1]))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_does_not_read_the_state_that_is_gone(kind: str) -> None:
    """The same as setting the columns of its recurrent weights to zero."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    feeds = {"x": np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)}
    values = np.random.default_rng(1).normal(size=(2, 5 * gates, 5)).astype(np.float32)

    def net(state: Any) -> onnx.ModelProto:
        net = Net("recurrent")
        inputs = [net.input("x", 6, 2, 3), net.weight(2, 5 * gates, 3), net.const(state)]
        y, h = net.ops(kind, *inputs, count=2, hidden_size=5, direction="bidirectional")
        return net.model(y, h)

    removed = {(f"{kind.lower()}3", 3): [1, 4], (f"{kind.lower()}4", 2): [1, 4]}
    got = run(open_model(mask(load(net(values)), removed)), feeds)
    values[:, :, [1, 4]] = 0
    for name, value in run(open_model(load(net(values))), feeds).items():
        value[..., [1, 4]] = 0
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [("q", 0), ("a", 2)])
def test_what_is_not_there(place: tuple[str, int]) -> None:
    with pytest.raises(UsageError):
        masked("g (float[3, 4] x) => (float[3, 4] y) { a = Relu(x)\n y = Relu(a) }", {place: [0]})


def test_sizes_must_be_known() -> None:
    text = "g (float[3, N] x) => (float[3, M] y) { a = Relu(x)\n y = Relu(a) }"
    with pytest.raises(UsageError, match="size N"):
        masked(text, {("a", 1): [0]})
    model = mask(model_from(text), {("a", 1): [0]}, {"a": [3, 4]})
    np.testing.assert_array_equal(run(open_model(model), {"x": X})["y"], zeroed([], [0]))
