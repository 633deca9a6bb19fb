"""The selection is the sorted order's prefix, without sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.patterns import Block
from spa_compiler.patterns.selection import keep_highest, keep_highest_of_each, keep_highest_with_floor

SHAPES = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 6)), min_size=1, max_size=4)


def _sorted_answer(
    scores: list[np.ndarray], sizes: list[np.ndarray], sparsity: float
) -> tuple[list[np.ndarray], list[int]]:
    """The same by sorting, and the element counts of every prefix."""
    flat = np.concatenate([array.ravel() for array in scores])
    elements = np.concatenate([size.ravel() for size in sizes])
    order = np.argsort(flat, kind="stable")
    gone = np.concatenate([[0], elements[order].cumsum()])
    count = min(int(np.argmin(np.abs(gone - sparsity * gone[-1]))), len(order) - 1)
    keep = np.ones(len(flat), np.bool_)
    keep[order[:count]] = False
    parts = np.split(keep, np.cumsum([array.size for array in scores])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, scores, strict=True)], list(gone)


def _problem(shapes: list[tuple[int, int]], rows: int, levels: int, seed: int, cols: int = 1) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    # Few levels make ties; the scale spreads the scores over many exponents.
    weights = [rng.integers(0, levels, shape) * 10.0 ** rng.integers(-30, 30, shape) for shape in shapes]
    block = Block(rows, cols)
    return [block.scores(weight) for weight in weights], [block.sizes(n, k) for n, k in shapes]


@given(
    SHAPES,
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, -1]),
)
def test_equals_the_sorted_prefix(
    shapes: list[tuple[int, int]], block: tuple[int, int], levels: int, seed: int, sparsity: float, sign: int
) -> None:
    scores, sizes = _problem(shapes, block[0], levels, seed, block[1])
    if sign < 0:  # negative scores, and zeros of both signs, which are equal
        scores[0] = -scores[0]
    keeps = keep_highest(scores, sizes, sparsity)
    for keep, wanted in zip(keeps, _sorted_answer(scores, sizes, sparsity)[0], strict=True):
        np.testing.assert_array_equal(keep, wanted)


@pytest.mark.parametrize(
    "rows, cols, shape",
    [
        (4, 1, (384, 384)),
        (4, 1, (1536, 384)),
        (1, 1, (384, 384)),
        (8, 1, (40, 100)),
        (4, 4, (384, 200)),
        (16, 3, (90, 200)),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95])
def test_the_share_is_met_to_one_unit(rows: int, cols: int, shape: tuple[int, int], sparsity: float) -> None:
    scores, sizes = _problem([shape], rows, 1000, 0, cols)
    (keep,) = keep_highest(scores, sizes, sparsity)
    zeros = shape[0] * shape[1] - int(Block(rows, cols).mask(keep, *shape).sum())
    assert abs(zeros - sparsity * shape[0] * shape[1]) <= rows * cols / 2


def test_ties_go_by_position() -> None:
    first, second = keep_highest([np.ones((2, 3)), np.ones((1, 4))], [np.ones((2, 1), int), np.ones((1, 1), int)], 0.8)
    assert not first.any()
    np.testing.assert_array_equal(second, [[False, False, True, True]])


def test_halfway_between_two_shares_fewer_go() -> None:
    (keep,) = keep_highest([np.array([[1.0, 2.0]])], [np.full((1, 2), 2)], 0.25)
    assert keep.all()


def test_something_always_stays() -> None:
    (keep,) = keep_highest([np.zeros((1, 2))], [np.full((1, 2), 4)], 0.99)
    np.testing.assert_array_equal(keep, [[False, True]])


@given(SHAPES, st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0, 0.95), st.floats(0, 1))
def test_every_weight_keeps_its_floor(
    shapes: list[tuple[int, int]], rows: int, seed: int, sparsity: float, share: float
) -> None:
    scores, sizes = _problem(shapes, rows, 9, seed)
    scores[0] *= 1e-9
    floor = share * (1 - sparsity)
    keeps = keep_highest_with_floor(scores, sizes, sparsity, floor)
    for keep, size, (n, k) in zip(keeps, sizes, shapes, strict=True):
        kept = int(size.sum(where=keep))
        assert kept >= max(1, floor * n * k - rows)


def test_the_floor_protects_the_best_units_of_a_weak_weight() -> None:
    weak, strong = np.arange(1.0, 11).reshape(1, 10), np.arange(101.0, 111).reshape(1, 10)
    ones = [np.ones((1, 1), np.int64)] * 2
    assert [int(keep.sum()) for keep in keep_highest([weak, strong], ones, 0.5)] == [0, 10]
    keeps = keep_highest_with_floor([weak, strong], ones, 0.5, 0.2)
    np.testing.assert_array_equal(keeps[0], weak >= 9)
    np.testing.assert_array_equal(keeps[1], strong >= 103)


def test_sizes_broadcast() -> None:
    scores, _ = _problem([(20, 10)], 1, 50, 3)
    wide = [np.repeat(np.arange(1, 21)[:, None], 10, axis=1)]
    (narrow_keep,), (wide_keep,) = keep_highest(scores, [wide[0][:, :1]], 0.6), keep_highest(scores, wide, 0.6)
    np.testing.assert_array_equal(narrow_keep, wide_keep)


def test_zeros_of_both_signs_are_equal() -> None:
    (keep,) = keep_highest([np.array([[0.0, -0.0, 1.0, 2.0]])], [np.ones((1, 1), np.int64)], 0.4)
    np.testing.assert_array_equal(keep, [[False, False, True, True]])


def test_more_than_one_chunk_is_counted() -> None:
    scores = [np.random.default_rng(0).permutation(700 * 500).reshape(700, 500).astype(float)]
    (keep,) = keep_highest(scores, [np.ones((1, 1), np.int64)], 0.25)
    np.testing.assert_array_equal(keep, scores[0] >= 0.25 * scores[0].size)


def test_infinite_scores_are_highest_and_lowest() -> None:
    scores = np.array([[np.inf, -np.inf, 0.0, -1.0]])
    (keep,) = keep_highest([scores], [np.ones((1, 1), np.int64)], 0.5)
    np.testing.assert_array_equal(keep, [[True, False, True, False]])


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32 - 1), st.data())
def test_the_highest_of_each_row(rows: int, width: int, seed: int, data: st.DataObject) -> None:
    scores = np.random.default_rng(seed).integers(-3, 3, (rows, width)).astype(float)
    count = data.draw(st.integers(0, width))
    before = scores.copy()
    keep = keep_highest_of_each(scores, count)
    np.testing.assert_array_equal(scores, before)
    for row, stays in zip(scores, keep, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(stays), sorted(np.argsort(row, kind="stable")[width - count :]))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        keep_highest([np.array([[1.0, np.nan]])], [np.ones((1, 1), np.int64)], 0.5)
    with pytest.raises(ValueError, match="NaN"):
        keep_highest_of_each(np.array([[1.0, np.nan]]), 1)
