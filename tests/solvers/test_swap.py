"""Exchanges: exact gains, a loss that never rises, patterns kept, the optimum where it can be known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.errors import UsageError
from spa_compiler.patterns import parse
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import Problem, Zeros
from spa_compiler.solvers.swap import swap
from tests.layer_problems import sampled

EXACT = 1e-6
"""A damping that changes no loss by more than rounding does, where samples abound."""


def damped_loss(problem: Problem, mask: np.ndarray, damping: float) -> float:
    change = refit(problem, mask, damping) - problem.weight
    return float(np.einsum("ij,ij->", change @ problem.damped(damping), change))


def best_of_all(problem: Problem, row: int, kept: int) -> float:
    """The least loss of one output with `kept` inputs."""
    alone = Problem(problem.weight[row : row + 1], problem.gram, problem.mean, problem.count)
    k = len(problem.gram)
    masks = (np.isin(np.arange(k), chosen)[None] for chosen in combinations(range(k), kept))
    return min(damped_loss(alone, mask, EXACT) for mask in masks)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["unstructured", "fan-in", "block:4x1", "block:3x1", "2:4", "1:5", "channel"]),
    st.integers(1, 9),
    st.integers(2, 14),
    st.floats(0.1, 0.9),
    st.integers(0, 999),
    st.sampled_from([1, 2, 5, 50]),
)
def test_the_loss_never_rises_and_the_pattern_stays(
    name: str, n: int, k: int, sparsity: float, seed: int, width: int
) -> None:
    problem, zeros = sampled(n, k, seed), Zeros(parse(name), sparsity)
    mask = zeros.choose(np.random.default_rng(seed).random((n, k)))
    before = mask.copy()
    found = swap(problem, mask, zeros, width=width)
    np.testing.assert_array_equal(mask, before)
    assert damped_loss(problem, found.mask, 0.01) <= damped_loss(problem, mask, 0.01) * (1 + 1e-9) + 1e-12
    np.testing.assert_array_equal(found.weight, refit(problem, found.mask, 0.01))
    np.testing.assert_array_equal(found.mask.sum(axis=1), mask.sum(axis=1))
    if zeros.pattern.sparsity is not None:
        groups = np.arange(0, k, zeros.pattern.cols)
        counts = [np.add.reduceat(each.astype(int), groups, axis=1) for each in (found.mask, mask)]
        np.testing.assert_array_equal(*counts)
    height = min(zeros.pattern.rows, n)
    for start in range(0, n, height):
        assert (found.mask[start : start + height] == found.mask[start]).all()


def test_what_is_found_is_better_by_far_than_a_random_mask() -> None:
    problem, zeros = sampled(6, 40, 3), Zeros(parse("fan-in"), 0.6)
    mask = zeros.choose(np.random.default_rng(0).random((6, 40)))
    found = swap(problem, mask, zeros, rounds=50)
    assert problem.loss(found.weight) < 0.5 * problem.loss(refit(problem, mask))


def test_every_round_starts_from_new_candidates() -> None:
    problem, zeros = sampled(6, 40, 3), Zeros(parse("fan-in"), 0.6)
    mask = zeros.choose(np.random.default_rng(0).random((6, 40)))
    losses = [
        damped_loss(problem, swap(problem, mask, zeros, rounds=rounds, width=2).mask, 0.01) for rounds in (1, 2, 4)
    ]
    assert losses[2] < 0.9 * losses[1] < 0.9 * 0.9 * losses[0]


def test_no_single_exchange_is_left_where_all_are_candidates() -> None:
    problem, zeros = sampled(3, 9, 5), Zeros(parse("fan-in"), 0.5)
    start = zeros.choose(np.random.default_rng(1).random((3, 9)))
    mask = swap(problem, start, zeros, rounds=50, damping=EXACT).mask
    least = damped_loss(problem, mask, EXACT)
    for row in range(3):
        for leave in np.flatnonzero(mask[row]):
            for enter in np.flatnonzero(~mask[row]):
                other = mask.copy()
                other[row, [leave, enter]] = False, True
                assert damped_loss(problem, other, EXACT) >= least * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_uncorrelated_inputs_give_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.1, 5, 30)
    problem = Problem(rng.normal(size=(8, 30)), np.diag(sizes), np.zeros(30), 999)
    zeros = Zeros(parse("fan-in"), 0.7)
    found = swap(problem, zeros.choose(rng.random((8, 30))), zeros, rounds=20)
    best = zeros.choose(np.square(problem.weight) * sizes)
    np.testing.assert_array_equal(found.mask, best)
    np.testing.assert_allclose(found.weight, np.where(best, problem.weight, 0), atol=1e-12)


def test_small_correlated_problems_mostly_reach_the_optimum() -> None:
    reached, rows = 0, 12
    for seed in range(rows):
        problem, zeros = sampled(1, 8, seed), Zeros(parse("fan-in"), 0.5)
        start = zeros.choose(np.random.default_rng(seed).random((1, 8)))
        loss = damped_loss(problem, swap(problem, start, zeros, damping=EXACT).mask, EXACT)
        best = best_of_all(problem, 0, 4)
        assert loss >= best * (1 - 1e-6)
        reached += loss <= best * (1 + 1e-6)
    assert reached >= rows // 2


def test_rows_of_a_block_move_together_to_the_least_sum() -> None:
    # Two outputs: input 0 matters little to either alone but most to both, so the pair must keep it.
    problem = Problem(np.array([[0.8, 1.0, 0.0], [0.8, 0.0, 1.0]]), np.eye(3), np.zeros(3), 99)
    zeros = Zeros(parse("block:2x1"), 2 / 3)
    mask = np.array([[False, True, False]] * 2)
    np.testing.assert_array_equal(swap(problem, mask, zeros).mask, [[True, False, False]] * 2)


def test_silent_inputs_make_way() -> None:
    gram = np.diag([0.0, 1.0, 1.0, 0.0])
    problem = Problem(np.array([[9.0, 0.1, 0.2, 9.0]]), gram, np.zeros(4), 99)
    found = swap(problem, np.array([[True, False, False, True]]), Zeros(parse("unstructured"), 0.5))
    np.testing.assert_array_equal(found.mask, [[False, True, True, False]])
    assert problem.loss(found.weight) == 0


def test_the_same_again_and_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, zeros = sampled(20, 30, 7), Zeros(parse("unstructured"), 0.6)
    mask = zeros.choose(np.random.default_rng(0).random((20, 30)))
    one, again = (swap(problem, mask, zeros) for _ in range(2))
    np.testing.assert_array_equal(one.mask, again.mask)
    np.testing.assert_array_equal(one.weight, again.weight)
    monkeypatch.setattr("spa_compiler.solvers.swap._BATCH", 3)
    np.testing.assert_array_equal(swap(problem, mask, zeros).mask, one.mask)


@pytest.mark.parametrize("mask", [np.ones((4, 6), bool), np.zeros((4, 6), bool)])
def test_nothing_to_exchange(mask: np.ndarray) -> None:
    problem = sampled(4, 6, 0)
    found = swap(problem, mask, Zeros(parse("unstructured"), 0.5))
    np.testing.assert_array_equal(found.mask, mask)


def test_fewer_samples_than_inputs() -> None:
    problem, zeros = sampled(4, 30, 2, samples=9), Zeros(parse("unstructured"), 0.5)
    mask = zeros.choose(np.random.default_rng(0).random((4, 30)))
    found = swap(problem, mask, zeros)
    assert np.isfinite(found.weight).all()
    assert damped_loss(problem, found.mask, 0.01) <= damped_loss(problem, mask, 0.01)


def test_wide_blocks_are_refused() -> None:
    problem = sampled(4, 8, 0)
    with pytest.raises(UsageError, match=r"block:4x4.*block:Rx1"):
        swap(problem, np.ones((4, 8), bool), Zeros(parse("block:4x4"), 0.5))
