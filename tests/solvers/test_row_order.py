"""Orders of outputs: planted blocks are found, small cases are as good as brute force, nothing gets worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.patterns import parse
from spa_compiler.solvers.row_order import row_order


def kept(scores: np.ndarray, rows: int, sparsity: float) -> float:
    """What the best blocks of consecutive outputs have together, by the pattern itself."""
    mask = parse(f"block:{rows}x1").choose(scores, sparsity)
    return float(scores[mask].sum())


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_planted_blocks_are_found(rows: int) -> None:
    rng = np.random.default_rng(0)
    need = rng.random((8, 40)) < 0.4  # what each block needs
    scores = np.repeat(need, rows, axis=0) * rng.uniform(1, 2, (8 * rows, 40)) + 0.01 * rng.random((8 * rows, 40))
    shuffled = scores[rng.permutation(len(scores))]
    share = 1 - need.mean()
    order = row_order(shuffled, rows, share)
    assert kept(shuffled, rows, share) < 0.9 * kept(scores, rows, share)
    assert kept(shuffled[order], rows, share) == pytest.approx(kept(scores, rows, share), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_near_the_best_of_all_orders(seed: int) -> None:
    scores = np.random.default_rng(seed).gamma(0.5, size=(6, 5))
    best = max(kept(scores[list(order)], 2, 0.5) for order in itertools.permutations(range(6)))
    assert kept(scores[row_order(scores, 2, 0.5)], 2, 0.5) >= 0.95 * best


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 21), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 2**32)
)
def test_a_permutation_that_keeps_no_less(n: int, k: int, rows: int, sparsity: float, seed: int) -> None:
    scores = np.random.default_rng(seed).gamma(0.3, size=(n, k))
    order = row_order(scores, rows, sparsity)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, row_order(scores, rows, sparsity))
    if n % rows == 0:  # a short block counts by its mean in the pattern, by its sum here
        assert kept(scores[order], rows, sparsity) >= kept(scores, rows, sparsity) * (1 - 1e-6)


def test_nothing_moves_where_nothing_can_gain() -> None:
    assert row_order(np.zeros((8, 4)), 4, 0.5).tolist() == list(range(8))
    assert row_order(np.ones((8, 4)), 4, 0.5).tolist() == list(range(8))
    assert row_order(np.random.default_rng(0).random((8, 4)), 1, 0.5).tolist() == list(range(8))
