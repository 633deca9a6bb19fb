"""Layer after layer: who is solved when and with whom, shared weights, other types, and what is left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.layerwise import Job, leaders, rewrite
from tests.networks import model_of
from tests.passes.layered import F64, only, ridge, shaken, solving, values, whole, written
from tests.passes.tiny import bits, calibration, feed_forward, samples

SHARED = """g (float[batch, 12] x) => (float[batch, 12] y) {
  a = MatMul (x, w) r = Tanh (a) b = MatMul (r, w) s = Tanh (b) c = Gemm <transB = 1> (s, w) y = Tanh (c)
}"""


def test_a_shared_weight_is_solved_once_and_stays_one() -> None:
    w = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
    model = model_of(SHARED, w=w)
    ops = weighted_ops(model.graph)
    assert leaders(ops) == [0, 0, 2]  # the Gemm reads it the other way round
    seen: list[list[Job]] = []
    outcomes = rewrite(model, ops, calibration(), solving(only({0}, shaken), seen))
    assert [job.site for jobs in seen for job in jobs] == [0, 2]
    np.testing.assert_array_equal(outcomes[1].result.rows, outcomes[0].result.rows)
    assert outcomes[1].seconds == 0 < outcomes[0].seconds
    written(model, outcomes)
    first, second, third = (op.weight for op in weighted_ops(model.graph))
    assert first is second
    assert first is not third
    np.testing.assert_array_equal(third.values, outcomes[2].result.rows.astype(np.float32))


def test_what_leads_is_what_is_met_first() -> None:
    model = model_of(SHARED, w=np.eye(12, dtype=np.float32))
    ops = weighted_ops(model.graph)
    assert leaders([ops[1], ops[0]]) == [0, 0]
    assert leaders([ops[1], ops[0]], [1, 0]) == [1, 1]


@pytest.mark.parametrize("dtype, tolerance", [("float16", 0.02), ("double", 1e-3)])
def test_other_types(dtype: str, tolerance: float) -> None:
    kind = np.float16 if dtype == "float16" else np.float64
    rng = np.random.default_rng(1)
    arrays = {"u": (12, 16), "c": (16,), "v": (16, 12), "d": (12,)}

    def made() -> Model:
        return model_of(
            f"g ({dtype}[batch, 12] x) => ({dtype}[batch, 12] y) {{"
            " a = MatMul (x, u) p = Add (a, c) r = Relu (p) b = MatMul (r, v) y = Add (b, d) }",
            **{
                name: (0.3 * np.random.default_rng(7).standard_normal(shape)).astype(kind)
                for name, shape in arrays.items()
            },
        )

    given = samples(*({"x": rng.standard_normal((200, 12)).astype(kind)} for _ in range(3)))
    model, before = made(), made()
    seen: list[list[Job]] = []
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(only({0}, shaken), seen))
    after = written(model, outcomes)
    assert {op.rows().dtype for op in weighted_ops(after.graph)} == {np.dtype(kind)}
    dense, now = values(before, ["b", "y"], given), values(after, ["r", "y"], given)
    start = weighted_ops(before.graph)[1].rows().astype(np.float64)
    np.testing.assert_allclose(seen[1][0].problems[0].weight, ridge(now["r"], dense["b"], start, True), atol=tolerance)
    np.testing.assert_allclose(now["y"].mean(axis=0), dense["y"].mean(axis=0), atol=tolerance)


def test_sites_with_one_key_are_solved_in_one_call() -> None:
    model = model_of(
        "g (float[batch, 12] x) => (float[batch, 12] y) { q = MatMul (x, a) k = MatMul (x, b) v = MatMul (x, c)"
        " m = Mul (q, k) n = Mul (m, v) y = MatMul (n, d) }",
        **{name: np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32) for name in "abcd"},
    )
    seen: list[list[Job]] = []
    ops = weighted_ops(model.graph)
    outcomes = rewrite(
        model, ops, calibration(), solving(whole, seen), together=lambda site: "qv" if site in (0, 2) else site
    )
    assert sorted([job.site for job in jobs] for jobs in seen) == [[0, 2], [1], [3]]
    assert [outcome.result.form for outcome in outcomes] == [0, 1, 2, 3]
    assert outcomes[0].seconds == outcomes[2].seconds


def test_the_bits_do_not_depend_on_threads() -> None:
    results = []
    for threads in (1, 3):
        model = feed_forward(blocks=2)
        outcomes = rewrite(
            model, weighted_ops(model.graph), calibration(feeds=9), solving(only({0, 2}, shaken)), threads=threads
        )
        results.append(bits(written(model, outcomes)))
    assert results[0] == results[1]


def test_the_model_is_left_to_the_caller() -> None:
    model = feed_forward()
    before = bits(model)
    outcomes = rewrite(model, weighted_ops(model.graph), calibration(50), solving(shaken))
    assert bits(model) == before
    assert [outcome.positions for outcome in outcomes] == [100, 100]
    assert [outcome.result.error for outcome in outcomes] == [0.25, 0.25]


def test_nothing_is_left_on_disk_when_a_solver_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(job: Job) -> F64:
        assert list(tmp_path.iterdir())
        raise ZeroDivisionError

    model = feed_forward()
    with pytest.raises(ZeroDivisionError):
        rewrite(model, weighted_ops(model.graph), calibration(), solving(only({1}, fail)))
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_progress_goes_through_all_waves() -> None:
    calls: list[tuple[str, int, int]] = []
    model = feed_forward(blocks=2)
    rewrite(model, weighted_ops(model.graph), calibration(), solving(whole), progress=lambda *call: calls.append(call))
    assert [call[1:] for call in calls] == [(done, 4) for done in range(5)]
