"""LAMP against its definition by sorting everything at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers.allocation import lamp
from spa_compiler.solvers.allocation.lamp import layer_scores


def test_scores_by_hand() -> None:
    np.testing.assert_allclose(layer_scores(np.array([[4.0, 1.0], [2.0, 3.0]])), [0.1, 2 / 9, 3 / 7, 1])


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
def test_the_top_scores_1_the_order_stays_and_scale_does_not_matter(size: int, seed: int, scale: float) -> None:
    squares = np.random.default_rng(seed).normal(size=size) ** 2
    scores = layer_scores(squares)
    assert scores[-1] == 1
    assert (np.diff(scores) >= 0).all()
    np.testing.assert_allclose(layer_scores(scale * squares), scores, rtol=1e-12)


def test_a_layer_of_zeros_scores_0() -> None:
    assert layer_scores(np.zeros((3, 2))).tolist() == [0] * 6


@settings(deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_equals_one_threshold_on_all_scores(sizes: list[int], seed: int, percent: int) -> None:
    rng = np.random.default_rng(seed)
    squares = [np.exp(rng.normal(size=size) * rng.integers(1, 9)) for size in sizes]
    # A whole number of elements, and few enough that one element of every layer stays.
    count = min(percent * sum(sizes) // 100, sum(sizes) - len(sizes))
    share = lamp(squares.__getitem__, sizes, count / sum(sizes), max_sparsity=1.0)
    scores = [np.sort(square)[::-1] for square in squares]
    scores = [np.sort(score / score.cumsum()) for score in scores]
    threshold = np.sort(np.concatenate(scores))[count]
    np.testing.assert_allclose(share * sizes, [(score < threshold).sum() for score in scores], atol=1e-9)


def test_equal_layers_get_equal_shares() -> None:
    squares = np.random.default_rng(0).normal(size=(3, 40)) ** 2
    squares[1] = 1e6 * squares[0]
    share = lamp(squares.__getitem__, [40] * 3, 0.512)
    assert share[0] == pytest.approx(share[1], rel=1e-12)


def test_scale_does_not_matter_across_layers_and_a_flat_layer_keeps_more() -> None:
    rng = np.random.default_rng(1)
    flat, peaked = np.ones(1000) + 1e-3 * rng.random(1000), np.exp(4 * rng.normal(size=1000))
    share = lamp([flat, peaked].__getitem__, [1000, 1000], 0.6, max_sparsity=1.0)
    assert share[0] < 0.6 < share[1]
    np.testing.assert_allclose(
        lamp([1e-9 * flat, 1e9 * peaked].__getitem__, [1000, 1000], 0.6, max_sparsity=1.0), share
    )


def test_a_ceiling_hands_its_zeros_to_the_other_layers() -> None:
    squares = [np.exp(4 * np.random.default_rng(1).normal(size=1000)), np.ones(1000)]
    np.testing.assert_allclose(lamp(squares.__getitem__, [1000, 1000], 0.5, max_sparsity=0.6), [0.6, 0.4], rtol=1e-9)


def test_what_a_ceiling_hands_over_goes_by_the_threshold_of_the_others() -> None:
    rng = np.random.default_rng(1)
    squares = [np.exp(scale * rng.normal(size=1000)) for scale in (6, 3, 0.5)]
    share = lamp(squares.__getitem__, [1000] * 3, 0.5, max_sparsity=0.7)
    assert share[0] == pytest.approx(0.7)
    others = lamp(squares[1:].__getitem__, [1000] * 2, 0.4, max_sparsity=0.7)
    np.testing.assert_allclose(share[1:], others, atol=1e-3)
    assert share[1] > share[2] + 0.1


def test_units_of_a_pattern_stand_for_their_elements() -> None:
    squares = np.random.default_rng(2).normal(size=(2, 60)) ** 2
    assert np.array_equal(
        lamp(squares.__getitem__, [240, 240], 0.4, max_sparsity=0.9),
        lamp(squares.__getitem__, [60, 60], 0.4, max_sparsity=0.9),
    )
