"""Sparse + low rank: what was planted is found, and nothing is lost against either alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import spa_compiler.solvers.sparse_low_rank as sparse_low_rank_module
from spa_compiler.patterns import Pattern, parse
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import DAMPING, F64, Problem, Solution, Zeros
from spa_compiler.solvers.sparse_low_rank import heaviest, sparse_low_rank
from spa_compiler.solvers.svd import damped, whitened

ANY = parse("unstructured")


def gram(k: int, rng: np.random.Generator) -> F64:
    """Of correlated inputs whose sizes differ by a factor of three."""
    inputs = rng.normal(size=(20 * k, k)) @ (np.eye(k) + 0.4 * rng.normal(size=(k, k)) / np.sqrt(k))
    inputs *= np.logspace(0, 0.5, k)
    return np.asarray(inputs.T @ inputs / len(inputs))


def planted(n: int, k: int, rank: int, density: float, noise: float, seed: int) -> tuple[Problem, F64, F64]:
    """L + S + noise, L and S; an entry of S is some three times as large as one of L."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, k)) / np.sqrt(rank)
    sparse = np.where(rng.random((n, k)) < density, 3 * rng.choice([-1, 1], (n, k)) * rng.uniform(0.7, 1.5, (n, k)), 0)
    weight = low + sparse + noise * rng.normal(size=(n, k))
    return Problem(weight, gram(k, rng), np.zeros(k), 20 * k), low, sparse


def refitting(problem: Problem, zeros: Zeros) -> Solution:
    """The heaviest weights, then the best values for them: a strong sparse solver to compare with."""
    mask = heaviest(problem, zeros).mask
    return Solution(refit(problem, mask), mask)


def test_a_planted_sum_is_recovered() -> None:
    problem, low, sparse = planted(60, 50, 3, 0.05, 0.0, 0)
    share = np.count_nonzero(sparse) / sparse.size
    factors, solution = sparse_low_rank(problem, 3, Zeros(ANY, 1 - share), sweeps=30)
    assert problem.error(factors.weight + solution.weight) < 1e-4
    np.testing.assert_allclose(factors.weight, low, atol=1e-2)
    np.testing.assert_allclose(solution.weight, sparse, atol=1e-2)
    assert factors.rank == 3
    np.testing.assert_array_equal(solution.mask, sparse != 0)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1"])
