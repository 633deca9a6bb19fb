"""Tucker-2 factors of convolutions: exact at full ranks, never a step back, better in the norm asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize

from spa_compiler.solvers.problem import DAMPING, F64, Problem
from spa_compiler.solvers.svd import damped, whitened
from spa_compiler.solvers.tucker import Tucker, channels_of, energies, tucker2


def images(channels: int, rng: np.random.Generator) -> F64:
    """Smooth images `[8, C, 9, 9]`, whose channels are correlated and differ in size."""
    noise = rng.normal(size=(8, channels, 10, 10))
    smooth = noise[..., 1:, 1:] + noise[..., :-1, 1:] + noise[..., 1:, :-1] + noise[..., :-1, :-1]
    mixed = np.einsum("ncyx,dc->ndyx", smooth, np.eye(channels) + 0.5 * rng.normal(size=(channels, channels)))
    return np.asarray(np.maximum(mixed * np.logspace(0, 0.7, channels)[:, None, None], 0))


def columns(inputs: F64, height: int, width: int) -> F64:
    """The im2col columns without padding, `[positions, C * kh * kw]`."""
    windows = np.lib.stride_tricks.sliding_window_view(inputs, (height, width), axis=(2, 3))
    return np.asarray(windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, inputs.shape[1] * height * width))


def layer(outputs: int, channels: int, height: int, width: int, seed: int = 0) -> tuple[F64, Problem]:
    """A convolution weight, and its problem."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(outputs, channels, height, width)) * np.exp(rng.normal(size=(outputs, channels, 1, 1)))
    cols = columns(images(channels, rng), height, width)
    return weight, Problem(weight.reshape(outputs, -1), cols.T @ cols / len(cols), cols.mean(axis=0), len(cols))


def with_damping(problem: Problem) -> Problem:
    """The problem whose loss is minimized."""
    return replace(problem, gram=damped(problem.gram, DAMPING))


def loss(tucker: Tucker, problem: Problem) -> float:
    return problem.loss(tucker.weight.reshape(problem.weight.shape))


