"""Low rank by singular values: optimal in its norm, three ways to compute it, and what happens off the data."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers.problem import F64, Problem
from spa_compiler.solvers.svd import Decomposition, Factors, damped, decompose, plain, split_rows, whitened

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def problem(n: int, k: int, samples: int, seed: int) -> tuple[Problem, F64]:
    """A random layer whose inputs are correlated and differ in size, and its inputs `[samples, k]`."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, k)) @ rng.normal(size=(k, k)) * np.logspace(0, 1, k)
    gram = inputs.T @ inputs / samples
    return Problem(rng.normal(size=(n, k)), gram, inputs.mean(axis=0), samples), inputs


def cholesky_form(given: Problem, rank: int) -> F64:
    """W_r = U_r s_r V_r^T S^-1 with G = S S^T, S lower triangular."""
    root = scipy.linalg.cholesky(given.gram, lower=True)
    u, s, vt = scipy.linalg.svd(given.weight @ root, full_matrices=False)
    right = scipy.linalg.solve_triangular(root, vt[:rank].T, lower=True, trans="T").T
    return np.asarray(u[:, :rank] * s[:rank] @ right)


def eigen_form(given: Problem, rank: int) -> F64:
    """The same with S = Q L^(1/2) and its pseudo-inverse."""
    values, vectors = scipy.linalg.eigh(given.gram)
    roots = np.sqrt(np.maximum(values, 0))
    inverse = np.divide(1, roots, out=np.zeros_like(roots), where=values > 1e-10 * values[-1])
    u, s, vt = scipy.linalg.svd(given.weight @ (vectors * roots), full_matrices=False)
    return np.asarray(u[:, :rank] * s[:rank] @ (vt[:rank] * inverse) @ vectors.T)


@given(SHAPES, st.integers(1, 30), SEEDS)
@settings(deadline=None)
def test_three_forms_give_the_same_outputs_and_the_error_of_the_tail(
    shape: tuple[int, int], samples: int, seed: int
) -> None:
    given, inputs = problem(*shape, samples, seed)
    found = whitened(given)
    singular = scipy.linalg.svdvals(inputs @ given.weight.T)
    whole = given.loss(np.zeros_like(given.weight))
    for rank in range(min(shape) + 1):
        weight = found.truncate(rank).weight
        tail = float(np.square(singular[rank:]).sum()) / samples
        assert given.loss(weight) == pytest.approx(tail, rel=1e-6, abs=1e-10 * whole)
        assert found.tails[rank] == pytest.approx(tail, rel=1e-6, abs=1e-10 * whole)
        # Where two singular values are nearly equal, either direction is an answer: compare outputs where they aren't.
        if 0 < rank < singular.size and singular[rank] > 0.98 * singular[rank - 1]:
            continue
        outputs = inputs @ weight.T
        size = np.abs(inputs @ given.weight.T).max()
        np.testing.assert_allclose(outputs, inputs @ eigen_form(given, rank).T, atol=1e-5 * size)
        if samples >= 3 * shape[1]:
            np.testing.assert_allclose(outputs, inputs @ cholesky_form(given, rank).T, atol=1e-5 * size)


