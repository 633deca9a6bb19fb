"""Allocation by error: optimal on curves whose optimum is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from spa_compiler.solvers.allocation import by_error
from spa_compiler.solvers.allocation.error import between, curves


def _loss(share: np.ndarray, levels: np.ndarray, errors: np.ndarray) -> float:
    known, losses = curves(levels, errors)
    return sum(float(between(np.array([s]), row, loss)[0]) for s, row, loss in zip(share, known, losses, strict=True))


def test_exponential_curves_have_a_closed_form() -> None:
    """E_l = a_l exp(b s), equal sizes: the slopes a_l b exp(b s_l) are equal, so s_l = t - log(a_l) / b."""
    levels, scale, rate = np.linspace(0, 1, 6), np.array([1.0, 2.0, 4.0, 3.0]), 9.0
    share = by_error(levels, scale[:, None] * np.exp(rate * levels), [1000] * 4, 0.5)
    expected = 0.5 - (np.log(scale) - np.log(scale).mean()) / rate
    np.testing.assert_allclose(share, expected, atol=1 / 256)


def test_at_most_one_layer_is_off_its_curve() -> None:
    levels, scale = np.linspace(0, 0.9, 4), np.array([1.0, 2.0, 4.0, 3.0])
    share = by_error(levels, scale[:, None] * np.exp(9 * levels), [1000] * 4, 0.5)
    points = np.union1d(np.linspace(0, 0.9, 257), levels)
    off = np.abs(share[:, None] - points).min(axis=1)
    assert np.count_nonzero(off > 1e-9) == 1


def test_sizes_count() -> None:
    """The same curve in a layer of 4 times the size: a zero there costs a quarter, so log(4) / b more of them."""
    levels, rate = np.linspace(0, 1, 6), 8.0
    errors = np.tile(np.exp(rate * levels), (2, 1))
    share = by_error(levels, errors, [1000, 4000], 0.5)
    assert share[1] - share[0] == pytest.approx(np.log(4) / rate, abs=2 / 256)


def test_between_levels_errors_are_log_linear_and_cubic_from_0() -> None:
    levels, errors = curves([0.2, 0.4, 0.8], [[1.0, 4.0, 64.0]])
    at = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(between(at, levels[0], errors[0]), [0, 1 / 8, 1, 2, 4, 16, 64])


def test_errors_that_fall_are_made_not_to() -> None:
    assert curves([0.0, 0.5, 0.9], [[0.0, 3.0, 2.0]])[1].tolist() == [[0, 3, 3]]


@settings(deadline=None)
@given(st.integers(2, 4), st.integers(0, 2**32 - 1), st.floats(0.1, 0.85))
@example(4, 349408, 0.84375)  # a layer of 16 elements, of which one stays
def test_no_general_solver_does_better_on_convex_curves(layers: int, seed: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    levels = np.linspace(0, 0.95, 7)
    errors = rng.uniform(0.1, 5, (layers, 1)) * np.exp(rng.uniform(1, 9, (layers, 1)) * levels)
    sizes = rng.integers(10, 1000, layers)
    share = by_error(levels, errors, sizes, sparsity)
    start = np.full(layers, sparsity)
    other = minimize(
        _loss,
        start,
        (levels, errors),
        "SLSQP",
        bounds=[(0, min(0.95, 1 - 1 / size)) for size in sizes],
        constraints={"type": "eq", "fun": lambda s: sizes @ s / sizes.sum() - sparsity},
    )
    # The steps of the curve are 1/256: the loss is within the square of that of the optimum.
    assert _loss(share, levels, errors) <= _loss(other.x, levels, errors) * (1 + 1e-3)
    assert _loss(share, levels, errors) <= _loss(start, levels, errors) * (1 + 1e-9)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_at_most_one_step_above_the_best_grid_point(seed: int) -> None:
    """Any curves, also such that are not convex: the sum is below the best of all choices on a grid plus one layer."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.0, 0.3, 0.6, 0.9])
    errors = np.maximum.accumulate(np.c_[np.zeros(3), rng.random((3, 3))], axis=1)
    sizes = np.array([30, 30, 60])
    share = by_error(levels, errors, sizes, 0.45)
    best = min(
        errors[range(3), choice].sum()
        for choice in itertools.product(range(4), repeat=3)
        if sizes @ levels[list(choice)] >= 0.45 * 120 - 1e-9
    )
    assert _loss(share, levels, errors) <= best + errors.max()


def test_a_layer_without_error_goes_first_and_no_further_than_its_last_level() -> None:
    share = by_error([0.5, 0.9], [[0.0, 0.0], [1.0, 9.0]], [100, 100], 0.5)
    np.testing.assert_allclose(share, [0.9, 0.1], atol=1e-12)


def test_layers_may_have_levels_of_their_own() -> None:
    share = by_error([[0.5, 0.6], [0.7, 0.9]], [[1.0, 2.0], [0.0, 0.0]], [100, 100], 0.7)
    np.testing.assert_allclose(share, [0.5, 0.9], atol=1e-12)


@pytest.mark.parametrize(
    "levels, errors",
    [
        ([0.5, 0.4], [[1.0, 2.0]]),
        ([0.5, 1.4], [[1.0, 2.0]]),
        ([0.5, 0.6], [[1.0, -2.0]]),
        ([0.5, 0.6], [[1.0, float("nan")]]),
        ([[0.0, 0.6], [0.5, 0.6]], [[0.0, 1.0], [1.0, 2.0]]),
        ([0.5], [1.0]),
    ],
)
def test_what_is_no_curve_is_an_error(levels: list, errors: list) -> None:
    with pytest.raises(ValueError):
        by_error(levels, errors, [100] * len(errors), 0.3)
