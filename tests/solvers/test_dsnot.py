"""DSnoT: the mean change shrinks, counts and patterns stay, and the steps are the paper's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.criteria import wanda
from spa_compiler.errors import UsageError
from spa_compiler.patterns import parse
from spa_compiler.solvers.dsnot import dsnot
from spa_compiler.solvers.problem import Problem, Zeros


def layer(n: int, k: int, seed: int) -> Problem:
    """Inputs with means that matter."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(4 * k, k)) * rng.uniform(0.3, 2, k) + rng.normal(size=k)
    return Problem(rng.normal(size=(n, k)), inputs.T @ inputs / len(inputs), inputs.mean(axis=0), len(inputs))


def drift(problem: Problem, mask: np.ndarray) -> np.ndarray:
    """Mean change of each output."""
    return np.where(mask, 0, problem.weight) @ problem.mean


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["unstructured", "fan-in", "block:4x1", "block:3x1", "2:4", "1:5", "channel"]),
    st.integers(1, 9),
    st.integers(2, 20),
    st.floats(0.1, 0.9),
    st.integers(0, 999),
)
def test_the_mean_change_never_grows_and_the_pattern_stays(
    name: str, n: int, k: int, sparsity: float, seed: int
) -> None:
    problem, zeros = layer(n, k, seed), Zeros(parse(name), sparsity)
    mask = zeros.choose(wanda(problem.weight, problem.norms))
    before = mask.copy()
    found = dsnot(problem, mask, zeros)
    np.testing.assert_array_equal(mask, before)
    np.testing.assert_array_equal(found.sum(axis=1), mask.sum(axis=1))
    assert zeros.pattern.fits(np.where(found, 1.0, 0.0))
    height = min(zeros.pattern.rows, n)
    for start in range(0, n, height):
        rows = slice(start, start + height)
        assert np.square(drift(problem, found)[rows]).sum() <= np.square(drift(problem, mask)[rows]).sum() + 1e-12
    if zeros.pattern.sparsity is not None:
        groups = np.arange(0, k, zeros.pattern.cols)
        counts = [np.add.reduceat(each.astype(int), groups, axis=1) for each in (found, mask)]
        np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("name, share", [("unstructured", 0.2), ("block:4x1", 0.6), ("2:4", 0.4)])
def test_the_mean_change_shrinks_by_much(name: str, share: float) -> None:
    problem, zeros = layer(32, 64, 1), Zeros(parse(name), 0.5)
    mask = zeros.choose(wanda(problem.weight, problem.norms))
    before, after = (np.abs(drift(problem, each)).mean() for each in (mask, dsnot(problem, mask, zeros)))
    assert after < share * before


def test_one_step_by_hand() -> None:
    # e = 3 - 1 = 2. Growing input 0 (term 3, variance 1) gains most; of the kept terms -2, -0.5 and 4, both negative
    # ones would move e back, and the third is the cheaper one by Wanda. e = 3 - 1 - 3 - 0.5 = -1.5: nearer to 0.
    terms = np.array([3.0, -1.0, -2.0, -0.5, 4.0])
    mean = np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    problem = Problem(terms[None], np.eye(5) + np.outer(mean, mean), mean, 99)
    mask = np.array([[False, False, True, True, True]])
    found = dsnot(problem, mask, Zeros(parse("unstructured"), 0.4), cycles=1)
    np.testing.assert_array_equal(found, [[True, False, True, False, True]])


def test_variance_holds_growth_back() -> None:
    terms = np.array([3.0, 2.0, -0.1, -0.2])
    mean, variance = np.ones(4), np.array([9.0, 1.0, 1.0, 1.0])
    problem = Problem(terms[None], np.diag(variance) + np.outer(mean, mean), mean, 99)
    mask = np.array([[False, False, True, True]])
    zeros = Zeros(parse("unstructured"), 0.5)
    np.testing.assert_array_equal(dsnot(problem, mask, zeros, cycles=1, power=1.0), [[False, True, False, True]])
    np.testing.assert_array_equal(dsnot(problem, mask, zeros, cycles=1, power=0.0), [[True, False, False, True]])
    centred = Problem(terms[None], np.diag(variance), mean, 99, centred=True)
    np.testing.assert_array_equal(dsnot(centred, mask, zeros, cycles=1, power=1.0), [[False, True, False, True]])


def test_centred_inputs_leave_the_mask_alone() -> None:
    problem = layer(5, 12, 2)
    problem = Problem(problem.weight, problem.gram, np.zeros(12), problem.count)
    zeros = Zeros(parse("unstructured"), 0.5)
    mask = zeros.choose(np.square(problem.weight))
    np.testing.assert_array_equal(dsnot(problem, mask, zeros), mask)


def test_constant_inputs_divide_nothing_by_zero() -> None:
    mean = np.array([1.0, 0.0, 2.0, 0.0])
    problem = Problem(np.array([[1.0, 1.0, -1.0, 1.0]]), np.outer(mean, mean), mean, 1)
    mask = dsnot(problem, np.array([[False, False, True, True]]), Zeros(parse("unstructured"), 0.5))
    assert mask.sum() == 2


def test_a_constant_input_wins_by_what_it_cancels_alone() -> None:
    # It counts as noisy as the least noisy of the others: 1 is less than 3.
    terms, mean = np.array([1.0, 3.0, -0.5, -0.4]), np.ones(4)
    problem = Problem(terms[None], np.diag([0.0, 1.0, 1.0, 1.0]) + np.outer(mean, mean), mean, 99)
    mask = np.array([[False, False, True, True]])
    found = dsnot(problem, mask, Zeros(parse("unstructured"), 0.5), cycles=1)
    np.testing.assert_array_equal(found, [[False, True, True, False]])


def test_a_mean_change_far_below_the_noise_is_left_alone() -> None:
    mean = np.array([2e-4, 1e-4])
    mask, zeros = np.array([[False, True]]), Zeros(parse("unstructured"), 0.5)
    for noise, expected in ((1.0, [False, True]), (1e-8, [True, False])):
        problem = Problem(np.array([[1.0, -1.0]]), noise * np.eye(2) + np.outer(mean, mean), mean, 99)
        np.testing.assert_array_equal(dsnot(problem, mask, zeros), [expected])


def test_a_group_that_keeps_nothing_has_no_partner() -> None:
    # Growing input 1 would help most, but nothing in its group could go for it.
    terms, mean = np.array([1.0, 2.0, -0.5, -0.4]), np.ones(4)
    problem = Problem(terms[None], np.eye(4) + np.outer(mean, mean), mean, 99)
    found = dsnot(problem, np.array([[False, False, True, False]]), Zeros(parse("1:2"), 0.5))
    np.testing.assert_array_equal(found, [[False, False, False, True]])


def test_wide_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"block:4x4.*block:Rx1"):
        dsnot(layer(4, 8, 0), np.ones((4, 8), bool), Zeros(parse("block:4x4"), 0.5))
