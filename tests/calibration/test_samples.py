"""Samples: what does not fit is refused by name, the rest is batched, and each eighth feed is held out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.calibration import samples as module
from spa_compiler.calibration.samples import Samples, batched, load, padding_mask
from spa_compiler.calibration.shapes import Shapes
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds
from tests.networks import model_of

VOCABULARY = 10
SHAPES: Shapes = {"ids": (1, 4), "attention_mask": (1, 4), "x": (1, 3)}


def tokens() -> Model:
    """Two inputs of whole numbers, one of which indexes a table, and one of floats."""
    return model_of(
        """g (int64[batch, seq] ids, int64[batch, seq] attention_mask, float[batch, 3] x)
          => (float[batch, seq, 5] y, float[batch, 3] z) {
          e = Gather (table, ids) m = Cast <to = 1> (attention_mask) u = Unsqueeze (m, last) y = Mul (e, u)
          z = Relu (x)
        }""",
        table=np.arange(VOCABULARY * 5, dtype=np.float32).reshape(VOCABULARY, 5),
        last=np.array([-1]),
    )


def rows_of(width: int = 2, batch: str = "batch") -> Model:
    return model_of(f"g (float[{batch}, {width}] x) => (float[{batch}, {width}] y) {{ y = Relu (x) }}")


def arrays(count: int = 6) -> dict[str, np.ndarray]:
    """Every other sample has one padded position."""
    mask = np.ones((count, 4), np.int64)
    mask[::2, 3] = 0
    ids = np.arange(count * 4).reshape(count, 4) % VOCABULARY
    return {"ids": ids, "attention_mask": mask, "x": np.arange(count * 3, dtype=np.float32).reshape(count, 3)}


def stored(folder: Path, **changed: np.ndarray | None) -> str:
    """An .npz of samples; an array that is None is left out."""
    held = {name: array for name, array in (arrays() | changed).items() if array is not None}
    np.savez(folder / "d.npz", **held)
    return str(folder / "d.npz")


def with_value(name: str, value: float) -> np.ndarray:
    array = arrays()[name].copy()
    array[4, 1] = value
    return array


BAD: list[tuple[str, dict[str, np.ndarray | None], str]] = [
    ("an input is missing", {"x": None}, r"no array for input 'x', only \['attention_mask', 'ids'\]"),
    ("no input", {"ids": None, "x": None, "attention_mask": None, "z": np.zeros(3)}, r"none of the arrays \['z'\]"),
    ("floats for ids", {"ids": arrays()["ids"].astype(np.float32)}, "'ids' are float32, the input is int64"),
    ("ids for floats", {"x": arrays()["x"].astype(np.int32)}, "'x' are int32, the input is float32"),
    ("text", {"x": np.full((6, 3), "a")}, "'x' are <U1, the input is float32"),
    ("a rank", {"x": np.zeros((6, 1, 3), np.float32)}, r"'x' has shape \[1, 1, 3\], the input is \[batch, 3\]"),
    ("a fixed axis", {"x": np.zeros((6, 4), np.float32)}, r"'x' has shape \[1, 4\], the input is \[batch, 3\]"),
    ("a count", {"x": np.zeros((5, 3), np.float32)}, "disagree on how many samples there are"),
    ("a NaN", {"x": with_value("x", np.nan)}, "sample 4 of 'x' holds NaN or infinity"),
    ("an infinity", {"x": with_value("x", -np.inf)}, "sample 4 of 'x' holds NaN or infinity"),
    ("an id too large", {"ids": with_value("ids", VOCABULARY)}, "sample 4 of 'ids' holds 10, .* has 10 entries"),
    ("an id too small", {"ids": with_value("ids", -11)}, "sample 4 of 'ids' holds -11, .* has 10 entries"),
    ("no positions", {"ids": np.zeros((6, 0), int), "attention_mask": np.zeros((6, 0), int)}, "of 'ids' is empty"),
    ("no samples", {name: array[:0] for name, array in arrays().items()}, "it holds no samples"),
]


@pytest.mark.parametrize("changed, words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_does_not_fit_is_refused_with_the_first_mismatch(
    tmp_path: Path, changed: dict[str, np.ndarray | None], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(stored(tmp_path, **changed), tokens(), SHAPES, 0)
    assert caught.value.where == str(tmp_path / "d.npz")


@pytest.mark.parametrize("value", [0, VOCABULARY - 1, -VOCABULARY])
def test_every_id_of_the_table_is_fine(tmp_path: Path, value: int) -> None:
    assert load(stored(tmp_path, ids=with_value("ids", value)), tokens(), SHAPES, 0).rows == 6


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file or folder"):
        load(str(tmp_path / "missing.npz"), tokens(), SHAPES, 0)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"kind '\.csv' cannot be read"):
        load(str(tmp_path / "d.csv"), tokens(), SHAPES, 0)


FUNCTION = """
import numpy as np

def good(count=3):
    for number in range(count):
        yield {"x": np.full((5, 2), number, np.float32)}

def failing():
    yield from good(1)
    raise KeyError("train.arrow")

def poisoned():
    yield from good(2)
    yield {"x": np.full((5, 2), np.nan, np.float32)}

def nothing():
    yield from ()

def tuples():
    yield np.zeros((5, 2), np.float32),

calls = 0

def shrinking():
    global calls
    calls += 1
    return good(4 - calls)
