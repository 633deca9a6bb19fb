"""Two models in one file: the size of an input decides which one runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from spa_compiler.graph.either import Bounds, either, original_name, unfit, write_either
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


def test_files_become_one_file_weight_by_weight(tmp_path: Path) -> None:
    """Equal weights are there once, and the bytes are those of the messages put together in memory."""
    rng = np.random.default_rng(0)
    shared, own, other = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(3))
    text = 'g (float["n",64] x) => (float["n",64] y) { z = MatMul(x, w) y = MatMul(z, v) }'
    pair = [network(text, w=shared, v=v) for v in (own, other)]
    for name, proto in zip(("first", "second"), pair, strict=True):
        onnx.save(proto, tmp_path / name)
    bounds = Bounds("x", 128, 0)
    assert write_either(tmp_path / "first", tmp_path / "second", bounds, tmp_path / "both") == ""
    whole = either(*pair, bounds)
    assert (tmp_path / "both").read_bytes() == whole.SerializeToString(deterministic=True)
    assert sorted(t.name for t in whole.graph.initializer if t.dims) == ["v__first", "v__second", "w"]
    assert not any(a.g.initializer for a in whole.graph.node[-1].attribute)
    for rows, v in ((1, other), (2, own)):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        found = run(open_session(tmp_path / "both"), {"x": x})["y"]
        assert np.allclose(found, x @ shared @ v, rtol=1e-4, atol=1e-3)


def test_files_that_cannot_be_one_are_left(tmp_path: Path) -> None:
    old = made("Mul(z, {5.0})", w=W)
    old.opset_import[0].version = 7
    onnx.save(old, tmp_path / "old")
    onnx.save(PLUS, tmp_path / "new")
    assert "opset" in write_either(tmp_path / "new", tmp_path / "old", Bounds("x", 8, 0), tmp_path / "both")
    assert not (tmp_path / "both").exists()