@given(SHAPES, SEEDS)
@settings(deadline=None)
def test_plain_is_the_truncated_svd_and_balanced(shape: tuple[int, int], seed: int) -> None:
    given, _ = problem(*shape, 20, seed)
    found = plain(given)
    s = scipy.linalg.svdvals(given.weight)
    for rank in range(min(shape) + 1):
        factors = found.truncate(rank)
        assert factors.rank == rank
        assert np.square(given.weight - factors.weight).sum() == pytest.approx(
            np.square(s[rank:]).sum(), rel=1e-6, abs=1e-10 * np.square(s).sum()
        )
        assert found.tails[rank] == pytest.approx(given.loss(factors.weight), rel=1e-6, abs=1e-10 * found.tails[0])
        np.testing.assert_allclose(np.linalg.norm(factors.up, axis=0), np.sqrt(s[:rank]), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(factors.down, axis=1), np.sqrt(s[:rank]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("method", [plain, whitened])
@pytest.mark.parametrize("samples", [3, 40])
def test_full_rank_is_exact_even_off_the_data(shape: tuple[int, int], method: object, samples: int) -> None:
    given, _ = problem(*shape, samples, 1)
    assert callable(method)
    found: Decomposition = method(given)
    np.testing.assert_allclose(found.truncate(min(shape)).weight, given.weight, atol=1e-11)
    assert found.tails[-1] == 0


def test_whitened_beats_plain_and_plain_beats_whitened_each_in_its_norm() -> None:
    given, _ = problem(12, 10, 60, 3)
    by_output, by_weight = whitened(given), plain(given)
    assert np.all(by_output.tails[1:10] < by_weight.tails[1:10])
    for rank in range(1, 10):
        wide, narrow = by_weight.truncate(rank).weight, by_output.truncate(rank).weight
        assert np.square(given.weight - wide).sum() < np.square(given.weight - narrow).sum()


def test_no_other_factors_are_better() -> None:
    given, _ = problem(7, 5, 30, 4)
    rng = np.random.default_rng(5)
    best = whitened(given)
    for rank in (1, 3):
        factors = best.truncate(rank)
        for scale in (1e-3, 1e-1, 1.0):
            up = factors.up + scale * rng.normal(size=factors.up.shape)
            down = factors.down + scale * rng.normal(size=factors.down.shape)
            assert given.loss(up @ down) > best.tails[rank]


def test_singular_gram_orders_the_unseen_by_the_weight_itself() -> None:
    # Inputs 0 and 1 are seen; 2 and 3 never. The two seen outputs come first, then the larger of the unseen ones.
    given = Problem(np.diag([1.0, 2.0, 4.0, 3.0]), np.diag([1.0, 1.0, 0.0, 0.0]), np.zeros(4), 2)
    found = whitened(given)
    np.testing.assert_allclose(found.tails, [5, 1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.truncate(3).weight, np.diag([1.0, 2.0, 4.0, 0.0]), atol=1e-12)


def test_damping_lets_rare_inputs_have_a_say() -> None:
    given = Problem(np.diag([1.0, 100.0]), np.diag([1.0, 0.0]), np.zeros(2), 1)
    np.testing.assert_allclose(whitened(given).truncate(1).weight, np.diag([1.0, 0.0]), atol=1e-12)
    metric = damped(given.gram, 0.1)
    np.testing.assert_allclose(metric, np.diag([1.05, 0.05]))
    np.testing.assert_allclose(decompose(given, metric).truncate(1).weight, np.diag([0.0, 100.0]), atol=1e-9)
    assert decompose(given, metric).tails[0] == 1.0  # losses are undamped


def test_an_off_span_weight_never_grows() -> None:
    given, _ = problem(8, 20, 6, 8)
    for rank in range(9):
        assert np.linalg.norm(whitened(given).truncate(rank).weight) <= np.linalg.norm(given.weight) * (1 + 1e-12)


def test_the_bias_takes_up_the_mean_with_a_centred_gram() -> None:
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(50, 6)) + 5
    mean = inputs.mean(axis=0)
    weight = rng.normal(size=(4, 6))
    centred = Problem(weight, inputs.T @ inputs / 50 - np.outer(mean, mean), mean, 50)
    found = whitened(centred)
    low = found.truncate(2).weight
    outputs = inputs @ low.T + (weight - low) @ mean
    assert np.square(outputs - inputs @ weight.T).sum(axis=1).mean() == pytest.approx(found.tails[2])


def test_stacked_weights_share_down() -> None:
    given, _ = problem(10, 6, 40, 9)
    factors = whitened(given).truncate(3)
    parts = split_rows(factors, [4, 1, 5])
    assert [part.up.shape for part in parts] == [(4, 3), (1, 3), (5, 3)]
    assert all(part.down is factors.down for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.up for part in parts]), factors.up)
    with pytest.raises(ValueError, match="10 stacked outputs"):
        split_rows(factors, [4, 4])


def test_ranks_out_of_range_are_refused() -> None:
    found = plain(problem(3, 5, 9, 0)[0])
    for rank in (-1, 4):
        with pytest.raises(ValueError, match="3 at most"):
            found.truncate(rank)


def test_nothing_is_nothing() -> None:
    given = Problem(np.zeros((5, 3)), np.zeros((3, 3)), np.zeros(3), 1)
    for found in (plain(given), whitened(given)):
        np.testing.assert_array_equal(found.tails, np.zeros(4))
        np.testing.assert_array_equal(found.truncate(2).weight, np.zeros((5, 3)))


def test_diagonal_metrics_are_matrices() -> None:
    given, _ = problem(5, 7, 30, 6)
    scale = np.linspace(1, 4, 7)
    np.testing.assert_allclose(decompose(given, scale).tails, decompose(given, np.diag(scale)).tails)


def test_repeats_are_equal() -> None:
    given, _ = problem(20, 11, 50, 7)
    first, second = whitened(given).truncate(4), whitened(given).truncate(4)
    assert isinstance(first, Factors)
    assert first.up.tobytes() == second.up.tobytes()
    assert first.down.tobytes() == second.down.tobytes()