"""


@pytest.mark.parametrize(
    "name, words",
    [
        ("failing", "the function failed: KeyError: 'train.arrow'"),
        ("poisoned", "sample 2 of 'x' holds NaN"),
        ("nothing", "it holds no samples"),
        ("tuples", "the function gave a tuple"),
        ("absent", "it has no function 'absent'"),
    ],
)
def test_functions_that_do_not_work(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "d.py").write_text(FUNCTION)
    with pytest.raises(UsageError, match=words) as caught:
        load(f"{tmp_path}/d.py:{name}", rows_of(), {"x": (1, 2)}, 0)
    assert caught.value.where == f"{tmp_path}/d.py:{name}"


def test_feeds_of_a_function_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(FUNCTION)
    given = load(f"{tmp_path}/d.py:good", rows_of(), {"x": (1, 2)}, 0)
    assert (given.count, given.rows, given.synthetic) == (3, 15, False)
    for _ in range(2):  # each call is a fresh pass
        assert [sample.feed["x"][:, 0].tolist() for sample in given.feeds()] == [[0] * 5, [1] * 5, [2] * 5]


def test_a_function_that_gives_less_the_second_time(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(FUNCTION)
    given = load(f"{tmp_path}/d.py:shrinking", rows_of(), {"x": (1, 2)}, 0)
    with pytest.raises(UsageError, match=r"there were 3 feeds of samples at first, and 2 when they were read again"):
        list(given.feeds())


# ---------------------------------------------------------------- batches


def test_samples_of_one_shape_run_together_and_none_is_lost(tmp_path: Path) -> None:
    given = load(stored(tmp_path, **arrays(48)), tokens(), SHAPES, 0)
    feeds = [sample.feed for sample in given.feeds()]
    assert given.rows == 48
    assert [feed["ids"].shape for feed in feeds] == [(6, 3)] * 4 + [(6, 4)] * 4  # the padded position is cut off
    expected = arrays(48)
    for several, start in ((feeds[:4], 0), (feeds[4:], 1)):
        np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in several]), expected["x"][start::2])
        ids = np.concatenate([feed["ids"] for feed in several])
        np.testing.assert_array_equal(ids, expected["ids"][start::2, : ids.shape[1]])
        assert all(feed["attention_mask"].all() for feed in several)


def test_batches_are_no_larger_than_that(tmp_path: Path) -> None:
    # Feeds are held out as a whole, so there are eight of them at least.
    for count, sizes in ((6, [1] * 6), (65, [8] * 8 + [1]), (300, [32] * 9 + [12]), (700, [32] * 21 + [28])):
        np.savez(tmp_path / "d.npz", x=np.arange(2 * count, dtype=np.float32).reshape(count, 2))
        given = load(str(tmp_path / "d.npz"), rows_of(), {"x": (1, 2)}, 0)
        assert [len(sample.feed["x"]) for sample in given.feeds()] == sizes
        assert (given.count, given.rows) == (len(sizes), count)
        together = np.concatenate([sample.feed["x"] for sample in given.feeds()])
        np.testing.assert_array_equal(together, np.arange(2 * count).reshape(count, 2))


def test_a_fixed_first_axis_takes_one_sample_at_a_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((9, 2), np.float32))
    given = load(str(tmp_path / "d.npz"), rows_of(batch="1"), {"x": (1, 2)}, 0)
    assert [len(sample.feed["x"]) for sample in given.feeds()] == [1] * 9


def test_looking_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more samples are taken from the source than a window holds, in number and in bytes."""
    taken = 0

    def endless(size: int) -> Iterator[Feeds]:
        nonlocal taken
        while True:
            taken += 1
            yield {"x": np.zeros((1, size), np.float32)}

    monkeypatch.setattr(module, "_AHEAD", 40)
    next(batched(endless(2), rows_of()))
    assert taken == 40
    taken = 0
    monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    assert len(next(batched(endless(100), rows_of()))["x"]) == 3
    assert taken == 3


# ---------------------------------------------------------------- held out


def feeds_of(count: int) -> Samples:
    def read() -> Iterator[Feeds]:
        return ({"x": np.full((1, 2), number, np.float32)} for number in range(count))

    return Samples(read, count)


@pytest.mark.parametrize(
    "count, held", [(1, []), (2, [1]), (7, [6]), (8, [7]), (9, [7]), (15, [7]), (16, [7, 15]), (25, [7, 15, 23])]
)
def test_each_eighth_feed_is_held_out(count: int, held: list[int]) -> None:
    assert [number for number, sample in enumerate(feeds_of(count).feeds()) if sample.held] == held
    assert [number for number in range(count) if feeds_of(count).holds_out(number)] == held


# ---------------------------------------------------------------- padding


def test_padding_is_where_the_mask_is_zero() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    for dtype in (np.int64, np.float32, np.bool_):
        got = padding_mask({"ids": np.zeros((2, 3)), "attention_Mask": mask.astype(dtype)})
        assert got is not None
        assert got.dtype == np.bool_
        np.testing.assert_array_equal(got, mask == 1)


@pytest.mark.parametrize(
    "feed",
    [
        {"attention_mask": np.ones((2, 3))},
        {"ids": np.zeros((2, 3))},
        {"mask": np.zeros((2, 1, 3))},
        {"mask": np.full((2, 3), "no")},
    ],
    ids=["masks nothing", "no mask", "rank 3", "text"],
)
def test_feeds_without_padding(feed: Feeds) -> None:
    assert padding_mask(feed) is None


def test_the_mask_comes_with_the_sample(tmp_path: Path) -> None:
    """Padding in front is not cut off; it is marked."""
    mask = np.ones((6, 4), np.int64)
    mask[:, 0] = 0
    for number, sample in enumerate(load(stored(tmp_path, attention_mask=mask), tokens(), SHAPES, 0).feeds()):
        np.testing.assert_array_equal(sample.mask, mask[number : number + 1] == 1)
