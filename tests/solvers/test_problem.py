"""What every solver is measured by: losses, errors and moments of a layer, against its samples."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.solvers.problem import F64, Problem, relative_loss
from tests.layer_problems import with_a_dead_input


def layer(centred: bool = False) -> tuple[Problem, F64]:
    """A layer, and its inputs `[positions, k]`, whose means are not 0."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)) + rng.uniform(1, 3, 5)
    seen = inputs - inputs.mean(axis=0) if centred else inputs
    return Problem(rng.standard_normal((3, 5)), seen.T @ seen / 40, inputs.mean(axis=0), 40, centred), inputs


def test_loss_and_error_are_those_of_the_outputs() -> None:
    problem, inputs = layer()
    other = problem.weight + np.random.default_rng(1).standard_normal((3, 5))
    lost = np.square(inputs @ (other - problem.weight).T).sum(axis=1).mean()
    whole = np.square(inputs @ problem.weight.T).sum(axis=1).mean()
    assert problem.loss(other) == pytest.approx(lost)
    assert problem.error(other) == pytest.approx(np.sqrt(lost / whole))
    assert problem.error(problem.weight) == 0


def test_a_loss_below_zero_is_rounding() -> None:
    problem = Problem(np.zeros((1, 2)), np.array([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]]), np.zeros(2), 1)
    assert problem.loss(np.array([[1.0, -1.0]])) == 0


def test_where_inputs_are_always_0_the_error_is_that_of_the_weights() -> None:
    problem = Problem(np.array([[3.0, 4.0]]), np.zeros((2, 2)), np.zeros(2), 9)
    assert problem.error(np.array([[0.0, 4.0]])) == pytest.approx(3 / 5)
    assert problem.error(problem.weight) == 0
    assert Problem(np.zeros((1, 2)), np.eye(2), np.zeros(2), 9).error(np.zeros((1, 2))) == 0


@pytest.mark.parametrize("centred", [False, True])
def test_moments_of_each_input(centred: bool) -> None:
    problem, inputs = layer(centred)
    np.testing.assert_allclose(problem.variance, inputs.var(axis=0))
    seen = inputs - inputs.mean(axis=0) if centred else inputs
    np.testing.assert_allclose(problem.norms, np.sqrt(np.square(seen).mean(axis=0)))


def test_rounding_makes_no_norm_or_variance_negative() -> None:
    problem = Problem(np.ones((1, 2)), np.diag([-1e-20, 1.0]), np.array([0.0, 1.0 + 1e-12]), 9)
    np.testing.assert_array_equal(problem.norms, [0, 1])
    np.testing.assert_array_equal(problem.variance, [0, 0])


def test_damping_is_of_the_mean_diagonal_and_leaves_the_problem_alone() -> None:
    problem, _ = layer()
    before = problem.gram.copy()
    expected = before + 0.1 * np.diagonal(before).mean() * np.eye(5)
    np.testing.assert_allclose(problem.damped(0.1), expected)
    np.testing.assert_array_equal(problem.gram, before)


def test_inputs_that_are_always_0_are_as_large_as_any_when_damped() -> None:
    problem, _ = layer()
    gram = with_a_dead_input(problem, 2).damped(0.0)
    assert gram[2, 2] == max(1.0, np.diagonal(problem.gram)[[0, 1, 3, 4]].max())
    assert np.linalg.eigvalsh(gram).min() > 0
    np.testing.assert_array_equal(Problem(np.ones((1, 3)), np.zeros((3, 3)), np.zeros(3), 0).damped(), np.eye(3))


def test_relative_loss_is_of_all_groups_together() -> None:
    rng = np.random.default_rng(3)
    inputs = [rng.standard_normal((50, 4)) for _ in range(2)]
    weights = [rng.standard_normal((3, 4)) for _ in range(2)]
    problems = [Problem(w, x.T @ x / 50, x.mean(axis=0), 50) for w, x in zip(weights, inputs, strict=True)]
    halved = [weights[0], weights[1] / 2]
    outputs = [np.square(x @ w.T).sum() for w, x in zip(weights, inputs, strict=True)]
    assert relative_loss(problems, halved) == pytest.approx(outputs[1] / 4 / sum(outputs))
    nothing = Problem(weights[0], np.zeros((4, 4)), np.zeros(4), 50)
    assert relative_loss([nothing], [halved[0]]) is None
