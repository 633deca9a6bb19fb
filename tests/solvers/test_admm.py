"""ADMM: the least squares of its mask, in every pattern, with clearly less loss than SparseGPT where inputs correlate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.patterns import parse
from spa_compiler.solvers.admm import admm
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import Problem, Zeros
from spa_compiler.solvers.sparsegpt import sparsegpt
from tests.layer_problems import correlated, damped, optimum, with_a_dead_input

PATTERNS = ["unstructured", "block:4x1", "block:3x2", "2:4", "1:4", "fan-in", "channel"]
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", PATTERNS)
@given(st.integers(1, 13), st.integers(1, 26), st.floats(0, 0.9), SEEDS)
@settings(max_examples=8, deadline=None)
def test_every_pattern_is_kept_and_its_share_met(name: str, n: int, k: int, sparsity: float, seed: int) -> None:
    problem = correlated(n, k, seed)
    zeros = Zeros(parse(name), sparsity)
    solution = admm(problem, zeros, steps=12)
    assert zeros.pattern.fits(np.where(solution.mask, 1.0, 0.0))
    assert not solution.weight[~solution.mask].any()
    at_once = np.count_nonzero(zeros.choose(np.abs(problem.weight)))
    assert abs(np.count_nonzero(solution.mask) - at_once) <= int(zeros.pattern.sizes(n, k).max())
    np.testing.assert_allclose(solution.weight, optimum(problem, solution.mask), atol=1e-8)
    np.testing.assert_array_equal(admm(problem, zeros, steps=12).weight, solution.weight)


@pytest.mark.parametrize(
    "name, share, gain",
    [("unstructured", 0.6, 0.95), ("unstructured", 0.8, 0.95), ("block:4x1", 0.5, 0.99), ("2:4", 0.5, 0.98)],
)
def test_it_has_less_loss_than_sparsegpt_with_a_refit(name: str, share: float, gain: float) -> None:
    problem = correlated(64, 128, 0)
    zeros = Zeros(parse(name), share)
    rival = sparsegpt(problem, zeros)
    loss = problem.loss(admm(problem, zeros).weight)
    assert loss < gain * problem.loss(refit(problem, rival.mask))
    assert loss < 0.93 * problem.loss(rival.weight)


@pytest.mark.parametrize("name", ["unstructured", "block:4x1", "2:4", "fan-in", "channel"])
def test_uncorrelated_inputs_leave_weights_alone_and_magnitude_times_norm_decides(name: str) -> None:
    rng = np.random.default_rng(4)
    problem = Problem(rng.standard_normal((8, 32)), np.diag(rng.uniform(0.1, 5, 32)), np.zeros(32), 1000)
    zeros = Zeros(parse(name), 0.5)
    solution = admm(problem, zeros)
    np.testing.assert_array_equal(solution.mask, zeros.choose(problem.weight**2 * np.diagonal(problem.damped())))
    np.testing.assert_allclose(solution.weight, np.where(solution.mask, problem.weight, 0), atol=1e-12)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_the_answer_is_not_worse_than_the_mask_it_started_from(seed: int) -> None:
    problem = damped(correlated(10, 16, seed))
    zeros = Zeros(parse("unstructured"), 0.6)
    start = sparsegpt(problem, zeros, damping=0.0).mask
    for steps in (1, 75):
        solution = admm(problem, zeros, damping=0.0, start=start, steps=steps)
        assert problem.loss(solution.weight) <= problem.loss(refit(problem, start, 0.0)) + 1e-12
    np.testing.assert_array_equal(admm(problem, zeros, damping=0.0, start=start, steps=1).mask, start)


def test_one_output_against_every_possibility() -> None:
    best, found = 0.0, 0.0
    every = np.array([[bit >> place & 1 for place in range(8)] for bit in range(256) if bit.bit_count() == 4], bool)
    for seed in range(12):
        problem = damped(correlated(1, 8, seed))
        losses = [problem.loss(optimum(problem, mask[None], 0.0)) for mask in every]
        loss = problem.loss(admm(problem, Zeros(parse("unstructured"), 0.5), damping=0.0).weight)
        assert loss >= min(losses) - 1e-9
        best, found = best + min(losses), found + loss
    assert found < 1.25 * best


def test_inputs_that_are_always_zero_go_first() -> None:
    solution = admm(with_a_dead_input(correlated(6, 12, 5)), Zeros(parse("unstructured"), 0.5))
    assert np.isfinite(solution.weight).all()
    assert not solution.mask[:, 3].any()


def test_a_singular_gram_matrix_with_damping() -> None:
    problem = Problem(np.arange(1.0, 7).reshape(2, 3), np.ones((3, 3)), np.ones(3), 1)
    solution = admm(problem, Zeros(parse("unstructured"), 0.5))
    assert problem.error(solution.weight) < 0.02
