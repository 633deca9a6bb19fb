"""Grids of 4 bits: exact where a weight is on one, as good as the best of all grids else, zeros where they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers import four_bits
from spa_compiler.solvers.four_bits import CODES, Grid, fit, nearest, rtn
from spa_compiler.solvers.problem import F64, Problem

SEEDS = st.integers(0, 2**32 - 1)


def drawn(n: int, k: int, density: float, seed: int) -> F64:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, k)) < density, rng.standard_normal((n, k)) * np.exp(rng.uniform(-8, 4)), 0)


def codes_of(weight: F64, grid: Grid) -> tuple[F64, F64]:
    """q [n, k] of what `nearest` makes of a weight, and the scales."""
    steps = fit(weight, grid, np.ones(weight.shape[1]))
    group = np.arange(weight.shape[1]) // grid.group
    return nearest(weight, grid) / steps.scale[:, group] + steps.zero[:, group], steps.scale


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 90),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([Grid(32), Grid(64), Grid(32, symmetric=True)]),
    SEEDS,
)
def test_values_are_codes_times_scales_that_float32_holds(
    n: int, k: int, density: float, grid: Grid, seed: int
) -> None:
    weight = drawn(n, k, density, seed)
    steps = fit(weight, grid, np.ones(k))
    assert steps.scale.shape == steps.zero.shape == (n, -(-k // grid.group))
    assert not (steps.scale.astype(np.float32).view(np.uint32) & 15).any()
    np.testing.assert_array_equal(steps.scale.astype(np.float32), steps.scale)
    if grid.symmetric:
        assert (steps.zero == 8).all()
    codes, _ = codes_of(weight, grid)
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert codes.min(initial=0) >= 0
    assert codes.max(initial=0) < CODES
    rounded = nearest(weight, grid)
    np.testing.assert_array_equal(rounded.astype(np.float32), rounded)
    assert not rounded[weight == 0].any()
    np.testing.assert_array_equal(nearest(rounded, grid), rounded)


def best_of_all(values: F64, importance: F64) -> float:
    """The least error that any scale, of a fine scan, and any zero point reach."""
    reach = np.abs(values).max()
    scales = np.linspace(reach / 40, reach / 4, 300)[:, None, None]
    zeros = np.arange(CODES)[None, :, None]
    near = np.clip(np.rint(values / scales), -zeros, CODES - 1 - zeros) * scales
    return float((np.square(near - values) * importance).sum(axis=-1).min())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("uneven", [False, True])
def test_grids_come_near_the_best_of_all(seed: int, uneven: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((10, 128))
    importance = np.exp(rng.standard_normal(128)) if uneven else np.ones(128)
    found = (np.square(nearest(weight, Grid(128), importance) - weight) * importance).sum(axis=1)
    best = np.array([best_of_all(row, importance) for row in weight])
    assert (found >= 0.98 * best).all()
    assert found.sum() < 1.1 * best.sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("used", [(0, 15), (1, 15), (3, 9), (6, 8)])
def test_a_weight_on_a_grid_stays(used: tuple[int, int], symmetric: bool) -> None:
    """Whether its groups use all codes or a few of them."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 1, (5, 3)).astype(np.float16).astype(np.float64).repeat(32, axis=1)[:, :80]
    zero = 8 if symmetric else (used[0] + used[1]) // 2
    weight = (rng.integers(used[0], used[1] + 1, (5, 80)) - zero) * scale
    np.testing.assert_array_equal(nearest(weight, Grid(32, symmetric)), weight)


def test_sixteen_values_from_nought_to_fifteen_by_hand() -> None:
    weight = np.array([[0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14.2, 15]])
    assert nearest(weight, Grid(32)).tolist() == [[*range(15), 15.0]]
    even = np.array([[-8.0, -0.6, 0.4, 3.4, 7]])
    assert nearest(even, Grid(32, symmetric=True)).tolist() == [[-8.0, -1.0, 0.0, 3.0, 7.0]]


def test_what_is_outermost_is_cut_where_that_is_better() -> None:
    weight = np.linspace(-1, 1, 128)[None].copy()
    weight[0, 0] = -1.6
    step = 2.6 / 15
    assert np.square(nearest(weight, Grid(128)) - weight).sum() < 128 * step**2 / 12


def test_groups_are_runs_of_inputs_and_the_last_may_be_short() -> None:
    """A change in one group leaves the others alone."""
    weight = drawn(3, 70, 1.0, 0)
    other = weight.copy()
    other[:, 64:] *= 7
    one, two = nearest(weight, Grid(32)), nearest(other, Grid(32))
    np.testing.assert_array_equal(one[:, :64], two[:, :64])
    assert not np.array_equal(one[:, 64:], two[:, 64:])


def test_large_weights_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(13, 70, 0.7, 1)
    whole = nearest(weight, Grid(32))
    monkeypatch.setattr(four_bits, "_TOGETHER", 96 * 4)
    np.testing.assert_array_equal(nearest(weight, Grid(32)), whole)


def test_errors_of_large_inputs_count_more() -> None:
    rng = np.random.default_rng(2)
    sizes = np.exp(1.5 * rng.standard_normal(128))
    problem = Problem(rng.standard_normal((32, 128)), np.diag(sizes), np.zeros(128), 1000)
    assert problem.loss(rtn(problem, Grid(128))) < 0.9 * problem.loss(nearest(problem.weight, Grid(128)))
    unknown = Problem(problem.weight, np.zeros((128, 128)), np.zeros(128), 0)
    np.testing.assert_array_equal(rtn(unknown, Grid(128)), nearest(problem.weight, Grid(128)))
