"""FWSVD: optimal where the Fisher information is one number per input, and what stands in for it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from spa_compiler.solvers.fwsvd import fwsvd
from spa_compiler.solvers.problem import Problem
from spa_compiler.solvers.svd import plain, whitened


def layer(n: int = 8, k: int = 6) -> Problem:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, k)) @ rng.normal(size=(k, k))
    return Problem(rng.normal(size=(n, k)), inputs.T @ inputs / 50, inputs.mean(axis=0), 50)


@pytest.mark.parametrize("shape", [(8, 6), (4, 6)])
def test_it_is_the_svd_of_the_scaled_weight(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    scores = np.random.default_rng(1).uniform(0.1, 3, given.weight.shape)
    scale = np.sqrt(scores.sum(axis=0))
    u, s, vt = scipy.linalg.svd(given.weight * scale, full_matrices=False)
    for rank in range(5):
        weight = fwsvd(given, scores).truncate(rank).weight
        np.testing.assert_allclose(weight, u[:, :rank] * s[:rank] @ vt[:rank] / scale, atol=1e-10)
        assert fwsvd(given, scores).tails[rank] == pytest.approx(given.loss(weight))


def test_it_is_optimal_where_scores_are_constant_over_outputs() -> None:
    given = layer()
    row = np.array([5.0, 1.0, 0.5, 0.1, 3.0, 1.0])
    scores = np.tile(row, (8, 1))
    for rank in (1, 3, 5):
        ours = np.sum(scores * np.square(given.weight - fwsvd(given, scores).truncate(rank).weight))
        for other in (plain(given), whitened(given)):
            assert ours < np.sum(scores * np.square(given.weight - other.truncate(rank).weight))


def test_constant_scores_are_plain_svd() -> None:
    given = layer()
    ours = fwsvd(given, np.full(given.weight.shape, 0.3))
    np.testing.assert_allclose(ours.truncate(3).weight, plain(given).truncate(3).weight, atol=1e-12)


def test_the_proxy_is_exact_whitening_for_uncorrelated_inputs() -> None:
    given = layer()
    alone = Problem(given.weight, np.diag(np.diagonal(given.gram)), given.mean, given.count)
    np.testing.assert_allclose(fwsvd(alone).tails, whitened(alone).tails, rtol=1e-9, atol=1e-12)
    assert np.all(fwsvd(given).tails[1:-1] > whitened(given).tails[1:-1])


def test_inputs_without_a_score_come_last() -> None:
    given = Problem(np.diag([1.0, 9.0, 2.0]), np.eye(3), np.zeros(3), 9)
    scores = np.tile([1.0, 0.0, 1.0], (3, 1))
    np.testing.assert_allclose(fwsvd(given, scores).truncate(2).weight, np.diag([1.0, 0.0, 2.0]), atol=1e-12)
    np.testing.assert_allclose(fwsvd(given, scores).truncate(3).weight, given.weight, atol=1e-12)


def test_scores_that_do_not_fit_are_refused() -> None:
    given = layer()
    with pytest.raises(ValueError, match=r"\[6, 8\] for a weight \[8, 6\]"):
        fwsvd(given, np.ones((6, 8)))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="not negative"):
            fwsvd(given, np.full((8, 6), bad))
