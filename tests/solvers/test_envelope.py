"""The envelope's proximal operator against a general minimizer, and what the solver finds with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from spa_compiler.criteria import wanda
from spa_compiler.patterns import parse
from spa_compiler.solvers.envelope import budgets, envelope, prox
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import Problem, Zeros
from tests.layer_problems import sampled, with_a_dead_input

NAMES = ["unstructured", "fan-in", "2:4", "block:2x1", "block:4x4", "channel"]


def minimum(strengths: np.ndarray, sizes: np.ndarray, strength: float, budget: float) -> np.ndarray:
    """Norms x >= 0 of the units that minimize |x - v|^2 / 2 + strength / 2 sum x^2 / t, jointly with t."""
    count = len(strengths)

    def objective(both: np.ndarray) -> float:
        x, t = both[:count], both[count:]
        return float(np.square(x - strengths).sum() / 2 + strength / 2 * (np.square(x) / t).sum())

    def gradient(both: np.ndarray) -> np.ndarray:
        x, t = both[:count], both[count:]
        return np.concatenate([x - strengths + strength * x / t, -strength / 2 * np.square(x / t)])

    start = np.concatenate([strengths / 2, np.full(count, min(1.0, 0.99 * budget / sizes.sum()))])
    room = {
        "type": "ineq",
        "fun": lambda both: budget - sizes @ both[count:],
        "jac": lambda both: np.r_[0 * sizes, -sizes],
    }
    bounds = [(0, None)] * count + [(1e-7, 1)] * count
    found = minimize(
        objective,
        start,
        jac=gradient,
        bounds=bounds,
        constraints=[room],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return found.x[:count]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strength", [0.05, 0.7, 5.0])
def test_prox_is_the_minimizer(seed: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    pattern = parse("block:2x1")
    value = rng.normal(size=(5, 3))  # units of 2, 2 and 1 rows
    found = prox(pattern, value, strength, budgets(pattern, 5, 3, 0.5))
    units = np.array([[0, 2], [2, 4], [4, 5]])
    norms = np.concatenate([np.linalg.norm(value[a:b], axis=0) for a, b in units])
    sizes = np.repeat([2.0, 2.0, 1.0], 3)
    expected = minimum(norms, sizes, strength, 7.5)
    np.testing.assert_allclose(
        np.concatenate([np.linalg.norm(found[a:b], axis=0) for a, b in units]), expected, atol=2e-3
    )
    assert (np.sign(found[found != 0]) == np.sign(value[found != 0])).all()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 0.95),
    st.floats(0.01, 10),
    st.integers(0, 99),
)
def test_prox_spends_its_budget(name: str, n: int, k: int, sparsity: float, strength: float, seed: int) -> None:
    pattern = parse(name)
    value = np.random.default_rng(seed).normal(size=(n, k))
    found = prox(pattern, value, strength, budgets(pattern, n, k, sparsity))
    ratio = found / value  # t / (t + l)
    assert (ratio >= 0).all()
    assert (ratio <= 1 / (1 + strength) + 1e-9).all()
    kept = pattern.sparsity if pattern.sparsity is not None else sparsity
    share = strength * ratio / (1 - ratio)
    if name == "2:4":
        expected = n * sum(min(2, len(range(start, min(start + 4, k)))) for start in range(0, k, 4))
    else:
        expected = n * k * (1 - kept)
    assert share.sum() == pytest.approx(expected, rel=1e-6)


def test_few_units_are_only_scaled() -> None:
    value = np.zeros((2, 4))
    value[0, 1], value[1, 2] = 3.0, -1.0
    pattern = parse("unstructured")
    np.testing.assert_allclose(prox(pattern, value, 0.25, budgets(pattern, 2, 4, 0.5)), value / 1.25)


def test_zeros_everywhere() -> None:
    for name in NAMES:
        pattern = parse(name)
        np.testing.assert_array_equal(
            prox(pattern, np.zeros((4, 8)), 0.1, budgets(pattern, 4, 8, 0.5)), np.zeros((4, 8))
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_support_is_better_than_that_of_the_wanda_scores(name: str) -> None:
    zeros = Zeros(parse(name), 0.6)
    ours = theirs = 0.0
    for seed in range(3):
        problem = sampled(32, 48, seed)
        found = envelope(problem, zeros)
        assert zeros.pattern.fits(found.weight)
        assert not found.weight[~found.mask].any()
        ours += problem.loss(found.weight)
        theirs += problem.loss(refit(problem, zeros.choose(wanda(problem.weight, problem.norms))))
    assert ours < theirs


def test_uncorrelated_inputs_give_the_optimum() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(rng.normal(size=(6, 10)), np.diag(rng.uniform(0.1, 4, 10)), np.zeros(10), 99)
    zeros = Zeros(parse("unstructured"), 0.7)
    np.testing.assert_array_equal(envelope(problem, zeros).mask, zeros.choose(wanda(problem.weight, problem.norms)))


def test_silent_inputs_and_the_same_again() -> None:
    problem = with_a_dead_input(sampled(5, 8, 1))
    one, again = (envelope(problem, Zeros(parse("unstructured"), 0.5)) for _ in range(2))
    assert not one.mask[:, 3].any()
    np.testing.assert_array_equal(one.weight, again.weight)
