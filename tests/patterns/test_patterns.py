"""Patterns: what they allow, and what holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.errors import UsageError
from spa_compiler.patterns import Block, Pattern, Unstructured, names, parse

PATTERNS = st.one_of(st.just(Unstructured()), st.integers(1, 9).map(Block))
SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 12))
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("text, rows", [("unstructured", 1), ("block:4x1", 4), ("block:8x1", 8), ("block:3x1", 3)])
def test_parse_and_name_are_inverse(text: str, rows: int) -> None:
    pattern = parse(text)
    assert (pattern.name, pattern.rows) == (text, rows)
    assert parse(pattern.name) == pattern


@pytest.mark.parametrize("text", ["", "block", "block:4", "block:4x4", "block:x1", "2:4", "Unstructured", "block:-4x1"])
def test_unknown_patterns_list_what_exists(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert all(name in str(caught.value) for name in names())


@pytest.mark.parametrize("text", ["block:0x1", "block:65x1", "block:999999999x1"])
def test_impossible_block_heights(text: str) -> None:
    with pytest.raises(UsageError, match="1 to 64"):
        parse(text)


def test_a_block_is_consecutive_outputs_of_one_input() -> None:
    weight = np.array([[1, 0, 0], [2, 0, 0], [0, 3, 0], [0, 4, 0], [0, 0, 5]], np.float32)
    block = Block(2)
    assert block.fits(weight)
    assert block.fill(weight) == 1.0
    assert not block.fits(np.roll(weight, 1, axis=0))
    np.testing.assert_array_equal(block.sizes(5), [2, 2, 1])
    np.testing.assert_allclose(block.scores(weight), [[1.5, 0, 0], [0, 3.5, 0], [0, 0, 5]])
    keep = np.array([[True, False, False], [False, True, False], [False, False, True]])
    np.testing.assert_array_equal(block.mask(keep, 5), weight != 0)


def test_fill_is_nonzeros_over_stored() -> None:
    weight = np.zeros((8, 3), np.float32)
    weight[0, 0] = weight[4:, 1] = 1
    assert Block(4).fill(weight) == 5 / 8
    assert Block(8).fill(weight) == 5 / 16
    assert Unstructured().fill(weight) == 1.0
    assert Block(4).fill(np.zeros((4, 4))) == 1.0


@given(PATTERNS, SHAPES, SEEDS)
def test_a_masked_weight_fits(pattern: Pattern, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = shape
    groups = len(pattern.sizes(n))
    keep = rng.random((groups, k)) < 0.5
    mask = pattern.mask(keep, n)
    assert mask.shape == (n, k)
    assert np.count_nonzero(mask) == pattern.sizes(n) @ np.count_nonzero(keep, axis=1)
    weight = np.where(mask, rng.uniform(0.5, 1, (n, k)), 0)
    assert pattern.fits(weight)
    assert pattern.fill(weight) == 1.0
    # Scores of the masked weight are zero exactly where the unit went, so the mask can be found again.
    np.testing.assert_array_equal(pattern.mask(pattern.scores(weight) > 0, n), mask)


@given(PATTERNS, SHAPES, SEEDS, st.floats(0, 1))
def test_scores_are_means_and_fill_agrees_with_fits(
    pattern: Pattern, shape: tuple[int, int], seed: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    n, k = shape
    weight = np.where(rng.random((n, k)) < density, rng.uniform(0.5, 1, (n, k)), 0).astype(np.float32)
    scores, sizes = pattern.scores(weight), pattern.sizes(n)
    assert scores.shape == (len(sizes), k)
    assert sizes.sum() == n
    np.testing.assert_allclose(scores.T @ sizes, weight.sum(axis=0, dtype=np.float64), rtol=1e-12)
    assert 0 < pattern.fill(weight) <= 1
    assert pattern.fits(weight) == (pattern.fill(weight) == 1.0)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4)])
def test_a_mask_of_another_height_is_refused(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="9 outputs"):
        pattern.mask(np.ones((2, 3), np.bool_), 9)
