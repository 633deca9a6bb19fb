"""`compress`: a recipe's passes and the report of them, without anything being timed or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa_compiler
from spa_compiler import compression
from spa_compiler.compression import Compressed
from spa_compiler.errors import UsageError
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_model, open_session, run
from spa_compiler.passes.recipe import Recipe, from_flags
from tests.passes.tiny import WIDTH, correlated, feed_forward

SAMPLES = 70
"""In feeds of 8, so that there are eight, and the last of them is held out; six samples follow."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=correlated(SAMPLES, WIDTH, 0))
    return tmp_path


def proto() -> onnx.ModelProto:
    return to_proto(feed_forward(blocks=2))


def compress(flags: str = "sparsify{sparsity=0.5}", calib: str | None = "data.npz", **options: Any) -> Compressed:
    return spa_compiler.compress(proto(), from_flags(flags), calib=calib, **options)


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return run(open_session(model.SerializeToString()), {"x": x})["y"].astype(np.float64)


def test_the_report_tells_each_site() -> None:
    done = compress("sparsify{sparsity=0.5,pattern=block:4x1,method=sparsegpt}")
    (step,) = done.report.passes
    assert step.name == "sparsify"
    assert [site.node for site in step.sites] == ["a0", "b0", "a1", "b1"]
    for site, op in zip(step.sites, weighted_ops(done.model.graph), strict=True):
        assert site.pattern == "block:4x1"
        assert site.method == "sparsegpt"
        assert site.density_before == 1
        assert site.density_after == np.count_nonzero(op.rows()) / op.rows().size
        assert site.density_after < 0.8
        assert 0 < site.error < 1
        assert site.seconds >= 0
    kept = sum(np.count_nonzero(op.rows()) for op in weighted_ops(done.model.graph))
    assert abs(kept - 2 * 12 * 16) <= 4 * 4  # each of four layers is rounded to a block
    assert f"calibrated on {SAMPLES} samples in 9 feeds, 1 of them held out" in done.report.notes
    assert {"load", "read samples", "passes", "estimate"} <= {stage.name for stage in done.report.stages}
    assert done.report.asked.options["calib"] == "data.npz"


def test_the_change_of_the_outputs_is_that_of_held_out_samples() -> None:
    done = compress()
    held = correlated(SAMPLES, WIDTH, 0)[56:64]
    was, now = outputs(proto(), held), outputs(done.proto(), held)
    expected = np.sqrt(np.square(now - was).sum() / np.square(was).sum())
    assert done.report.output_change == pytest.approx(expected, rel=1e-4)
    assert 0.01 < expected < 1


