"""Least squares on a support: against numpy's, whichever way it is computed."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers import least_squares
from spa_compiler.solvers.least_squares import conjugate_gradients, refit, shift
from spa_compiler.solvers.problem import Problem
from tests.layer_problems import correlated, damped, optimum

SEEDS = st.integers(0, 2**32 - 1)


def random_mask(problem: Problem, density: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(problem.weight.shape) < density


@pytest.mark.parametrize("direct", [0.0, np.inf], ids=["conjugate gradients", "direct"])
@given(st.integers(1, 9), st.integers(1, 24), st.floats(0, 1), st.sampled_from([0.001, 0.01, 1.0]), SEEDS)
@settings(max_examples=60, deadline=None)
def test_it_is_the_optimum_on_the_support(
    direct: float, n: int, k: int, density: float, damping: float, seed: int
) -> None:
    problem = correlated(n, k, seed)
    mask = random_mask(problem, density, seed)
    with patch.object(least_squares, "_DIRECT", direct):
        weight = refit(problem, mask, damping)
    assert not weight[~mask].any()
    np.testing.assert_allclose(weight, optimum(problem, mask, damping), atol=1e-8 if direct else 1e-4)


@given(st.integers(1, 9), st.integers(1, 24), SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_normal_equations_hold_and_other_weights_are_worse(n: int, k: int, seed: int) -> None:
    problem = damped(correlated(n, k, seed))
    rng = np.random.default_rng(seed)
    mask = random_mask(problem, 0.5, seed)
    weight = refit(problem, mask, 0.0)
    gradient = (weight - problem.weight) @ problem.gram
    np.testing.assert_allclose(gradient[mask], 0, atol=1e-9)
    assert problem.loss(weight) <= problem.loss(np.where(mask, problem.weight, 0)) + 1e-9
    assert problem.loss(weight) <= problem.loss(weight + np.where(mask, 0.01 * rng.standard_normal((n, k)), 0)) + 1e-9


def test_rows_with_equal_support_are_solved_together_and_alike() -> None:
    problem = correlated(8, 20, 0)
    mask = np.repeat(random_mask(problem, 0.4, 1)[:2], 4, axis=0)
    with patch.object(least_squares, "dposv", wraps=least_squares.dposv) as solver:
        weight = refit(problem, mask)
    assert solver.call_count == 2
    np.testing.assert_allclose(weight, optimum(problem, mask), atol=1e-9)


def test_everything_or_nothing_kept_needs_no_solution() -> None:
    problem = correlated(3, 5, 0)
    np.testing.assert_array_equal(refit(problem, np.ones((3, 5), bool)), problem.weight)
    np.testing.assert_array_equal(refit(problem, np.zeros((3, 5), bool)), 0)


def test_inputs_that_are_always_zero_and_uncorrelated_ones_change_nothing() -> None:
    problem = Problem(np.arange(1.0, 9).reshape(2, 4), np.diag([1.0, 0.0, 4.0, 0.0]), np.zeros(4), 10)
    mask = np.array([[True, True, False, False], [False, False, True, True]])
    np.testing.assert_allclose(refit(problem, mask), np.where(mask, problem.weight, 0))


def test_a_redundant_input_can_go_for_nothing() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 6))
    inputs[:, 5] = inputs[:, 0] - 2 * inputs[:, 3]
    weight = rng.standard_normal((4, 6))
    problem = Problem(weight, inputs.T @ inputs / 200, inputs.mean(0), 200)
    repaired = refit(problem, np.broadcast_to(np.arange(6) < 5, (4, 6)), 1e-9)
    expected = weight[:, :5].copy()
    expected[:, 0] += weight[:, 5]
    expected[:, 3] -= 2 * weight[:, 5]
    np.testing.assert_allclose(repaired[:, :5], expected, atol=1e-6)
    assert problem.error(repaired) < 1e-6


def test_a_singular_gram_matrix_needs_damping() -> None:
    problem = Problem(np.ones((1, 3)), np.ones((3, 3)), np.zeros(3), 1)
    mask = np.array([[True, True, False]])
    with pytest.raises(np.linalg.LinAlgError):
        refit(problem, mask, 0.0)
    np.testing.assert_allclose(refit(problem, mask, 1e-6) @ np.ones(3), 3, rtol=1e-5)


def test_conjugate_gradients_reach_their_tolerance_row_by_row() -> None:
    problem = correlated(50, 60, 3, decay=2.0)
    gram = problem.damped()
    mask = random_mask(problem, 0.5, 3)
    target = np.random.default_rng(4).standard_normal((50, 60)) * np.logspace(-6, 6, 50)[:, None]
    for tolerance in (1e-3, 1e-8):
        solution = conjugate_gradients(gram, np.linalg.inv(gram), mask, target, tolerance)
        left = np.where(mask, target - solution @ gram, 0)
        assert not solution[~mask].any()
        assert (np.linalg.norm(left, axis=1) <= 1.01 * tolerance * np.linalg.norm(target * mask, axis=1)).all()


def test_weight_and_shift_are_the_best_affine_repair() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)) + rng.standard_normal(6)
    weight = rng.standard_normal((3, 6))
    mean = inputs.mean(axis=0)
    problem = Problem(weight, np.cov(inputs.T, bias=True), mean, 300)
    mask = np.broadcast_to(np.arange(6) < 4, (3, 6))
    repaired = refit(problem, mask, 1e-12)
    columns = np.column_stack([inputs[:, :4], np.ones(300)])
    best = np.linalg.lstsq(columns, inputs @ weight.T)[0].T
    np.testing.assert_allclose(repaired[:, :4], best[:, :4], atol=1e-6)
    np.testing.assert_allclose(shift(problem, repaired), best[:, 4], atol=1e-6)
