"""A probe says what rebuilding the model with other weights and running it would say."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.calibration.probe import Probe
from spa_compiler.calibration.samples import Samples
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import Feeds, open_model, run
from tests.networks import model_of


def layers(seed: int = 0) -> Model:
    """A Conv with two groups, a MatMul, a Gemm stored by outputs, and the MatMul's weight once more."""
    rng = np.random.default_rng(seed)
    given = {"c": (4, 2, 3, 3), "w": (4, 4), "g": (3, 4)}
    return model_of(
        """net (float[batch, 4, 5, 5] x) => (float[batch, 3] y, float[batch, 4] z) {
          a = Conv <group = 2, pads = [1, 1, 1, 1]> (x, c) r = Relu (a) p = GlobalAveragePool (r) f = Flatten (p)
          h = MatMul (f, w) t = Tanh (h) y = Gemm <transB = 1> (t, g) z = MatMul (t, w)
        }""",
        **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in given.items()},
    )


def feeds(count: int, batch: int = 4) -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((batch, 4, 5, 5)).astype(np.float32)} for _ in range(count)]


def samples(given: list[Feeds]) -> Samples:
    return Samples(lambda: iter(given), len(given))


def by_hand(changed: dict[int, np.ndarray], given: list[Feeds]) -> float:
    before, after = layers(), layers()
    ops = weighted_ops(after.graph)
    for site, rows in changed.items():
        values = ops[site].laid_out(rows)
        for op in ops:
            if op.weight.name == ops[site].weight.name:
                op.weight.values = values
    change = whole = 0.0
    for feed in given:
        was, now = (run(open_model(model), feed) for model in (before, after))
        change += sum(float(np.square(was[name].astype(float) - now[name]).sum()) for name in was)
        whole += sum(float(np.square(was[name].astype(float)).sum()) for name in was)
    return change / whole


@pytest.mark.parametrize("sites", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
def test_any_weights_can_be_changed(sites: list[int]) -> None:
    model, given = layers(), feeds(3)
    ops = weighted_ops(model.graph)
    probe = Probe(model, ops, samples(given), most=100, threads=1)
    rng = np.random.default_rng(2)
    changed = {site: ops[site].rows() * rng.random((ops[site].n, ops[site].k)) for site in sites}
    expected = by_hand(changed, given[:2])
    assert expected > 1e-4
    assert probe.change(changed) == pytest.approx(expected, rel=1e-4)
    assert probe.change({}) == 0  # nothing is left of what was asked before


def test_sites_with_one_weight_change_together() -> None:
    model, given = layers(), feeds(2)
    ops = weighted_ops(model.graph)
    shared = [site for site, op in enumerate(ops) if op.weight.name == "w"]
    probe = Probe(model, ops, samples(given), most=100, threads=1)
    one, other = (probe.change({site: np.eye(4)}) for site in shared)
    assert one == other > 0


def test_the_model_is_left_as_it_was() -> None:
    model = layers()
    before = [op.rows().copy() for op in weighted_ops(model.graph)]
    inputs = [tensor.name for tensor in model.graph.inputs]
    Probe(model, weighted_ops(model.graph), samples(feeds(2)), most=9, threads=1).change({1: np.zeros((4, 4))})
    for op, rows in zip(weighted_ops(model.graph), before, strict=True):
        np.testing.assert_array_equal(op.rows(), rows)
    assert [tensor.name for tensor in model.graph.inputs] == inputs


def test_held_out_samples_are_not_looked_at() -> None:
    model, given = layers(), feeds(9)
    probe = Probe(model, weighted_ops(model.graph), samples(given), most=1000, threads=1)
    assert probe.feeds == 8
    changed = {1: np.eye(4)}
    assert probe.change(changed) == pytest.approx(by_hand(changed, given[:7] + given[8:]), rel=1e-4)


@pytest.mark.parametrize("most, kept", [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_it_holds_no_more_than_it_may(most: int, kept: int) -> None:
    model = layers()
    assert Probe(model, weighted_ops(model.graph), samples(feeds(7)), most=most, threads=1).feeds == kept


def test_a_part_of_the_feeds() -> None:
    model, given = layers(), feeds(5)
    probe = Probe(model, weighted_ops(model.graph), samples(given), most=100, threads=1)
    changed = {1: np.eye(4)}
    assert probe.change(changed, 2) == pytest.approx(by_hand(changed, given[:2]), rel=1e-4)
    assert probe.change(changed, 2) != pytest.approx(probe.change(changed), rel=1e-4)


def test_padding_does_not_count() -> None:
    model = model_of(
        """g (float[batch, seq, 2] x, int64[batch, seq] mask) => (float[batch, seq, 2] y) {
          y = MatMul (x, w) unused = Cast <to = 1> (mask)
        }""",
        w=np.eye(2, dtype=np.float32),
    )
    x = np.array([[[1, 2], [100, 100]]], np.float32)
    feed = {"x": x, "mask": np.array([[1, 0]])}
    probe = Probe(model, weighted_ops(model.graph), samples([feed]), most=1, threads=1)
    assert probe.change({0: np.array([[1.0, 0], [0, 0]])}) == pytest.approx(4 / 5)


def test_half_precision() -> None:
    model = model_of(
        "g (float16[batch, 2] x) => (float16[batch, 2] y) { y = MatMul (x, w) }", w=np.eye(2, dtype=np.float16)
    )
    probe = Probe(model, weighted_ops(model.graph), samples([{"x": np.array([[3, 4]], np.float16)}]), most=1, threads=1)
    assert probe.change({0: np.diag([1.0, 0.5])}) == pytest.approx(4 / 25)


@pytest.mark.parametrize(("count", "asked"), [(1, [0]), (2, [0]), (3, [1]), (5, [1, 3])])
def test_half_of_the_feeds_are_every_second_one(count: int, asked: list[int]) -> None:
    """The last one is held out where there are several."""
    model, given = layers(), feeds(count)
    ops = weighted_ops(model.graph)
    changed = {1: ops[1].rows() * 0.5}
    everything = Samples(lambda: iter(given), len(given))
    probe = Probe(model, ops, everything, most=100, threads=1, half=True)
    assert probe.change(changed) == pytest.approx(by_hand(changed, [given[number] for number in asked]), rel=1e-5)
