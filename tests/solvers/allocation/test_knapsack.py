"""The knapsack against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation import exact


def _brute(levels: np.ndarray, errors: np.ndarray, sizes: np.ndarray, sparsity: float) -> float:
    target = sparsity * sizes.sum()
    return min(
        (
            errors[range(len(sizes)), choice].sum()
            for choice in itertools.product(range(len(levels)), repeat=len(sizes))
            if sizes @ levels[list(choice)] >= target - 1e-6
        ),
        default=np.inf,
    )


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 95))
def test_equals_brute_force(layers: int, count: int, seed: int, percent: int) -> None:
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.choice(11, count, replace=False)) / 10
    errors, sizes = rng.random((layers, count)), rng.integers(1, 30, layers)
    best = _brute(levels, errors, sizes, percent / 100)
    if np.isinf(best):
        with pytest.raises(BudgetError, match="at most"):
            exact(levels, errors, sizes, percent / 100)
        return
    # Cells of one thousandth of an element: nothing is rounded.
    choice = exact(levels, errors, sizes, percent / 100, resolution=10**6)
    assert errors[range(layers), choice].sum() == pytest.approx(best)
    assert sizes @ levels[choice] >= percent / 100 * sizes.sum() - 1e-6


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_brute_force_on_12_layers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels, errors, sizes = np.array([0.2, 0.9]), rng.random((12, 2)), 100 * rng.integers(1, 9, 12)
    choice = exact(levels, errors, sizes, 0.55)
    assert errors[range(12), choice].sum() == pytest.approx(_brute(levels, errors, sizes, 0.55))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 50))
def test_coarse_cells_keep_the_budget(seed: int, resolution: int) -> None:
    rng = np.random.default_rng(seed)
    levels, errors, sizes = np.array([0, 0.31, 0.64, 0.9]), rng.random((6, 4)), rng.integers(50, 5000, 6)
    choice = exact(levels, errors, sizes, 0.6, resolution=resolution)
    assert sizes @ levels[choice] >= 0.6 * sizes.sum() - 0.01


def test_forbidden_levels_are_not_taken() -> None:
    errors = [[0.0, 1.0, np.inf], [0.0, 5.0, 6.0]]
    assert exact([0.0, 0.5, 0.9], errors, [10, 10], 0.5) == [1, 1]
    with pytest.raises(BudgetError, match=r"at most 70.00%"):
        exact([0.0, 0.5, 0.9], errors, [10, 10], 0.8)


def test_the_least_sparse_of_equals() -> None:
    assert exact([0.0, 0.5, 0.9], np.zeros((2, 3)), [10, 10], 0.5) == [1, 1]


def test_a_real_size_is_quick_and_uses_little_more_than_asked() -> None:
    rng = np.random.default_rng(0)
    levels, sizes = np.arange(20) / 20, rng.choice([147_456, 589_824, 2_359_296], 72)
    choice = exact(levels, np.cumsum(rng.random((72, 20)), axis=1), sizes, 0.6)
    assert 0.6 <= sizes @ levels[choice] / sizes.sum() < 0.605
