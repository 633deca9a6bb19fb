"""What all allocations promise: the budget to rounding, shares within their bounds, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.errors import BudgetError
from spa_compiler.solvers import allocation
from spa_compiler.solvers.allocation.budget import MIN_KEEP, ceilings, fit

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)
SPARSITIES = st.floats(0, 0.99)
LEVELS = np.array([0.2, 0.5, 0.7, 0.95, 1.0])

Allocate = Callable[[list[tuple[int, int]], list[int], float, float | None, np.random.Generator], np.ndarray]


def _weights(shapes: list[tuple[int, int]], rng: np.random.Generator) -> list[np.ndarray]:
    """Some with many ties, some with zeros, of very different scales."""
    return [
        rng.integers(0, rng.integers(2, 2000), shape).astype(np.float64) ** 2 * 10.0 ** rng.integers(-20, 20)
        for shape in shapes
    ]


ALLOCATIONS: dict[str, Allocate] = {
    "uniform": lambda shapes, sizes, sparsity, most, rng: allocation.uniform(sizes, sparsity, max_sparsity=most),
    "erk": lambda shapes, sizes, sparsity, most, rng: allocation.erk(shapes, sparsity, max_sparsity=most),
    "lamp": lambda shapes, sizes, sparsity, most, rng: allocation.lamp(
        _weights(shapes, rng).__getitem__, sizes, sparsity, max_sparsity=most
    ),
    "proportional": lambda shapes, sizes, sparsity, most, rng: allocation.proportional(
        rng.integers(0, 3, len(sizes)) * 10.0 ** rng.integers(-30, 30, len(sizes)), sizes, sparsity, max_sparsity=most
    ),
    "ecoflap": lambda shapes, sizes, sparsity, most, rng: allocation.ecoflap(
        lambda layer, direction, seed: direction * (layer % 3) * (1 + seed),
        sizes,
        sparsity,
        seeds=[0, 1],
        max_sparsity=most,
    ),
    "by_error": lambda shapes, sizes, sparsity, most, rng: allocation.by_error(
        LEVELS,
        rng.integers(0, 4, (len(sizes), len(LEVELS))) * 10.0 ** rng.integers(-9, 9, (len(sizes), 1)),
        sizes,
        sparsity,
        max_sparsity=most,
    ),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(deadline=None)
@given(SHAPES, SPARSITIES, st.none() | st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_every_allocation_meets_the_budget_within_the_bounds(
    name: str, shapes: list[tuple[int, int]], sparsity: float, most: float | None, seed: int
) -> None:
    sizes = [n * k for n, k in shapes]
    limit = 1.0 if most is None else most
    if most is None and name != "by_error":
        limit = 1 - MIN_KEEP * (1 - sparsity)
    highest = [min(limit, 1 - 1 / size) for size in sizes]
    if np.dot(sizes, highest) < sparsity * sum(sizes):
        return
    share = ALLOCATIONS[name](shapes, sizes, sparsity, most, np.random.default_rng(seed))
    assert share.shape == (len(sizes),)
    assert (share >= 0).all()
    assert (share <= highest).all()
    assert np.dot(sizes, share) == pytest.approx(sparsity * sum(sizes), rel=1e-11, abs=1e-11 * sum(sizes))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_budget_out_of_reach_is_refused_with_what_is_in_reach(name: str) -> None:
    with pytest.raises(BudgetError, match=r"no allocation has 80.00% zeros.*70.00%"):
        ALLOCATIONS[name]([(10, 10), (20, 10)], [100, 200], 0.8, 0.7, np.random.default_rng(0))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_highest_share_everywhere_is_in_reach(name: str) -> None:
    share = ALLOCATIONS[name]([(10, 10), (7, 3)], [100, 21], 0.7, 0.7, np.random.default_rng(0))
    np.testing.assert_allclose(share, 0.7, rtol=1e-12)


def test_one_element_of_every_layer_stays() -> None:
    np.testing.assert_allclose(ceilings([1, 2, 1000], 0.5, 1.0), [0, 0.5, 0.999])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_of_its_range_is_an_error(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        ceilings([10], sparsity, 1.0)


def test_an_empty_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        ceilings([10, 0], 0.5, 1.0)


def test_no_layers_have_no_shares() -> None:
    assert allocation.uniform([], 0.5).shape == (0,)


def test_fit_makes_up_for_what_is_clipped() -> None:
    # Densities 0, 1, 10 times c; the last is full at once, the first takes nothing until the second is full too.
    np.testing.assert_allclose(fit(0.0, [0, 1, 10], [10, 10, 10], 0.5, np.ones(3)), [1, 0.5, 0])
    np.testing.assert_allclose(fit(0.0, [0, 1, 10], [10, 10, 10], 0.2, np.ones(3)), [0.6, 0, 0], atol=1e-15)


@pytest.mark.parametrize("score", [-1.0, float("nan"), float("inf")])
def test_scores_that_are_none_are_an_error(score: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        fit(0.0, [1.0, score], [10, 10], 0.5, np.ones(2))


def test_uniform_is_uniform_but_for_layers_too_small() -> None:
    np.testing.assert_allclose(allocation.uniform([100, 30], 0.3), 0.3)
    np.testing.assert_allclose(allocation.uniform([1, 99], 0.5), [0, 50 / 99])
