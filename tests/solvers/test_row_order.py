"""Orders of outputs: planted blocks are found, small cases are as good as brute force, nothing gets worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.patterns import parse
from spa_compiler.solvers import row_order as row_order_module
from spa_compiler.solvers.row_order import Order, row_order


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


def test_what_makes_no_difference_stays_in_order() -> None:
    order = row_order(np.random.default_rng(1).gamma(0.3, size=(26, 9)), 4, 0.5)
    blocks = order[:24].reshape(6, 4)
    np.testing.assert_array_equal(blocks, np.sort(blocks, axis=1))
    np.testing.assert_array_equal(blocks[:, 0], np.sort(blocks[:, 0]))
    np.testing.assert_array_equal(order[24:], [24, 25])  # the short block
    assert order.tolist() != list(range(26))


def test_of_many_inputs_evenly_spread_ones_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores = rng.gamma(0.3, size=(16, 30))
    others = rng.gamma(0.3, size=(16, 30))
    others[:, ::3] = scores[:, ::3]
    assert row_order(scores, 4, 0.5).tolist() != row_order(others, 4, 0.5).tolist()
    monkeypatch.setattr("spa_compiler.solvers.row_order._VALUES", 16 * 10)
    assert row_order(scores, 4, 0.5).tolist() == row_order(others, 4, 0.5).tolist()


def test_what_an_exchange_promised_and_did_not_keep_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(203)
    scores = rng.gamma(0.3, size=(int(rng.integers(3, 8)) * 2, int(rng.integers(2, 9))))
    assert row_order(scores, 2, 0.5).tolist() == list(range(8))
    ends = starts_and_ends(monkeypatch, scores, 2)
    assert all(kept(scores[end], 2, 0.5) < kept(scores, 2, 0.5) - 0.1 for _, end in ends)


def starts_and_ends(monkeypatch: pytest.MonkeyPatch, scores: np.ndarray, rows: int) -> list[tuple[Order, Order]]:
    """The orders that the search starts from and where it ends."""
    seen = []
    exchanged = row_order_module._Search.exchanged

    def spy(search: row_order_module._Search, order: Order) -> Order:
        seen.append((order, exchanged(search, order)))
        return seen[-1][1]

    with monkeypatch.context() as patched:
        patched.setattr(row_order_module._Search, "exchanged", spy)
        row_order(scores, rows, 0.5)
    return seen


def test_either_start_may_end_better(monkeypatch: pytest.MonkeyPatch) -> None:
    better = set()
    for seed in range(20):
        scores = np.random.default_rng(seed).gamma(0.3, size=(12, 8))
        (first, one), (second, other) = starts_and_ends(monkeypatch, scores, 4)
        assert first.tolist() == list(range(12)) != second.tolist()
        ends = [kept(scores[end], 4, 0.5) for end in (one, other)]
        assert kept(scores[row_order(scores, 4, 0.5)], 4, 0.5) >= max(ends) - 1e-6
        better.add(int(np.argmax(ends)))
    assert better == {0, 1}
