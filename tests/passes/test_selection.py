"""The selection is the sorted order's prefix, without sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.passes.selection import keep_highest, keep_highest_with_floor
from spa_compiler.patterns import Block

SHAPES = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 6)), min_size=1, max_size=4)


def _sorted_answer(
    scores: list[np.ndarray], sizes: list[np.ndarray], sparsity: float
) -> tuple[list[np.ndarray], list[int]]:
    """The same by sorting, and the element counts of every prefix."""
    flat = np.concatenate([array.ravel() for array in scores])
    elements = np.concatenate([np.repeat(size, array.shape[1]) for size, array in zip(sizes, scores, strict=True)])
    order = np.argsort(flat, kind="stable")
    gone = np.concatenate([[0], elements[order].cumsum()])
    count = min(int(np.argmin(np.abs(gone - sparsity * gone[-1]))), len(order) - 1)
    keep = np.ones(len(flat), np.bool_)
    keep[order[:count]] = False
    parts = np.split(keep, np.cumsum([array.size for array in scores])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, scores, strict=True)], list(gone)


def _problem(shapes: list[tuple[int, int]], rows: int, levels: int, seed: int) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    # Few levels make ties; the scale spreads the scores over many exponents.
    weights = [rng.integers(0, levels, shape) * 10.0 ** rng.integers(-30, 30, shape) for shape in shapes]
    return [Block(rows).scores(weight) for weight in weights], [Block(rows).sizes(n) for n, _ in shapes]


@given(SHAPES, st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0, 1, exclude_max=True))
def test_equals_the_sorted_prefix(
    shapes: list[tuple[int, int]], rows: int, levels: int, seed: int, sparsity: float
) -> None:
    scores, sizes = _problem(shapes, rows, levels, seed)
    keeps = keep_highest(scores, sizes, sparsity)
    for keep, wanted in zip(keeps, _sorted_answer(scores, sizes, sparsity)[0], strict=True):
        np.testing.assert_array_equal(keep, wanted)


@pytest.mark.parametrize("rows, shape", [(4, (384, 384)), (4, (1536, 384)), (1, (384, 384)), (8, (40, 100))])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95])
def test_the_share_is_met_to_one_unit(rows: int, shape: tuple[int, int], sparsity: float) -> None:
    scores, sizes = _problem([shape], rows, 1000, 0)
    (keep,) = keep_highest(scores, sizes, sparsity)
    zeros = shape[0] * shape[1] - int(Block(rows).mask(keep, shape[0]).sum())
    assert abs(zeros - sparsity * shape[0] * shape[1]) <= rows / 2


def test_ties_go_by_position() -> None:
    first, second = keep_highest([np.ones((2, 3)), np.ones((1, 4))], [np.ones(2, int), np.ones(1, int)], 0.8)
    assert not first.any()
    np.testing.assert_array_equal(second, [[False, False, True, True]])


def test_something_always_stays() -> None:
    (keep,) = keep_highest([np.zeros((1, 2))], [np.full(1, 4)], 0.99)
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
        kept = int(np.count_nonzero(keep, axis=1) @ size)
        assert kept >= max(1, floor * n * k - rows)


def test_the_floor_protects_the_best_units_of_a_weak_weight() -> None:
    weak, strong = np.arange(1.0, 11).reshape(1, 10), np.arange(101.0, 111).reshape(1, 10)
    ones = [np.ones(1, np.int64)] * 2
    assert [int(keep.sum()) for keep in keep_highest([weak, strong], ones, 0.5)] == [0, 10]
    keeps = keep_highest_with_floor([weak, strong], ones, 0.5, 0.2)
    np.testing.assert_array_equal(keeps[0], weak >= 9)
    np.testing.assert_array_equal(keeps[1], strong >= 103)