SHAPES = [(6, 5, 3, 3), (4, 7, 1, 3), (8, 3, 1, 1), (3, 4, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["plain", "channels", "outputs"])
def test_full_ranks_are_exact(shape: tuple[int, int, int, int], norm: str) -> None:
    weight, problem = layer(*shape)
    gram = channels_of(problem.gram, shape[1]) if norm == "channels" else None
    tucker = tucker2(weight, (shape[1], shape[0]), gram, problem if norm == "outputs" else None)
    assert tucker.ranks == (shape[1], shape[0])
    assert tucker.core.shape == (shape[0], shape[1], *shape[2:])
    np.testing.assert_allclose(tucker.weight, weight, atol=1e-7 * np.abs(weight).max())


def test_planted_ranks_are_exact() -> None:
    rng = np.random.default_rng(1)
    first, core, last = rng.normal(size=(3, 8)), rng.normal(size=(2, 3, 3, 3)), rng.normal(size=(6, 2))
    weight = Tucker(first, core, last).weight
    cols = columns(images(8, rng), 3, 3)
    problem = Problem(weight.reshape(6, -1), cols.T @ cols / len(cols), cols.mean(axis=0), len(cols))
    for found in (tucker2(weight, (3, 2)), tucker2(weight, (3, 2), problem=problem)):
        np.testing.assert_allclose(found.weight, weight, atol=1e-9 * np.abs(weight).max())


def test_the_three_convolutions_in_a_row_are_the_weight() -> None:
    weight, problem = layer(6, 5, 3, 2)
    tucker = tucker2(weight, (3, 4), problem=problem)
    inputs = images(5, np.random.default_rng(2))
    inner = np.einsum("ncyx,ic->niyx", inputs, tucker.first)
    spread = columns(inner, 3, 2) @ tucker.core.reshape(4, -1).T @ tucker.last.T
    np.testing.assert_allclose(spread, columns(inputs, 3, 2) @ tucker.weight.reshape(6, -1).T, atol=1e-9)


@pytest.mark.parametrize("ranks", [(2, 3), (4, 4), (3, 1)])
def test_hooi_never_steps_back_and_improves_on_hosvd(ranks: tuple[int, int]) -> None:
    weight, _ = layer(8, 6, 3, 3, seed=3)
    losses = [np.square(weight - tucker2(weight, ranks, sweeps=sweeps).weight).sum() for sweeps in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    whole = np.square(weight).sum()
    inside, outside = energies(weight)
    assert losses[0] <= inside[ranks[0]] + outside[ranks[1]]
    assert losses[-1] >= max(inside[ranks[0]], outside[ranks[1]]) - 1e-9 * whole


def test_one_turn_of_hooi_is_not_the_last() -> None:
    weight, _ = layer(8, 6, 3, 3, seed=4)
    one, many = (np.square(weight - tucker2(weight, (3, 1), sweeps=sweeps).weight).sum() for sweeps in (1, 5))
    assert many < 0.995 * one


def test_without_damping_a_singular_gram_matrix_blows_nothing_up() -> None:
    weight, problem = layer(5, 4, 3, 3, seed=10)
    few = np.random.default_rng(1).normal(size=(6, 36))
    thin = Problem(problem.weight, few.T @ few / 6, few.mean(axis=0), 6)
    for ranks in ((3, 3), (4, 5)):
        assert np.linalg.norm(tucker2(weight, ranks, problem=thin, damping=0.0).weight) < np.linalg.norm(weight)


@pytest.mark.parametrize("ranks", [(2, 3), (4, 4), (3, 1)])
def test_turns_never_step_back_in_the_true_loss(ranks: tuple[int, int]) -> None:
    weight, problem = layer(8, 6, 3, 3, seed=4)
    goal = with_damping(problem)
    losses = [loss(tucker2(weight, ranks, problem=problem, sweeps=sweeps), goal) for sweeps in (0, 1, 2, 4, 8)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_each_better_norm_has_the_lower_loss() -> None:
    weight, problem = layer(12, 10, 3, 3, seed=5)
    gram = channels_of(problem.gram, 10)
    for ranks in ((4, 6), (7, 8), (9, 5)):
        by_weight, by_channel = tucker2(weight, ranks), tucker2(weight, ranks, gram)
        by_output = tucker2(weight, ranks, problem=problem)
        assert loss(by_output, problem) < loss(by_channel, problem) < loss(by_weight, problem)


def test_core_and_last_are_the_optimum_given_first() -> None:
    weight, problem = layer(4, 3, 2, 2, seed=6)
    tucker = tucker2(weight, (2, 2), problem=problem)
    shapes = (tucker.core.shape, tucker.last.shape)

    def other(values: F64) -> float:
        core, last = values[: tucker.core.size].reshape(shapes[0]), values[tucker.core.size :].reshape(shapes[1])
        return loss(Tucker(tucker.first, core, last), goal)

    rng = np.random.default_rng(7)
    goal = with_damping(problem)
    found = loss(tucker, goal)
    for _ in range(2):
        start = rng.normal(size=tucker.core.size + tucker.last.size)
        assert scipy.optimize.minimize(other, start).fun >= found * (1 - 1e-6)


def test_many_turns_end_where_the_slope_is_zero() -> None:
    weight, problem = layer(5, 4, 2, 2, seed=8)
    tucker = tucker2(weight, (2, 3), problem=problem, sweeps=500)
    problem = with_damping(problem)
    change = (tucker.weight.reshape(5, -1) - problem.weight) @ problem.gram
    slope = np.einsum("mo,oip,mcp->ic", tucker.last, tucker.core.reshape(3, 2, 4), change.reshape(5, 4, 4))
    start = np.einsum(
        "mo,oip,mcp->ic", tucker.last, tucker.core.reshape(3, 2, 4), (problem.weight @ problem.gram).reshape(5, 4, 4)
    )
    assert np.abs(slope).max() < 0.02 * np.abs(start).max()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_pointwise_convolution_with_all_inputs_is_whitened_svd(rank: int) -> None:
    weight, problem = layer(8, 6, 1, 1, seed=9)
    tucker = tucker2(weight, (6, rank), problem=problem, damping=0.0)
    assert loss(tucker, problem) == pytest.approx(whitened(problem).tails[rank], rel=1e-6, abs=1e-12)


def test_channels_of_is_the_mean_over_positions() -> None:
    _, problem = layer(2, 3, 2, 2)
    expected = sum(problem.gram[p::4, p::4] for p in range(4)) / 4
    np.testing.assert_allclose(channels_of(problem.gram, 3), expected)


def test_dead_channels_and_few_samples() -> None:
    weight, problem = layer(5, 4, 3, 3, seed=10)
    gram = problem.gram.copy()
    gram[9:18] = gram[:, 9:18] = 0  # channel 1
    dead = Problem(problem.weight, gram, problem.mean, problem.count)
    tucker = tucker2(weight, (3, 5), problem=dead, damping=0.0)
    assert dead.error(tucker.weight.reshape(5, -1)) < 1e-6  # three channels that live need three
    few = np.random.default_rng(1).normal(size=(6, 36))
    thin = Problem(problem.weight, few.T @ few / 6, few.mean(axis=0), 6)
    np.testing.assert_allclose(tucker2(weight, (4, 5), problem=thin).weight, weight, atol=1e-7)
    found = tucker2(weight, (3, 3), problem=thin)
    assert all(np.isfinite(factor).all() for factor in (found.first, found.core, found.last))
    nothing = tucker2(weight, (2, 2), problem=Problem(problem.weight, np.zeros((36, 36)), problem.mean, 1))
    assert np.isfinite(nothing.weight).all()


def test_factors_are_balanced() -> None:
    weight, problem = layer(7, 6, 3, 3, seed=11)
    tucker = tucker2(weight, (4, 5), problem=problem)
    outer = np.sqrt(np.square(tucker.core).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(np.linalg.norm(tucker.last, axis=0), outer, rtol=1e-9)
    inner = np.sqrt(np.square(tucker.core).sum(axis=(0, 2, 3)))
    assert np.all(
        (np.linalg.norm(tucker.first, axis=1) / inner < 20) & (np.linalg.norm(tucker.first, axis=1) / inner > 0.05)
    )


def test_repeats_are_equal() -> None:
    weight, problem = layer(5, 4, 3, 3)
    first, second = (tucker2(weight, (2, 3), problem=problem) for _ in range(2))
    np.testing.assert_array_equal(first.weight, second.weight)


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), (6, 1), (1, 7)])
def test_ranks_out_of_range_are_refused(ranks: tuple[int, int]) -> None:
    weight, _ = layer(6, 5, 3, 3)
    with pytest.raises(ValueError, match=r"of a weight \[6, 5, 3, 3\]"):
        tucker2(weight, ranks)


def test_another_layer_s_problem_is_refused() -> None:
    weight, _ = layer(6, 5, 3, 3)
    with pytest.raises(ValueError, match=r"a problem of \[6, 45\]|a problem of \[5, 45\]"):
        tucker2(weight[:, :4], (2, 2), problem=layer(5, 5, 3, 3)[1])
