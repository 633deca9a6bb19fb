"""Removal of channels: exact costs, exact repair, near the best set where all sets can be tried."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.patterns import parse
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.obs import channel_costs, remove_channels
from spa_compiler.solvers.problem import Problem, Zeros
from tests.layer_problems import correlated, damped, optimum

SEEDS = st.integers(0, 2**32 - 1)


def channels(sparsity: float, cols: int = 1) -> Zeros:
    return Zeros(parse("channel").on(cols), sparsity)


def without(problem: Problem, gone: list[int], cols: int = 1) -> np.ndarray:
    mask = np.ones(problem.weight.shape, bool)
    for channel in gone:
        mask[:, channel * cols : (channel + 1) * cols] = False
    return mask


@pytest.mark.parametrize("cols", [1, 3])
@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_a_channels_cost_is_the_loss_of_its_best_repair(cols: int, seed: int) -> None:
    problem = damped(correlated(5, 12, seed))
    costs = channel_costs(problem.weight, np.linalg.inv(problem.gram), cols)
    for channel, cost in enumerate(costs):
        best = optimum(problem, without(problem, [channel], cols), 0.0)
        assert cost == pytest.approx(problem.loss(best), rel=1e-6)


@pytest.mark.parametrize("cols", [1, 2])
@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_each_removal_is_the_cheapest_for_what_is_left(cols: int, seed: int) -> None:
    problem = damped(correlated(4, 12, seed))
    count = 12 // cols
    gone: list[int] = []
    for _ in range(count - 2):
        left = [channel for channel in range(count) if channel not in gone]
        losses = [problem.loss(optimum(problem, without(problem, [*gone, channel], cols), 0.0)) for channel in left]
        gone.append(left[int(np.argmin(losses))])
        solution = remove_channels(problem, channels(len(gone) / count, cols), damping=0.0)
        np.testing.assert_array_equal(solution.mask, without(problem, gone, cols))
        np.testing.assert_allclose(solution.weight, optimum(problem, solution.mask, 0.0), atol=1e-8)


def test_against_every_set() -> None:
    total = best = by_first_costs = 0.0
    for seed in range(6):
        problem = damped(correlated(4, 9, seed))
        losses = [problem.loss(refit(problem, without(problem, list(gone)), 0.0)) for gone in combinations(range(9), 4)]
        loss = problem.loss(remove_channels(problem, channels(4 / 9), damping=0.0).weight)
        assert loss >= min(losses) - 1e-9
        total, best = total + loss, best + min(losses)
        cheapest = np.argsort(channel_costs(problem.weight, np.linalg.inv(problem.gram), 1))[:4]
        by_first_costs += problem.loss(refit(problem, without(problem, cheapest.tolist()), 0.0))
    assert total < 1.1 * best
    assert total < by_first_costs


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_uncorrelated_inputs_go_by_magnitude_times_norm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = Problem(rng.standard_normal((6, 20)), np.diag(rng.uniform(0.1, 5, 20)), np.zeros(20), 1000)
    solution = remove_channels(problem, channels(0.5))
    importance = problem.weight**2 * np.diagonal(problem.damped())
    np.testing.assert_array_equal(solution.mask, channels(0.5).choose(importance))
    np.testing.assert_allclose(solution.weight, np.where(solution.mask, problem.weight, 0), atol=1e-12)


def test_a_redundant_channel_goes_first_and_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 10))
    inputs[:, 4] = inputs[:, 1] - inputs[:, 7]
    problem = Problem(rng.standard_normal((5, 10)), inputs.T @ inputs / 400, inputs.mean(0), 400)
    one = remove_channels(problem, channels(0.1), damping=1e-8)
    gone = np.flatnonzero(~one.mask[0])
    assert set(gone.tolist()) <= {1, 4, 7}
    assert problem.error(one.weight) < 1e-6
    # From then on, the two that are left of the three cost as much as others.
    two = remove_channels(problem, channels(0.2), damping=1e-8)
    assert problem.error(two.weight) > 0.1


def test_a_channel_that_nobody_reads_and_one_that_is_always_zero_go_first() -> None:
    problem = correlated(6, 12, 1)
    weight, gram = np.array(problem.weight), np.array(problem.gram)
    weight[:, 5] = 0
    gram[9], gram[:, 9] = 0, 0
    solution = remove_channels(Problem(weight, gram, problem.mean, 100), channels(2 / 12))
    np.testing.assert_array_equal(np.flatnonzero(~solution.mask[0]), [5, 9])
    np.testing.assert_allclose(solution.weight, np.where(solution.mask, weight, 0), atol=1e-9)


def test_only_whole_channels() -> None:
    problem = correlated(6, 12, 1)
    for zeros in (Zeros(parse("unstructured"), 0.5), Zeros(parse("block:4x1"), 0.5), channels(0.5, 5)):
        with pytest.raises(ValueError, match="whole channels"):
            remove_channels(problem, zeros)
