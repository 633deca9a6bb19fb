"""Spectrum-preserving sparsification is right on average, keeps what is large, and follows the pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.patterns import parse
from spa_compiler.solvers.problem import Problem, Zeros
from spa_compiler.solvers.spectrum import spectrum


def layer(n: int, k: int, seed: int) -> Problem:
    weight = np.random.default_rng(seed).standard_t(3, size=(n, k))
    return Problem(weight, np.eye(k), np.zeros(k), 99)


@pytest.mark.parametrize("name", ["unstructured", "fan-in", "2:4", "block:2x1", "block:2x2", "channel"])
def test_the_mean_is_the_weight(name: str) -> None:
    problem, zeros = layer(4, 8, 1), Zeros(parse(name), 0.5)
    rng = np.random.default_rng(0)
    draws = np.stack([spectrum(problem, zeros, rng, np.inf).weight for _ in range(600)])
    spread = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - problem.weight) <= 5 * spread + 1e-12).all()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["unstructured", "fan-in", "2:4", "3:5", "block:4x1", "block:4x4", "channel"]),
    st.integers(1, 9),
    st.integers(1, 12),
    st.floats(0, 0.95),
    st.integers(0, 99),
)
def test_the_pattern_and_its_count(name: str, n: int, k: int, sparsity: float, seed: int) -> None:
    problem, zeros = layer(n, k, seed), Zeros(parse(name), sparsity)
    found = spectrum(problem, zeros, np.random.default_rng(seed))
    assert zeros.pattern.fits(found.weight)
    assert not found.weight[~found.mask].any()
    kept = found.weight[found.mask] / problem.weight[found.mask]
    assert (kept >= 1 - 1e-12).all()
    if not n % 4 and not k % 4:
        assert found.mask.sum() == zeros.choose(np.square(problem.weight)).sum()


def test_what_is_large_stays_as_it_is() -> None:
    problem = layer(8, 16, 2)
    problem.weight[2, 3] = -1e6
    found = spectrum(problem, Zeros(parse("unstructured"), 0.8), np.random.default_rng(0))
    assert found.weight[2, 3] == -1e6


def test_singular_values_come_nearer_than_by_uniform_sampling() -> None:
    problem, zeros = layer(32, 48, 3), Zeros(parse("unstructured"), 0.5)
    rng = np.random.default_rng(0)
    ours = np.mean(
        [np.linalg.norm(spectrum(problem, zeros, rng, np.inf).weight - problem.weight, 2) for _ in range(10)]
    )
    masks = [rng.random((32, 48)) < 0.5 for _ in range(10)]
    assert ours < np.mean(
        [np.linalg.norm(np.where(mask, problem.weight / 0.5, 0) - problem.weight, 2) for mask in masks]
    )


def test_one_seed_one_answer_and_zeros_stay_zeros() -> None:
    problem = layer(4, 6, 0)
    problem.weight[1] = 0.0
    one, again = (spectrum(problem, Zeros(parse("fan-in"), 0.5), np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one.weight, again.weight)
    other = spectrum(problem, Zeros(parse("fan-in"), 0.5), np.random.default_rng(8))
    assert (one.mask != other.mask).any()
    assert not one.weight[1].any()


@pytest.mark.parametrize("name", ["unstructured", "fan-in", "2:4", "block:2x2"])
def test_without_a_band_nothing_is_left_to_chance(name: str) -> None:
    problem, zeros = layer(6, 12, 4), Zeros(parse(name), 0.5)
    found = spectrum(problem, zeros, np.random.default_rng(0), 0.0)
    mask = zeros.choose(np.square(problem.weight))
    np.testing.assert_array_equal(found.weight, np.where(mask, problem.weight, 0))


def test_only_the_largest_take_part() -> None:
    problem, zeros = layer(1, 40, 5), Zeros(parse("unstructured"), 0.5)
    rng = np.random.default_rng(0)
    ever = np.any([spectrum(problem, zeros, rng, 0.25).mask for _ in range(300)], axis=0)
    np.testing.assert_array_equal(ever[0], np.abs(problem.weight[0]) >= np.sort(np.abs(problem.weight[0]))[15])
