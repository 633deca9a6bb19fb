"""GPTQ: the optimum where that is known, near the best of all codes where they can be counted, better than nearest."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers import gptq as solver
from spa_compiler.solvers.four_bits import CODES, Grid, Steps, fit, nearest, rtn
from spa_compiler.solvers.gptq import gptq
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import F64, Problem
from tests.layer_problems import correlated, damped, sampled, with_a_dead_input

GRID = Grid(32)
SEEDS = st.integers(0, 2**32 - 1)


def grids_of(problem: Problem, grid: Grid = GRID) -> Steps:
    """The grids that GPTQ takes for a weight without zeros: an error counts what it costs if all behind it may adapt."""
    gram = problem.damped()
    order = np.argsort(-np.diagonal(gram), kind="stable")
    cost = np.empty(len(order))
    for place, column in enumerate(order):
        behind = order[place:]
        cost[column] = 1 / np.linalg.inv(gram[np.ix_(behind, behind)])[0, 0]
    return fit(problem.weight, grid, cost)


def test_uncorrelated_inputs_make_up_for_nothing() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(rng.standard_normal((8, 70)), np.diag(rng.uniform(0.1, 5, 70)), np.zeros(70), 1000)
    best = nearest(problem.weight, GRID, np.diagonal(problem.damped()))
    np.testing.assert_array_equal(gptq(problem, GRID), best)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_each_column_is_the_nearest_to_the_best_for_those_that_are_settled(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column by column, by solving for all columns that are open: what the recursion computes at once."""
    monkeypatch.setattr(solver, "_BLOCK", block)
    problem = correlated(5, 12, 1)
    gram, steps = problem.damped(), grids_of(problem)
    expected = problem.weight.copy()
    order = np.argsort(-np.diagonal(gram), kind="stable")
    for place, column in enumerate(order):
        done, open_ = order[:place], order[place:]
        moved = expected[:, done] - problem.weight[:, done]
        best = (
            problem.weight[:, open_]
            - np.linalg.solve(gram[np.ix_(open_, open_)], gram[np.ix_(open_, done)] @ moved.T).T
        )
        expected[:, column] = steps.nearest(best[:, 0], 0)
    np.testing.assert_array_equal(gptq(problem, GRID), expected)


def every_code(row: F64, gram: F64, steps: Steps, output: int) -> float:
    """The least loss of any codes for one output of three inputs."""
    scale, zero = steps.scale[output, 0], steps.zero[output, 0]
    codes = np.array(list(product(np.arange(CODES), repeat=len(row))), np.float64)
    off = (codes - zero) * scale - row
    return float(np.einsum("ij,jk,ik->i", off, gram, off).min())


def test_three_inputs_against_every_possibility() -> None:
    found = least = plain = 0.0
    for seed in range(10):
        problem = damped(correlated(6, 3, seed, decay=4))
        steps = grids_of(problem)
        best = np.array([every_code(row, problem.damped(), steps, i) for i, row in enumerate(problem.weight)])
        off = gptq(problem, GRID) - problem.weight
        losses = np.einsum("ij,jk,ik->i", off, problem.damped(), off)
        assert (losses >= best - 1e-12).all()
        off = np.stack([steps.nearest(column, 0) for column in problem.weight.T], axis=1) - problem.weight
        found, least = found + losses.sum(), least + best.sum()
        plain += float(np.einsum("ij,jk,ik->", off, problem.damped(), off))
    assert found < 1.25 * least
    assert plain > 1.3 * found


@pytest.mark.parametrize("grid", [Grid(32), Grid(64, symmetric=True), Grid(128)])
@pytest.mark.parametrize("make", [correlated, sampled])
def test_it_loses_less_than_the_nearest_values(make, grid: Grid) -> None:
    problem = make(24, 150, 3)
    assert problem.loss(gptq(problem, grid)) < 0.7 * problem.loss(rtn(problem, grid))


@given(st.integers(1, 12), st.integers(1, 70), st.floats(0, 1), st.booleans(), SEEDS)
@settings(max_examples=30, deadline=None)
def test_zeros_stay_and_values_are_on_grids(n: int, k: int, density: float, symmetric: bool, seed: int) -> None:
    problem, grid = correlated(n, k, seed), Grid(32, symmetric)
    mask = np.random.default_rng(seed).random((n, k)) < density
    found = gptq(problem, grid, mask)
    assert not found[~mask].any()
    np.testing.assert_array_equal(nearest(found, grid), found)
    np.testing.assert_array_equal(gptq(problem, grid, mask), found)


def test_a_sparse_weight_starts_from_the_best_values_for_its_zeros() -> None:
    problem = correlated(32, 128, 4)
    mask = np.abs(problem.weight) > 0.6
    best = refit(problem, mask)
    floor = problem.loss(best)
    lost = problem.loss(gptq(problem, GRID, mask)) - floor
    assert lost < 0.9 * (problem.loss(nearest(best, GRID)) - floor)
    assert lost < 0.5 * (problem.loss(np.where(mask, gptq(problem, GRID), 0.0)) - floor)


def test_a_weight_on_a_grid_stays() -> None:
    problem = correlated(6, 70, 5)
    on = nearest(problem.weight, GRID)
    same = Problem(on, problem.gram, problem.mean, problem.count)
    np.testing.assert_array_equal(gptq(same, GRID), on)
    np.testing.assert_array_equal(gptq(same, GRID, on != 0), on)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    problem = with_a_dead_input(correlated(6, 12, 5))
    found = gptq(problem, GRID)
    assert np.isfinite(found).all()
    alone = [i for i in range(12) if i != 3]
    rest = Problem(problem.weight[:, alone], problem.gram[np.ix_(alone, alone)], problem.mean[alone], problem.count)
    assert problem.error(found) < 1.5 * rest.error(gptq(rest, GRID))


def test_without_damping_a_singular_matrix_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        gptq(Problem(np.ones((2, 3)), np.ones((3, 3)), np.zeros(3), 1), GRID, damping=0.0)