def test_better_than_low_rank_alone_and_than_sparse_alone_at_the_same_count(pattern: str) -> None:
    n, k, rank = 64, 48, 4
    problem, _, _ = planted(n, k, rank, 0.08, 0.1, 1)
    if pattern != "unstructured":
        # The same, but what sticks out does so in four outputs at once.
        rng = np.random.default_rng(2)
        blocks = np.repeat(rng.random((n // 4, k)) < 0.08, 4, axis=0)
        low = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, k)) / 2
        problem = replace(problem, weight=low + np.where(blocks, 3 * rng.normal(size=(n, k)), 0))
    budget = rank * (n + k) + round(0.12 * n * k)
    factors, solution = sparse_low_rank(problem, rank, Zeros(parse(pattern), 0.88))
    assert rank * (n + k) + np.count_nonzero(solution.mask) <= budget + 4
    ours = problem.loss(factors.weight + solution.weight)
    assert ours < 0.5 * whitened(problem).tails[budget // (n + k)]
    alone = refitting(problem, Zeros(parse(pattern), 1 - budget / (n * k)))
    assert ours < 0.5 * problem.loss(alone.weight)


@pytest.mark.parametrize("solver", [heaviest, refitting])
def test_rank_never_hurts_a_sparse_answer(solver: object) -> None:
    # Gaussian weights have no low rank part worth the name: the worst case.
    rng = np.random.default_rng(3)
    problem = Problem(rng.normal(size=(30, 24)), gram(24, rng), np.zeros(24), 480)
    goal = replace(problem, gram=damped(problem.gram, DAMPING))
    zeros = Zeros(ANY, 0.7)
    assert callable(solver)
    alone = goal.loss(solver(problem, zeros).weight)
    for rank in (0, 1, 4):
        factors, solution = sparse_low_rank(problem, rank, zeros, solver)
        assert goal.loss(factors.weight + solution.weight) <= alone * (1 + 1e-9)


def test_the_better_of_two_starts_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    alternate = sparse_low_rank_module._alternate
    better = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        problem = Problem(rng.standard_t(3, size=(16, 12)), gram(12, rng), np.zeros(12), 240)
        seen: list[list[float]] = []

        def spy(*given: Any, seen: list[list[float]] = seen) -> Iterator[sparse_low_rank_module.Pair]:
            own: list[float] = []
            seen.append(own)
            for pair in alternate(*given):
                own.append(pair[0])
                yield pair

        monkeypatch.setattr(sparse_low_rank_module, "_alternate", spy)
        factors, solution = sparse_low_rank(problem, 2, Zeros(ANY, 0.7), refits=0)
        best = int(np.argmin([min(path[:3]) for path in seen]))
        assert [len(path) for path in seen] == [10 if path == best else 3 for path in (0, 1)]
        better.add(best)
        goal = replace(problem, gram=damped(problem.gram, DAMPING))
        assert goal.loss(factors.weight + solution.weight) == pytest.approx(min(map(min, seen)))
    assert better == {0, 1}


def test_a_solver_that_fails_on_what_is_left_costs_nothing() -> None:
    problem, _, _ = planted(20, 16, 2, 0.1, 0.1, 10)

    def moody(asked: Problem, zeros: Zeros) -> Solution:
        if np.array_equal(asked.weight, problem.weight):
            return heaviest(asked, zeros)
        return Solution(np.zeros_like(asked.weight), np.zeros(asked.weight.shape, np.bool_))

    zeros = Zeros(ANY, 0.5)
    factors, solution = sparse_low_rank(problem, 2, zeros, moody, refits=0)
    np.testing.assert_array_equal(solution.weight, heaviest(problem, zeros).weight)
    assert problem.loss(factors.weight + solution.weight) < problem.loss(solution.weight)


def test_refits_lower_the_loss_and_keep_the_support() -> None:
    problem, _, _ = planted(40, 40, 4, 0.1, 0.3, 4)
    goal = replace(problem, gram=damped(problem.gram, DAMPING))
    results = [sparse_low_rank(problem, 3, Zeros(ANY, 0.9), sweeps=4, refits=refits) for refits in range(4)]
    losses = [goal.loss(factors.weight + solution.weight) for factors, solution in results]
    assert losses[1] < 0.95 * losses[0]
    assert losses == sorted(losses, reverse=True)
    for _, solution in results:
        np.testing.assert_array_equal(solution.mask, results[0][1].mask)


def test_more_sweeps_are_never_worse_before_the_refit() -> None:
    problem, _, _ = planted(40, 40, 4, 0.1, 0.3, 5)
    goal = replace(problem, gram=damped(problem.gram, DAMPING))
    losses = []
    for sweeps in (3, 4, 6, 9):
        factors, solution = sparse_low_rank(problem, 4, Zeros(ANY, 0.9), sweeps=sweeps, refits=0)
        losses.append(goal.loss(factors.weight + solution.weight))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_step_ahead_comes_nearer_in_the_same_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    # No gap between what is spread out and what sticks out: plain alternation creeps.
    losses = []
    for ahead in (0.0, sparse_low_rank_module._AHEAD):
        monkeypatch.setattr(sparse_low_rank_module, "_AHEAD", ahead)
        total = 0.0
        for seed in range(4):
            rng = np.random.default_rng(seed)
            weight = rng.normal(size=(40, 40)) @ np.diag(0.85 ** np.arange(40.0)) @ rng.normal(size=(40, 40))
            weight += rng.standard_t(3, size=(40, 40))
            problem = Problem(weight, gram(40, rng), np.zeros(40), 800)
            factors, solution = sparse_low_rank(problem, 6, Zeros(ANY, 0.7), sweeps=8, refits=0, damping=0)
            total += problem.loss(factors.weight + solution.weight)
        losses.append(total)
    assert losses[1] < 0.97 * losses[0]


def test_l_and_s_are_optimal_given_each_other() -> None:
    problem, _, _ = planted(30, 20, 2, 0.1, 0.2, 6)
    factors, solution = sparse_low_rank(problem, 2, Zeros(ANY, 0.85), refits=400, damping=1e-3)
    metric = damped(problem.gram, 1e-3)
    slope = (factors.weight + solution.weight - problem.weight) @ metric
    scale = np.abs(problem.weight @ metric).max()
    assert np.abs(slope[solution.mask]).max() < 1e-2 * scale
    # Given S, no L of that rank does better: the factors are those of the whitened SVD of what is left.
    goal = replace(problem, gram=metric)
    left = whitened(replace(goal, weight=problem.weight - solution.weight))
    assert goal.loss(factors.weight + solution.weight) == pytest.approx(left.tails[2], rel=1e-9)


@pytest.mark.parametrize("name", ["unstructured", "block:4x1"])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (5, 8)])
def test_zeros_are_where_the_pattern_wants_them(name: str, shape: tuple[int, int]) -> None:
    pattern: Pattern = parse(name)
    rng = np.random.default_rng(7)
    problem = Problem(rng.normal(size=shape), gram(shape[1], rng), np.zeros(shape[1]), 20 * shape[1])
    factors, solution = sparse_low_rank(problem, 2, Zeros(pattern, 0.5))
    assert not solution.weight[~solution.mask].any()
    assert pattern.fits(solution.mask)
    assert abs(int(solution.mask.sum()) - solution.mask.size // 2) <= 4
    assert (factors.up.shape, factors.down.shape) == ((shape[0], 2), (2, shape[1]))


def test_few_samples_need_damping() -> None:
    rng = np.random.default_rng(8)
    inputs = rng.normal(size=(6, 16))
    inputs[:, 3] = 0  # and an input that is always 0
    problem = Problem(rng.normal(size=(12, 16)), inputs.T @ inputs / 6, inputs.mean(axis=0), 6)
    factors, solution = sparse_low_rank(problem, 1, Zeros(ANY, 0.5))
    weight = factors.weight + solution.weight
    assert np.isfinite(weight).all()
    assert problem.error(weight) < 0.2
    assert np.linalg.norm(weight) < 2 * np.linalg.norm(problem.weight)


def test_repeats_are_equal_and_the_problem_is_left_alone() -> None:
    problem, _, _ = planted(20, 16, 2, 0.1, 0.1, 9)
    weight, matrix = problem.weight.copy(), problem.gram.copy()
    first, second = (sparse_low_rank(problem, 2, Zeros(ANY, 0.8)) for _ in range(2))
    np.testing.assert_array_equal(first[0].weight, second[0].weight)
    np.testing.assert_array_equal(first[1].weight, second[1].weight)
    np.testing.assert_array_equal(problem.weight, weight)
    np.testing.assert_array_equal(problem.gram, matrix)


def test_no_sweep_is_refused() -> None:
    problem, _, _ = planted(8, 8, 1, 0.1, 0.1, 0)
    with pytest.raises(ValueError, match="one sweep"):
        sparse_low_rank(problem, 1, Zeros(ANY, 0.5), sweeps=0)
    with pytest.raises(ValueError, match="8 at most"):
        sparse_low_rank(problem, 9, Zeros(ANY, 0.5))
