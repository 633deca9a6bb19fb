"""Two models in one file: the size of an input decides which one runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from spa_compiler.graph.either import Bounds, either, original_name, unfit
from spa_compiler.graph.session import open_session, run
from tests.networks import network

W = np.eye(8, dtype=np.float32)


def made(last: str, **weights: np.ndarray) -> onnx.ModelProto:
    return network(
        f'g (float["n",8] x) => (float["n",8] y, float["n",8] z) {{ z = MatMul(x, w) y = {last} }}', **weights
    )


PLUS, TIMES = made("Add(z, {1.0})", w=W), made("Mul(z, {5.0})", w=W)


def first_runs(model: onnx.ModelProto, rows: int) -> bool:
    feeds = {"x": np.full((rows, 8), 2, np.float32)}
    found = run(open_session(model.SerializeToString()), feeds)
    assert np.all(found["z"] == 2)
    assert set(np.unique(found["y"])) in ({3.0}, {10.0})
    return bool(found["y"][0, 0] == 3)


@pytest.mark.parametrize(
    ("below", "above", "first"),
    [(32, 0, [4, 7, 8, 9, 99]), (0, 64, [1, 3, 4, 7]), (32, 64, [4, 7]), (8, 9, [1])],
)
def test_the_size_decides(below: int, above: int, first: list[int]) -> None:
    bounds = Bounds("x", below, above)
    model = either(PLUS, TIMES, bounds)
    onnx.checker.check_model(model, full_check=True)
    rows = [1, 3, 4, 7, 8, 9, 99]
    assert [n for n in rows if first_runs(model, n)] == first
    assert [n for n in rows if not bounds.holds((n, 8))] == first


def test_signature_and_weights_are_there_once() -> None:
    big = np.ones((8, 8), np.float32)
    model = either(PLUS, made("MatMul(z, v)", w=W, v=big), Bounds("x", 16, 0))
    assert [v.SerializeToString() for v in model.graph.input] == [v.SerializeToString() for v in PLUS.graph.input]
    assert [v.SerializeToString() for v in model.graph.output] == [v.SerializeToString() for v in PLUS.graph.output]
    assert "w" in {t.name for t in model.graph.initializer}
    branches = {a.name: a.g for a in model.graph.node[-1].attribute}
    assert {t.name for t in branches["then_branch"].initializer} == {"v__second"}
    assert "w" not in {t.name for b in branches.values() for t in b.initializer}
    assert {original_name(n.name) for n in branches["then_branch"].node} == {"z", "y"}


def test_weights_of_one_name_that_differ_stay_apart() -> None:
    other = made("Mul(z, {5.0})", w=2 * W)
    model = either(PLUS, other, Bounds("x", 16, 0))
    feeds = {"x": np.ones((1, 8), np.float32)}
    assert run(open_session(model.SerializeToString()), feeds)["y"][0, 0] == 10
    feeds = {"x": np.ones((9, 8), np.float32)}
    assert run(open_session(model.SerializeToString()), feeds)["y"][0, 0] == 2


def test_what_cannot_be_one() -> None:
    assert unfit(PLUS, TIMES) == ""
    old = onnx.ModelProto()
    old.CopyFrom(PLUS)
    old.opset_import[0].version = 8
    assert "opset" in unfit(old, TIMES)
    assert "opset" in unfit(PLUS, old)
    nested = either(PLUS, TIMES, Bounds("x", 16, 0))
    assert "control flow" in unfit(nested, TIMES)
    passed = onnx.ModelProto()
    passed.CopyFrom(PLUS)
    passed.graph.output.append(passed.graph.input[0])
    assert "no tensor that a node makes" in unfit(passed, PLUS)
    outside = onnx.ModelProto()
    outside.CopyFrom(PLUS)
    outside.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    assert "file of their own" in unfit(outside, PLUS)