def test_the_result_is_a_model_in_standard_operators_and_the_source_is_left_alone() -> None:
    source = proto()
    before = source.SerializeToString(deterministic=True)
    done = spa_compiler.compress(source, from_flags("sparsify{sparsity=0.5}"), calib="data.npz")
    assert source.SerializeToString(deterministic=True) == before
    made = done.proto()
    onnx.checker.check_model(made, full_check=True)
    assert {node.domain for node in made.graph.node} == {""}
    zeros = sum(int((numpy_helper.to_array(t) == 0).sum()) for t in made.graph.initializer)
    assert abs(zeros - 2 * 12 * 16) <= 2  # the share of each of four layers is rounded to an element
    dense = run(open_model(done.canonical), {"x": correlated(5, WIDTH, 3)})["y"]
    np.testing.assert_allclose(dense, outputs(source, correlated(5, WIDTH, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    ["sparsify{sparsity=0.5}", "sparsify{sparsity=0.5,method=random}", "sparsify{sparsity=0.5,allocate=evolution}"],
)
def test_the_same_seed_gives_the_same_bytes(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_compiler.passes import shares

    monkeypatch.setattr(shares, "_GENERATIONS", 3)

    def made(threads: int | None, seed: int = 5) -> bytes:
        return bytes(compress(flags, threads=threads, seed=seed).proto().SerializeToString(deterministic=True))

    first = made(1)
    assert made(3) == first == made(None)
    if "random" in flags:
        assert made(1, 6) != first


def test_synthetic_samples_are_marked() -> None:
    done = compress(calib="synthetic")
    assert [note for note in done.report.notes if "synthetic noise (256 samples)" in note and "is of noise" in note]
    assert done.report.output_change is not None
    again = compress(calib="synthetic")
    assert again.proto().SerializeToString() == done.proto().SerializeToString()
    assert compress(calib="synthetic", seed=1).proto().SerializeToString() != done.proto().SerializeToString()


def test_without_samples_nothing_is_estimated() -> None:
    done = compress(calib=None)
    assert done.report.output_change is None
    assert not [note for note in done.report.notes if "calibrated" in note]
    assert {site.method for site in done.report.passes[0].sites} == {"magnitude"}


def test_without_passes_there_is_nothing_to_estimate() -> None:
    done = spa_compiler.compress(proto(), Recipe(), calib="data.npz")
    assert done.report.output_change is None
    assert done.report.passes == []


def test_a_few_samples_are_called_too_few() -> None:
    np.savez("few.npz", x=correlated(5, WIDTH, 0))
    done = compress(calib="few.npz")
    assert done.report.output_change > 0
    (warning,) = done.report.passes[0].warnings
    assert "4 of 4 layers saw fewer positions than they have inputs" in warning
    assert "4 for 16" in warning
    assert "times as many samples" in warning
    assert compress().report.passes[0].warnings == ()


def test_passes_follow_each_other() -> None:
    done = compress("sparsify{sparsity=0.3,targets=[a0]} sparsify{sparsity=0.5,targets=[b1],method=wanda}")
    assert [[site.node for site in step.sites] for step in done.report.passes] == [["a0"], ["b1"]]
    shares = [1 - np.count_nonzero(op.rows()) / op.rows().size for op in weighted_ops(done.model.graph)]
    np.testing.assert_allclose(shares, [0.3, 0, 0, 0.5], atol=0.01)


@pytest.mark.parametrize(
    ("flags", "times"),
    [
        ("sparsify{sparsity=0.3} sparsify{sparsity=0.5}", 1),  # zeros alone couple nothing anew
        ("prune-groups{channels=0.5} prune-groups{channels=0.5}", 2),
        ("prune-groups{channels=0.5} sparsify{sparsity=0.5}", 2),
    ],
)
def test_groups_are_those_of_the_model_as_each_pass_gets_it(
    flags: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = compression.analysis.analyze, []
    monkeypatch.setattr(compression.analysis, "analyze", lambda *args: seen.append(0) or real(*args))
    done = compress(flags, calib=None)
    assert len(seen) == times
    if flags.count("prune-groups") == 2:
        assert [step.got["channels"] for step in done.report.passes] == [pytest.approx(0.5, abs=0.05)] * 2
        hidden = [op.n for op in weighted_ops(done.model.graph) if op.name.startswith("a")]
        assert sum(hidden) < 0.4 * sum(op.n for op in weighted_ops(done.canonical.graph) if op.name.startswith("a"))


def test_progress_is_called() -> None:
    calls: list[tuple[str, int, int]] = []
    compress("sparsify{sparsity=0.5,method=sparsegpt}", progress=lambda *call: calls.append(call))
    names = [name for name, _, _ in calls]
    for stage in ("load", "read samples", "canonicalize", "analyze", "passes", "estimate"):
        assert (stage, 0, 1) in calls
        assert (stage, 1, 1) in calls
    assert "calibrating" in names
    assert names.index("read samples") < names.index("calibrating") < names.index("estimate")
    assert all(0 <= done <= total for _, done, total in calls)


def test_a_path_is_taken_as_well(here: Path) -> None:
    onnx.save(proto(), "net.onnx")
    by_path = spa_compiler.compress("net.onnx", from_flags("sparsify{sparsity=0.5}"), calib="data.npz")
    assert by_path.report.asked.source == "net.onnx"
    assert by_path.proto().SerializeToString() == compress().proto().SerializeToString()
    assert {path.name for path in here.iterdir()} == {"net.onnx", "data.npz"}


def test_bad_samples_are_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa_compiler.passes.sparsify import Sparsify

    monkeypatch.setattr(Sparsify, "run", lambda *_: pytest.fail("a pass ran"))
    np.savez("bad.npz", x=np.full((4, WIDTH), np.nan, np.float32))
    with pytest.raises(UsageError, match="sample 0 of 'x' holds NaN"):
        compress(calib="bad.npz")


def test_bad_options_are_refused_before_samples_are_read() -> None:
    with pytest.raises(UsageError, match="method=swap cannot exchange zeros"):
        compress("sparsify{sparsity=0.5,method=swap,pattern=block:3x2}", calib="missing.npz")
