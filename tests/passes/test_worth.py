"""What outputs are worth to their readers, and that zeros go where they are worth little."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Stream, as_it_is
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.worth import Worth, readers
from spa_compiler.solvers.problem import F64
from tests.networks import model_of
from tests.passes.tiny import calibration, context, correlated, feed_forward, rows, samples, sparsify

BLOCK = """agraph (float[n, 8] x) => (float[n, 8] y) {
  h = MatMul (x, W) r = Relu (h) o = MatMul (r, V) s = Add (o, x) y = LayerNormalization (s, one)
}"""


def block(scale: np.ndarray | None = None, seed: int = 0) -> Model:
    """A feed-forward block of 12 hidden units, whose second weight has rows of these sizes."""
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((12, 8)) * (np.ones(12) if scale is None else scale)[:, None]
    up = rng.standard_normal((8, 12))
    return model_of(BLOCK, W=up.astype(np.float32), V=down.astype(np.float32), one=np.ones(8, np.float32))


def worth_of_outputs(model: Model, given: Samples) -> Mapping[int, F64]:
    """From moments of all that it asks for."""
    ops = weighted_ops(model.graph)
    worth = Worth(ops)
    missing = worth.missing
    for collected in as_it_is(model, [ops[site] for site in missing], given, threads=1):
        worth.see(missing[collected.site], collected.fit)
    assert not worth.missing
    return worth.of_outputs()


def test_hidden_units_have_a_reader_and_a_residual_stream_has_none() -> None:
    assert readers(weighted_ops(feed_forward(blocks=2).graph)) == {0: [1], 2: [3]}


def test_widths_that_do_not_fit_are_no_readers() -> None:
    text = "agraph (float[n, 4] x) => (float[n, 3] y) { h = MatMul (x, W) r = Mul (h, six) y = MatMul (r, V) }"
    ones = np.ones(6, np.float32)
    model = model_of(text, W=np.ones((4, 1), np.float32), V=np.ones((6, 3), np.float32), six=ones)
    assert readers(weighted_ops(model.graph)) == {}


def test_a_grouped_convolution_takes_no_part() -> None:
    text = """agraph (float[1, 4, 5, 5] x) => (float[1, 3, 5, 5] y) {
      h = Conv <group = 2> (x, W) r = Relu (h) y = Conv (r, V)
    }"""
    weights = {"W": np.ones((6, 2, 1, 1), np.float32), "V": np.ones((3, 6, 1, 1), np.float32)}
    ops = weighted_ops(model_of(text, **weights).graph)
    assert [op.group for op in ops] == [2, 1]
    assert readers(ops) == {}


def test_the_worth_is_that_of_the_definition() -> None:
    model = block()
    feeds = [{"x": correlated(50, 8, seed)} for seed in range(3)]
    ops = weighted_ops(model.graph)
    found = worth_of_outputs(model, samples(*feeds))
    assert set(found) == {0}
    x = np.concatenate([feed["x"] for feed in feeds[:-1]]).astype(np.float64)  # the last one is held out
    before = x @ ops[0].rows().T
    after = np.maximum(before, 0)
    want = np.square(ops[1].rows()).sum(axis=0) * after.var(axis=0) / before.var(axis=0)
    np.testing.assert_allclose(found[0], want / want.mean(), rtol=1e-4)


def test_several_readers_add_up() -> None:
    text = """agraph (float[n, 8] x) => (float[n, 4] y, float[n, 4] z) {
      h = MatMul (x, W) r = Relu (h) y = MatMul (r, V) z = MatMul (r, U)
    }"""
    rng = np.random.default_rng(0)
    w, v, u = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 6), (6, 4), (6, 4)))

    def worth(v: np.ndarray, u: np.ndarray) -> np.ndarray:
        model = model_of(text, W=w, V=v, U=u)
        return worth_of_outputs(model, samples({"x": correlated(64, 8, 0)}))[0]

    both = np.sqrt(np.square(v) + np.square(u))
    np.testing.assert_allclose(worth(v, u), worth(both, np.zeros_like(u)), rtol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x1"])
def test_outputs_that_nobody_reads_lose_their_weights_first(pattern: str) -> None:
    scale = np.where(np.arange(12) < 6, 1.0, 1e-3)
    model = block(scale)
    feeds = [{"x": correlated(200, 8, seed)} for seed in range(3)]
    change = sparsify(model, context(samples(*feeds)), sparsity=0.5, pattern=pattern, allocate="uniform")
    assert change.sites[0].density_after == 0.5
    zeros = (rows(model)[0] == 0).mean(axis=1)
    assert zeros[6:].min() == 1
    np.testing.assert_allclose(rows(model)[0][:6], rows(block(scale))[0][:6], rtol=1e-5)  # there was nothing to repair


@pytest.mark.parametrize("how", [{"method": "sparsegpt"}, {"pattern": "2:4"}, {"pattern": "fan-in"}])
def test_other_methods_and_patterns_within_outputs_do_not_look(
    how: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spa_compiler.passes.sparsify.Worth", lambda *_, **__: pytest.fail("it looked"))
    model = block(np.where(np.arange(12) < 6, 1.0, 1e-3))
    share = {} if how.get("pattern") == "2:4" else {"sparsity": 0.5}
    feeds = [{"x": correlated(200, 8, seed)} for seed in range(3)]
    sparsify(model, context(samples(*feeds)), allocate="uniform", **share, **how)
    assert (rows(model)[0] == 0).mean(axis=1)[6:].min() < 1


def test_a_reader_with_a_kernel_adds_up_its_positions() -> None:
    text = "agraph (float[n, 2, 6, 6] x) => (float[n, 3, 4, 4] y) { h = Conv (x, W) r = Relu (h) y = Conv (r, V) }"
    rng = np.random.default_rng(0)
    first = rng.standard_normal((4, 2, 1, 1)).astype(np.float32)
    second = rng.standard_normal((3, 4, 3, 3)).astype(np.float32)
    feed = rng.standard_normal((8, 2, 6, 6)).astype(np.float32)
    model = model_of(text, W=first, V=second)
    found = worth_of_outputs(model, samples({"x": feed}))
    before = np.einsum("nchw,oc->ohwn", feed, first[:, :, 0, 0]).astype(np.float64)
    after = np.maximum(before, 0)
    windows = [after[:, i : i + 4, j : j + 4].reshape(4, -1) for i in range(3) for j in range(3)]
    spread = np.stack([window.var(axis=1) for window in windows], axis=1)
    want = (np.square(second).sum(axis=0).reshape(4, 9) * spread).sum(axis=1) / before.reshape(4, -1).var(axis=1)
    np.testing.assert_allclose(found[0], want / want.mean(), rtol=1e-3)


def test_a_second_weight_of_zeros_leaves_everything_as_it_is() -> None:
    model = block(np.zeros(12))
    assert worth_of_outputs(model, calibration_of_8()) == {}


def calibration_of_8() -> Samples:
    return samples({"x": correlated(64, 8, 0)}, {"x": correlated(64, 8, 1)})


def test_without_data_there_is_no_worth() -> None:
    model = block(np.where(np.arange(12) < 6, 1.0, 1e-3))
    before = rows(model)
    sparsify(model, context(), sparsity=0.5)
    assert (rows(model)[0] == 0).mean(axis=1)[6:].min() < 1
    kept = rows(model)[0] != 0
    np.testing.assert_array_equal(rows(model)[0][kept], before[0][kept])


def test_the_result_does_not_depend_on_workers() -> None:
    results = []
    for workers in (1, 2):
        model = feed_forward(blocks=2)
        sparsify(model, context(calibration(), workers), sparsity=0.5)
        results.append([row.tobytes() for row in rows(model)])
    assert results[0] == results[1]


@pytest.mark.parametrize("allocate", ["error", "uniform"])
def test_moments_that_shares_had_made_are_not_made_again(allocate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Stream.__iter__
    monkeypatch.setattr(Stream, "__iter__", lambda self: made.append(len(self.sites)) or real(self))
    model = feed_forward(blocks=2)
    sparsify(model, context(calibration()), sparsity=0.5, allocate=allocate)
    assert made == [4, 4]  # as the model is, for shares or for worth; and once to solve


def test_worth_does_not_depend_on_who_had_the_moments_made(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Mapping[int, F64]] = []
    real = Worth.of_outputs
    monkeypatch.setattr(Worth, "of_outputs", lambda self: found.append(real(self)) or found[-1])
    for allocate in ("error", "uniform"):
        sparsify(feed_forward(blocks=2), context(calibration()), sparsity=0.5, allocate=allocate)
    assert set(found[0]) == set(found[1]) == {0, 2}
    for site, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][site])
        assert values.std() > 0.01
