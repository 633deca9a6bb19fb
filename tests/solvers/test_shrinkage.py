"""Shrinkage: none where two halves agree, much where they are chance, and less loss on what nobody saw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa_compiler.patterns import Unstructured
from spa_compiler.solvers.problem import F64, Problem, Zeros
from spa_compiler.solvers.shrinkage import shrinkage, shrunk
from spa_compiler.solvers.sparsegpt import sparsegpt

K = 48


def gram_of(x: NDArray[np.float64]) -> F64:
    return x.T @ x / len(x)


def drawn(count: int, mix: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((count, len(mix))) @ mix


def correlated() -> NDArray[np.float64]:
    """What mixes independent inputs so that all hang together."""
    return np.eye(K) + 0.3 * np.random.default_rng(7).standard_normal((K, K))


WEIGHT = np.random.default_rng(1).standard_normal((16, K))


def test_shrunk_keeps_the_diagonal_and_scales_the_rest() -> None:
    gram = np.array([[4.0, 2.0], [2.0, 9.0]])
    np.testing.assert_array_equal(shrunk(gram, 0.25), [[4.0, 1.5], [1.5, 9.0]])
    assert shrunk(gram, 0.0) is gram


def test_halves_that_agree_need_none() -> None:
    gram = gram_of(drawn(4000, correlated(), 2))
    assert shrinkage(WEIGHT, gram, gram) == 0


def test_few_samples_of_independent_inputs_are_all_chance() -> None:
    one, other = (gram_of(drawn(30, np.eye(K), seed)) for seed in (3, 4))
    assert shrinkage(WEIGHT, one, other) > 0.5


def test_more_samples_need_less() -> None:
    found = [
        shrinkage(WEIGHT, *(gram_of(drawn(count, correlated(), seed)) for seed in (5, 6))) for count in (40, 200, 20000)
    ]
    assert found[0] > found[1] >= found[2] == 0


def test_zeros_chosen_with_it_lose_less_on_other_samples() -> None:
    mix = correlated()
    true = mix.T @ mix
    x = drawn(80, mix, 8)
    share = shrinkage(WEIGHT, gram_of(x[::2]), gram_of(x[1::2])) / 2  # both together have about half of the chance
    judge = Problem(WEIGHT, true, np.zeros(K), 1)

    def loss(gram: F64) -> float:
        return judge.loss(sparsegpt(Problem(WEIGHT, gram, np.zeros(K), 80), Zeros(Unstructured(), 0.5)).weight)

    assert loss(shrunk(gram_of(x), share)) < 0.97 * loss(gram_of(x))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    one, other = (gram_of(drawn(60, correlated(), seed)) for seed in (9, 10))
    for gram in (one, other):
        gram[:5] = 0
        gram[:, :5] = 0
    assert 0 <= shrinkage(WEIGHT, one, other) < 1
    assert shrinkage(WEIGHT, np.zeros((K, K)), np.zeros((K, K))) == 0


def test_one_input_has_nothing_to_hang_together_with() -> None:
    assert shrinkage(np.ones((3, 1)), np.ones((1, 1)), np.ones((1, 1))) == 0
