"""SparseGPT: exact where an exact answer is known, valid in every pattern, better than its rivals where it should be."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.patterns import parse
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import Problem, Zeros
from spa_compiler.solvers.sparsegpt import sparsegpt
from tests.layer_problems import correlated, damped, optimum, with_a_dead_input

PATTERNS = ["unstructured", "block:4x1", "block:3x2", "block:4x4", "2:4", "1:4", "4:8", "fan-in", "channel"]
SEEDS = st.integers(0, 2**32 - 1)
ANY = Zeros(parse("unstructured"), 0.0)


def given_mask(problem: Problem, mask: np.ndarray, ordered: bool = False) -> np.ndarray:
    return sparsegpt(problem, ANY, mask=mask, ordered=ordered).weight


@pytest.mark.parametrize("block", [1, 5, 64])
def test_the_first_columns_update_is_that_of_optimal_brain_surgeon(block: int) -> None:
    problem = correlated(6, 20, 0)
    inverse = np.linalg.inv(problem.damped())
    mask = np.ones((6, 20), bool)
    mask[:, 0] = False
    weight = sparsegpt(problem, ANY, mask=mask, ordered=False, block=block).weight
    expected = problem.weight - np.outer(problem.weight[:, 0] / inverse[0, 0], inverse[0])
    np.testing.assert_allclose(weight, expected, atol=1e-9)
    np.testing.assert_allclose(weight, optimum(problem, mask), atol=1e-9)


def test_only_later_columns_make_up_for_a_zero() -> None:
    problem = correlated(6, 20, 0)
    mask = np.ones((6, 20), bool)
    mask[:, 12:] = np.random.default_rng(0).random((6, 8)) < 0.5
    weight = given_mask(problem, mask)
    np.testing.assert_array_equal(weight[:, :12], problem.weight[:, :12])
    # What a single zero is made up by is the optimum among the columns after it.
    mask[:] = True
    mask[:, 12] = False
    tail = Problem(problem.weight[:, 12:], problem.damped()[12:, 12:], problem.mean[12:], 1)
    best = optimum(tail, mask[:, 12:], 0.0)
    np.testing.assert_allclose(given_mask(problem, mask)[:, 12:], best, atol=1e-9)


def test_a_mask_on_the_last_column_alone_has_nothing_to_repair_with() -> None:
    problem = correlated(4, 9, 0)
    mask = np.broadcast_to(np.arange(9) < 8, (4, 9))
    np.testing.assert_array_equal(given_mask(problem, mask), np.where(mask, problem.weight, 0))


def test_leading_columns_removed_from_all_outputs_give_the_optimum() -> None:
    problem = correlated(5, 16, 1)
    mask = np.broadcast_to(np.arange(16) >= 7, (5, 16))
    np.testing.assert_allclose(given_mask(problem, mask), optimum(problem, mask), atol=1e-9)


@pytest.mark.parametrize("name", PATTERNS)
@given(st.integers(1, 13), st.integers(1, 26), st.floats(0, 0.9), st.integers(1, 30), st.booleans(), SEEDS)
@settings(max_examples=12, deadline=None)
def test_every_pattern_is_kept_and_its_share_met(
    name: str, n: int, k: int, sparsity: float, block: int, ordered: bool, seed: int
) -> None:
    problem = correlated(n, k, seed)
    zeros = Zeros(parse(name), sparsity)
    solution = sparsegpt(problem, zeros, block=block, ordered=ordered)
    assert zeros.pattern.fits(np.where(solution.mask, 1.0, 0.0))
    assert not solution.weight[~solution.mask].any()
    # The share is that of a choice made at once, to half a unit: block by block nothing adds up.
    at_once = np.count_nonzero(zeros.choose(np.abs(problem.weight)))
    unit = int(zeros.pattern.sizes(n, k).max())
    assert abs(np.count_nonzero(solution.mask) - at_once) <= unit
    again = sparsegpt(problem, zeros, block=block, ordered=ordered)
    np.testing.assert_array_equal(again.weight, solution.weight)


def test_the_update_alone_gives_the_same_weights_for_the_same_mask() -> None:
    problem = correlated(16, 48, 2)
    zeros = Zeros(parse("unstructured"), 0.6)
    solution = sparsegpt(problem, zeros)
    alone = sparsegpt(problem, zeros, mask=solution.mask)
    np.testing.assert_array_equal(alone.mask, solution.mask)
    np.testing.assert_array_equal(alone.weight, solution.weight)


def test_blocks_of_one_row_are_unstructured() -> None:
    problem = correlated(12, 40, 3)
    one = sparsegpt(problem, Zeros(parse("block:1x1"), 0.5))
    np.testing.assert_array_equal(one.weight, sparsegpt(problem, Zeros(parse("unstructured"), 0.5)).weight)


@pytest.mark.parametrize("name", ["unstructured", "block:4x1", "channel"])
def test_uncorrelated_inputs_leave_weights_alone_and_magnitude_times_norm_decides(name: str) -> None:
    rng = np.random.default_rng(4)
    problem = Problem(rng.standard_normal((8, 30)), np.diag(rng.uniform(0.1, 5, 30)), np.zeros(30), 1000)
    zeros = Zeros(parse(name), 0.5)
    solution = sparsegpt(problem, zeros)
    np.testing.assert_array_equal(solution.mask, zeros.choose(problem.weight**2 * np.diagonal(problem.damped())))
    np.testing.assert_array_equal(solution.weight, np.where(solution.mask, problem.weight, 0))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    solution = sparsegpt(with_a_dead_input(correlated(6, 12, 5)), Zeros(parse("unstructured"), 0.5))
    assert np.isfinite(solution.weight).all()
    assert not solution.mask[:, 3].any()


@pytest.mark.parametrize("seed", range(5))
def test_two_of_four_against_every_possibility(seed: int) -> None:
    problem = damped(correlated(64, 4, seed))
    solution = sparsegpt(problem, Zeros(parse("2:4"), 0.0), damping=0.0)
    assert (solution.mask.sum(axis=1) == 2).all()
    every = np.array([np.isin(np.arange(4), chosen) for chosen in combinations(range(4), 2)])
    rows = [Problem(row[None], problem.gram, problem.mean, problem.count) for row in problem.weight]
    losses = np.array([[row.loss(optimum(row, mask[None], 0.0)) for mask in every] for row in rows])
    found = losses[np.arange(64), [int(np.flatnonzero((every == kept).all(axis=1))[0]) for kept in solution.mask]]
    assert (found >= losses.min(axis=1)).all()
    assert found.sum() < 1.3 * losses.min(axis=1).sum()
    assert found.sum() < 0.5 * losses.mean(axis=1).sum()
    assert found.sum() <= problem.loss(solution.weight) + 1e-9


@pytest.mark.parametrize("name, share", [("unstructured", 0.7), ("block:4x1", 0.5), ("2:4", 0.5), ("channel", 0.5)])
def test_it_beats_wanda_and_a_refit_improves_it_further(name: str, share: float) -> None:
    problem = correlated(64, 128, 6)
    zeros = Zeros(parse(name), share)
    solution = sparsegpt(problem, zeros)
    wanda = zeros.choose(problem.weight**2 * np.diagonal(problem.gram))
    assert problem.loss(solution.weight) < 0.75 * problem.loss(np.where(wanda, problem.weight, 0))
    assert problem.loss(refit(problem, solution.mask)) < problem.loss(solution.weight)
    assert problem.loss(refit(problem, solution.mask)) < 1.01 * problem.loss(refit(problem, wanda))


@pytest.mark.parametrize("name, share", [("unstructured", 0.7), ("block:4x1", 0.5), ("2:4", 0.5)])
def test_the_order_of_columns_pays(name: str, share: float) -> None:
    problem = correlated(64, 128, 7)
    zeros = Zeros(parse(name), share)
    assert problem.loss(sparsegpt(problem, zeros).weight) < problem.loss(
        sparsegpt(problem, zeros, ordered=False).weight
    )


def test_a_singular_gram_matrix_needs_damping() -> None:
    problem = Problem(np.ones((2, 3)), np.ones((3, 3)), np.zeros(3), 1)
    with pytest.raises(np.linalg.LinAlgError):
        sparsegpt(problem, Zeros(parse("unstructured"), 0.3), damping=0.0)
    assert np.isfinite(sparsegpt(problem, Zeros(parse("unstructured"), 0.3)).weight).all()
