"""What holds for all patterns, and their names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spa_compiler.errors import UsageError
from spa_compiler.patterns import Block, Channel, FanIn, NofM, Pattern, Unstructured, names, parse
from spa_compiler.patterns.channel import ALL_ROWS

N_M = st.integers(1, 9).flatmap(lambda m: st.integers(1, m).map(lambda n: NofM(n, m)))
FREE = st.one_of(
    st.just(Unstructured()),
    st.builds(Block, st.integers(1, 9), st.integers(1, 9)),
    st.builds(Channel, st.integers(1, 9)),
)
"""Patterns of which any set of units may go."""
PATTERNS = st.one_of(FREE, N_M, st.just(FanIn()))
SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30))
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    "text, rows, cols, sparsity",
    [
        ("unstructured", 1, 1, None),
        ("block:4x1", 4, 1, None),
        ("block:3x1", 3, 1, None),
        ("block:1x1", 1, 1, None),
        ("block:64x64", 64, 64, None),
        ("2:4", 1, 4, 0.5),
        ("1:1", 1, 1, 0.0),
        ("7:7", 1, 7, 0.0),
        ("8:64", 1, 64, 0.875),
        ("fan-in", 1, 1, None),
        ("channel", ALL_ROWS, 1, None),
    ],
)
def test_parse_and_name_are_inverse(text: str, rows: int, cols: int, sparsity: float | None) -> None:
    pattern = parse(text)
    assert (pattern.name, pattern.rows, pattern.cols, pattern.sparsity) == (text, rows, cols, sparsity)
    assert parse(pattern.name) == pattern
    assert hash(parse(pattern.name)) == hash(pattern)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "block",
        "block:4",
        "block:x1",
        "Unstructured",
        "block:-4x1",
        "block:4x",
        ":4",
        "2:",
        "2:4:8",
        " 2:4",
        "fan_in",
    ],
)
def test_unknown_patterns_list_what_exists(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert all(name in str(caught.value) for name in names())


@pytest.mark.parametrize(
    "text, message",
    [
        ("block:0x1", "block:0x1: a block cannot have 0 rows"),
        ("block:65x1", "R of block:RxC is 1 to 64"),
        ("block:999999999x1", "R of block:RxC is 1 to 64"),
        ("block:4x0", "block:4x0: a block cannot have 0 columns"),
        ("block:4x65", "C of block:RxC is 1 to 64"),
        ("5:4", "5:4: N of N:M is at most M"),
        ("0:4", "0:4: N of N:M is at least 1"),
        ("2:65", "2:65: M of N:M is 1 to 64"),
        ("0:0", "0:0: M of N:M is 1 to 64"),
    ],
)
def test_impossible_numbers_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_every_name_without_letters_for_numbers_parses() -> None:
    assert [parse(name).name for name in names() if not set("RCNM") & set(name)] == [
        "unstructured",
        "block:4x1",
        "2:4",
        "fan-in",
        "channel",
    ]


@given(PATTERNS, SHAPES, SEEDS, SHARES)
def test_a_chosen_mask_is_valid(pattern: Pattern, shape: tuple[int, int], seed: int, sparsity: float) -> None:
    importance, weight = _problem(shape, seed)
    mask = pattern.choose(importance, sparsity)
    assert mask.shape == shape
    assert mask.dtype == np.bool_
    assert mask.any()
    masked = np.where(mask, weight, 0)
    assert pattern.fits(masked)
    # Nothing that is stored is zero, as no zero was there before.
    assert pattern.fill(masked) == 1.0


@given(FREE, SHAPES, SEEDS, SHARES)
def test_the_share_is_met_to_half_a_unit(pattern: Pattern, shape: tuple[int, int], seed: int, sparsity: float) -> None:
    importance, _ = _problem(shape, seed)
    sizes = pattern.sizes(*shape)
    mask = pattern.choose(importance, sparsity)
    zeros = int(np.count_nonzero(~mask))
    off = abs(zeros - sparsity * mask.size)
    one_unit_left = np.count_nonzero(pattern.scores(mask)) == 1
    assert off <= sizes.max() / 2 or (one_unit_left and zeros < sparsity * mask.size)


@given(FREE, SHAPES, SEEDS, SHARES)
def test_what_stays_is_worth_no_less_than_what_goes(
    pattern: Pattern, shape: tuple[int, int], seed: int, sparsity: float
) -> None:
    importance, _ = _problem(shape, seed)
    scores = pattern.scores(importance)
    keep = pattern.select(scores, pattern.sizes(*shape), sparsity)
    assert keep.shape == scores.shape
    assert scores[keep].min() >= scores[~keep].max(initial=0)


@given(PATTERNS, SHAPES, SEEDS, SHARES, st.integers(1, 4))
def test_runs_of_columns_make_a_mask_of_the_whole(
    pattern: Pattern, shape: tuple[int, int], seed: int, sparsity: float, units: int
) -> None:
    importance, weight = _problem(shape, seed)
    width = units * pattern.cols
    masks = [pattern.choose(importance[:, at : at + width], sparsity) for at in range(0, shape[1], width)]
    mask = np.concatenate(masks, axis=1)
    assert mask.shape == shape
    assert pattern.fits(np.where(mask, weight, 0))
    if pattern.sparsity is not None:
        np.testing.assert_array_equal(mask, pattern.choose(importance, sparsity))


@given(PATTERNS, SHAPES, SHARES, SEEDS)
def test_of_equals_the_last_stay(pattern: Pattern, shape: tuple[int, int], sparsity: float, seed: int) -> None:
    sizes = pattern.sizes(*shape)
    levels = np.random.default_rng(seed).integers(0, 3, sizes.shape).astype(np.float64)
    keep = pattern.select(levels, sizes, sparsity)
    # A hair more for later units decides every tie the same way.
    later = np.arange(levels.size).reshape(levels.shape) / (2 * levels.size)
    np.testing.assert_array_equal(keep, pattern.select(levels + later, sizes, sparsity))
    np.testing.assert_array_equal(keep, pattern.select(levels, sizes, sparsity))


@given(FREE, SHAPES, SEEDS)
def test_a_mask_of_any_units_fits(pattern: Pattern, shape: tuple[int, int], seed: int) -> None:
    sizes = pattern.sizes(*shape)
    keep = np.random.default_rng(seed).random(sizes.shape) < 0.5
    mask = pattern.mask(keep, *shape)
    assert mask.shape == shape
    assert np.count_nonzero(mask) == sizes.sum(where=keep)
    weight = np.where(mask, _problem(shape, seed)[1], 0)
    assert pattern.fits(weight)
    assert pattern.fill(weight) == 1.0
    # Scores of the masked weight are zero exactly where the unit went, so the mask can be found again.
    np.testing.assert_array_equal(pattern.scores(np.abs(weight)) > 0, keep)


@given(PATTERNS, SHAPES, SEEDS)
def test_scores_are_means(pattern: Pattern, shape: tuple[int, int], seed: int) -> None:
    importance = _problem(shape, seed)[0].astype(np.float32)
    scores, sizes = pattern.scores(importance), pattern.sizes(*shape)
    assert scores.shape == sizes.shape
    assert scores.dtype == np.float64
    assert sizes.sum() == importance.size
    np.testing.assert_allclose((scores * sizes).sum(), importance.sum(dtype=np.float64), rtol=1e-12)
    for row, col in np.ndindex(*scores.shape):
        unit = np.zeros(scores.shape, np.bool_)
        unit[row, col] = True
        inside = importance[pattern.mask(unit, *shape)]
        assert len(inside) == sizes[row, col]
        np.testing.assert_allclose(scores[row, col], inside.mean(dtype=np.float64), rtol=1e-12)
        if row > 2:
            break  # enough: the whole would be quadratic


@given(PATTERNS, SHAPES, SEEDS, st.floats(0, 1))
def test_fill_is_a_share_and_agrees_with_fits(
    pattern: Pattern, shape: tuple[int, int], seed: int, density: float
) -> None:
    weight = np.where(np.random.default_rng(seed).random(shape) < density, _problem(shape, seed)[1], 0)
    assert 0 <= pattern.fill(weight) <= 1
    if not isinstance(pattern, NofM):  # its places are there whether or not they hold something
        assert pattern.fits(weight) == (pattern.fill(weight) == 1.0)


@given(PATTERNS, SHAPES, SHAPES)
def test_units_of_another_shape_are_refused(pattern: Pattern, shape: tuple[int, int], other: tuple[int, int]) -> None:
    units = pattern.sizes(*other).shape
    assume(units != pattern.sizes(*shape).shape)
    with pytest.raises(ValueError, match=f"{shape[0]} outputs and {shape[1]} inputs"):
        pattern.mask(np.ones(units, np.bool_), *shape)


@given(PATTERNS, SHAPES, SEEDS)
def test_nan_is_refused(pattern: Pattern, shape: tuple[int, int], seed: int) -> None:
    importance, _ = _problem(shape, seed)
    importance[seed % shape[0], seed % shape[1]] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        pattern.choose(importance, 0.5)


@given(PATTERNS, st.integers(1, 49))
def test_only_channels_ask_for_the_kernel(pattern: Pattern, kernel: int) -> None:
    assert pattern.on(kernel) == (Channel(kernel) if isinstance(pattern, Channel) else pattern)


def _problem(shape: tuple[int, int], seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Importance and a weight without zeros."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 1, shape), rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape)
