"""The change of the outputs, against its definition, on what was held out and is no padding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spa_compiler.calibration.estimate import output_change, squares
from spa_compiler.calibration.samples import Samples
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds
from tests.networks import model_of

W = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
BODY = "float[batch, seq, 3] y, float[batch, 2] p, int64[batch, seq, 3] c"


def linear(w: np.ndarray) -> Model:
    """x W, the largest of each sample, and whole numbers that do not count."""
    return model_of(
        f"""g (float[batch, seq, 2] x, int64[batch, seq] mask) => ({BODY}) {{
          y = MatMul (x, w) p = ReduceMax <keepdims = 0> (x, one) c = Cast <to = 7> (y) unused = Cast <to = 1> (mask)
        }}""",
        w=w.astype(np.float32),
        one=np.array([1]),
    )


def feed(seed: int, size: float = 1.0, padded: int = 0) -> Feeds:
    mask = np.ones((2, 5), np.int64)
    mask[0, :padded] = 0
    x = np.random.default_rng(seed).standard_normal((2, 5, 2)) * size
    return {"x": x.astype(np.float32), "mask": mask}


def samples(*feeds: Feeds) -> Samples:
    return Samples(lambda: iter(feeds), len(feeds))


def by_hand(feeds: list[Feeds], after: np.ndarray, counts: Callable[[Feeds], np.ndarray]) -> float:
    change = whole = 0.0
    for each in feeds:
        x = each["x"].astype(np.float64)
        keep = counts(each)
        change += np.square((x @ after - x @ W)[keep]).sum()
        whole += np.square((x @ W)[keep]).sum() + np.square(x.max(axis=1)).sum()
    return float(np.sqrt(change / whole))


def everywhere(each: Feeds) -> np.ndarray:
    return np.ones((2, 5), bool)


def unmasked(each: Feeds) -> np.ndarray:
    return np.equal(each["mask"], 1)


def test_it_is_relative_and_over_what_is_held_out() -> None:
    feeds = [feed(number, size=1.0 + number) for number in range(17)]
    after = W * [1, -1, 2]
    got = output_change(linear(W), linear(after), samples(*feeds))
    assert got == pytest.approx(by_hand([feeds[7], feeds[15]], after, everywhere), rel=1e-5)
    assert got != pytest.approx(by_hand(feeds, after, everywhere), rel=1e-3)


def test_padding_does_not_count() -> None:
    feeds = [feed(0), feed(1, padded=3)]
    feeds[1]["x"][0, :3] = 1000
    after = W + 1
    # of the pooled output, which has no positions, all counts
    got = output_change(linear(W), linear(after), samples(*feeds))
    assert got == pytest.approx(by_hand(feeds[1:], after, unmasked), rel=1e-5)


def test_the_same_model_changes_nothing() -> None:
    assert output_change(linear(W), linear(W), samples(feed(0), feed(1))) == 0


def test_without_held_out_samples_nothing_is_known() -> None:
    assert output_change(linear(W), linear(2 * W), samples(feed(0))) is None


def test_outputs_that_are_always_zero_say_nothing() -> None:
    zeros = {"x": np.zeros((2, 5, 2), np.float32), "mask": np.ones((2, 5), np.int64)}
    assert output_change(linear(W), linear(2 * W), samples(zeros, zeros)) is None


def test_threads_do_not_change_it() -> None:
    one, three = (
        output_change(linear(W), linear(W + 1), samples(feed(0), feed(1)), threads=threads) for threads in (1, 3)
    )
    assert one == pytest.approx(three)


def test_squares_skip_what_cannot_be_compared() -> None:
    was = {"a": np.array([3.0, 4.0]), "ids": np.array([1, 2]), "other": np.ones(2), "list": [np.ones(2)]}
    now = {"a": np.array([3.0, 6.0]), "ids": np.array([3, 4]), "other": np.ones(3), "list": [np.zeros(2)]}
    assert squares(was, now, None) == (4.0, 25.0)  # type: ignore[arg-type]


def test_squares_of_half_precision_do_not_overflow() -> None:
    was, now = ({"a": np.array([value], np.float16)} for value in (300.0, -300.0))
    assert squares(was, now, None) == (360000.0, 90000.0)


def test_a_mask_of_another_shape_masks_nothing() -> None:
    was, now = {"a": np.ones((2, 3))}, {"a": np.zeros((2, 3))}
    assert squares(was, now, np.zeros((3, 2), bool)) == (6.0, 6.0)
    assert squares(was, now, np.array([[True, False, False], [False, False, True]])) == (2.0, 2.0)
    assert squares(was, now, np.array([True, False])) == (3.0, 3.0)
