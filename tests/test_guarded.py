"""An artifact with two forms, from the model to the folder: report and manifest tell, and both forms are verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from spa_compiler.artifact import manifest
from spa_compiler.compiler import compile, load
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.placement.guard import BOTH
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.place import PORTABLE, SOURCE
from spa_compiler.placement.timer import Contender, LocalTimer
from spa_compiler.report import report as reports
from tests.networks import mlp

WIDTH = 64
SLOW_FROM = 512  # tokens


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense operators take 100 us, kernels 20 us; at many tokens 300 us."""

    def time(
        self: LocalTimer, contenders: Mapping[str, Contender], feeds: Feeds, *_: object, **__: object
    ) -> dict[str, Timing]:
        kernels = 300.0 if feeds["x"].size >= SLOW_FROM * WIDTH else 20.0
        us = {"dense": 100.0, PORTABLE: 100.0, SOURCE: 100.0, BOTH: min(kernels, 100.0)}
        return {name: Timing(us.get(name, kernels), 1.0, 1.0, 3) for name in contenders}

    monkeypatch.setattr(LocalTimer, "time", time)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(mlp(0.1, WIDTH), tmp_path / "zeros.onnx")
    return tmp_path / "zeros.onnx"


def operators(folder: Path, name: str = "model.onnx") -> set[str]:
    return {node.op_type for node in onnx.load(folder / name).graph.node}


def test_both_forms_from_end_to_end(source: Path, tmp_path: Path) -> None:
    result = compile(source, tmp_path / "out", threads=1)
    assert result.folder is not None
    assert operators(result.folder) == {"Size", "Greater", "If"}
    assert operators(result.folder, "portable.onnx") == {"MatMul", "Add", "Relu"}

    fallback = manifest.check(result.folder).fallback
    assert fallback is not None
    assert (fallback.input, fallback.below) == ("x", 0)
    assert 128 * WIDTH < fallback.above < SLOW_FROM * WIDTH

    report = reports.read(result.folder)
    forms = {row.shape: row.form for row in report.others}
    assert forms == {
        f"1x1x{WIDTH}": "sparse",
        f"1x16x{WIDTH}": "sparse",
        f"8x64x{WIDTH}": "dense",
        f"32x128x{WIDTH}": "dense",
    }
    assert all((row.dense_ms, row.sparse_ms) == (0.1, 0.3 if row.form == "dense" else 0.02) for row in report.others)
    (note,) = [note for note in report.notes if note.startswith("other shapes: ")]
    assert f"the dense form runs where x has from {fallback.above} on elements" in note
    assert f"1x1x{WIDTH}: 5.00x; " in note
    assert f"8x64x{WIDTH}: dense" in note
    assert {check.shape for check in report.checks} >= {f"1x128x{WIDTH}", f"8x64x{WIDTH}"}, "both forms"

    want = open_session(source)
    for shape in ((1, 1), (1, 128), (8, 64), (3, 200)):
        feeds = {"x": np.random.default_rng(0).standard_normal((*shape, WIDTH)).astype(np.float32)}
        np.testing.assert_allclose(run(load(result.folder), feeds)["y"], run(want, feeds)["y"], rtol=0, atol=1e-5)


def test_it_can_be_switched_off(source: Path, tmp_path: Path) -> None:
    result = compile(source, tmp_path / "out", threads=1, guard=False)
    assert result.folder is not None
    assert operators(result.folder).isdisjoint({"If"})
    assert result.report.others == []
    assert manifest.read(result.folder).fallback is None


def test_one_form_where_both_are_too_large(source: Path, tmp_path: Path) -> None:
    plain = compile(source, tmp_path / "plain", threads=1, guard=False).report.sizes
    assert plain is not None
    result = compile(source, tmp_path / "out", threads=1, max_size=plain.model + plain.kernels)
    assert result.folder is not None
    assert operators(result.folder).isdisjoint({"If"})
    assert {row.form for row in result.report.others} == {"sparse"}
    (note,) = [note for note in result.report.notes if note.startswith("other shapes: ")]
    assert "slower than the dense model at shapes that were not asked for" in note
    assert f"8x64x{WIDTH}: 0.33x" in note
