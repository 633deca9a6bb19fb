"""Noise: its statistics, the same for the same seed, and within what the graph can take."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.calibration import samples, synthetic
from spa_compiler.calibration.shapes import Shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import open_model, run
from tests.networks import model_of


def images(batch: str = "batch") -> Model:
    return model_of(f"g (float[{batch}, 3, 16, 12] x) => (float[{batch}, 3, 16, 12] y) {{ y = Relu (x) }}")


def tokens() -> Model:
    return model_of(
        """g (int64[batch, seq] ids, int64[batch, seq] attention_mask, float[batch, 4, 1] v)
          => (float[batch, seq, 2] y, float[batch, 4, 1] w) {
          e = Gather (table, ids) m = Cast <to = 1> (attention_mask) u = Unsqueeze (m, last) y = Mul (e, u)
          w = Relu (v)
        }""",
        table=np.ones((7, 2), np.float32),
        last=np.array([-1]),
    )


TOKENS: Shapes = {"ids": (1, 9), "attention_mask": (1, 9), "v": (1, 4, 1)}


def all_of(model: Model, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    feeds = list(synthetic.feeds(model, shapes, seed))
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def test_images_have_mean_0_and_variance_1_per_channel_and_look_natural() -> None:
    x = all_of(images(), {"x": (1, 3, 16, 12)})["x"]
    assert x.shape == (256, 3, 16, 12)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.mean(axis=(2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(2, 3)), 1, atol=1e-5)
    # power falls with the square of the frequency, the same along both axes
    power = np.square(np.abs(np.fft.fft2(x))).mean(axis=(0, 1))
    radius = np.hypot(np.fft.fftfreq(16)[:, None], np.fft.fftfreq(12)[None, :])
    inner = radius > 0
    slope = np.polyfit(np.log(radius[inner]), np.log(power[inner]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
    # and it is noise: no two images are alike
    assert np.abs(np.corrcoef(x[:16, 0].reshape(16, -1)) - np.eye(16)).max() < 0.95


def test_other_floats_are_normal_and_whole_numbers_within_the_table() -> None:
    arrays = all_of(tokens(), TOKENS)
    assert arrays["ids"].shape == (256, 9)
    assert sorted(np.unique(arrays["ids"])) == list(range(7))
    assert (arrays["attention_mask"] == 1).all()
    assert abs(arrays["v"].mean()) < 0.1
    assert abs(arrays["v"].std() - 1) < 0.1


def test_the_model_runs_on_it() -> None:
    cases: list[tuple[Model, Shapes]] = [(images(), {"x": (1, 3, 16, 12)}), (tokens(), TOKENS)]
    for model, shapes in cases:
        session = open_model(model)
        for feed in synthetic.feeds(model, shapes, 3):
            assert all(np.isfinite(array).all() for array in run(session, feed).values())


def test_the_seed_decides() -> None:
    first, again, other = (all_of(images(), {"x": (1, 3, 16, 12)}, seed)["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first, other).any(axis=(1, 2, 3)).all()


def test_feeds_differ_from_each_other() -> None:
    first, second, *_ = synthetic.feeds(images(), {"x": (1, 3, 16, 12)}, 0)
    assert not np.array_equal(first["x"], second["x"])


@pytest.mark.parametrize("batch, size", [("batch", synthetic.BATCH), ("2", 2)])
def test_a_fixed_first_axis_stays(batch: str, size: int) -> None:
    feeds = list(synthetic.feeds(images(batch), {"x": (2, 3, 16, 12)}, 0))
    assert [feed["x"].shape for feed in feeds] == [(size, 3, 16, 12)] * synthetic.FEEDS


def test_inputs_with_first_axes_of_their_own_stay_too() -> None:
    model = model_of("g (float[a, 2] x, float[b, 2] z) => (float[a, 2] y, float[b, 2] w) { y = Relu (x) w = Relu (z) }")
    feed = next(synthetic.feeds(model, {"x": (3, 2), "z": (4, 2)}, 0))
    assert (feed["x"].shape, feed["z"].shape) == ((3, 2), (4, 2))


def test_as_samples_they_are_marked_and_partly_held_out() -> None:
    given = samples.load("synthetic", images(), {"x": (1, 3, 16, 12)}, 5)
    assert given.synthetic
    assert (given.count, given.rows) == (synthetic.FEEDS, synthetic.FEEDS * synthetic.BATCH)
    feeds = list(given.feeds())
    assert [sample.held for sample in feeds].count(True) == 2
    expected = all_of(images(), {"x": (1, 3, 16, 12)}, 5)["x"]
    np.testing.assert_array_equal(np.concatenate([sample.feed["x"] for sample in feeds]), expected)
