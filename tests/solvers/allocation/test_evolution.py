"""Evolution: finds known optima, keeps the budget, never gets worse, repeats itself."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers.allocation import evolve, to_levels

LEVELS = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("sizes", [[100] * 8, [100, 400] * 4, [100, 200, 400, 800] * 2])
def test_finds_the_optimum_of_a_sum(sizes: list[int]) -> None:
    weights = _rng(3).uniform(0.2, 5, (8, 1))
    errors = weights * np.exp(6 * LEVELS)
    choice = evolve(lambda levels, samples: errors[range(8), levels].sum(), sizes, LEVELS, 0.6, _rng(), generations=200)
    # Of all choices there are: one axis per layer.
    zeros = sum(np.ix_(*(size * LEVELS for size in sizes)))
    best = sum(np.ix_(*errors))[zeros >= 0.6 * sum(sizes) - 1e-6].min()
    assert errors[range(8), choice].sum() == pytest.approx(best, rel=1e-9)
    assert np.dot(sizes, LEVELS[choice]) == pytest.approx(0.6 * sum(sizes))


def test_finds_the_optimum_of_what_is_no_sum() -> None:
    """A product with a coupling: layers 0 and 3 must not both be sparse. Against all choices of the budget."""

    def fitness(levels: tuple[int, ...], samples: int) -> float:
        share = LEVELS[list(levels)]
        return float(np.prod(1 + share * [1, 2, 0.5, 1]) + 40 * share[0] * share[3])

    choices = [c for c in itertools.product(range(7), repeat=4) if abs(LEVELS[list(c)].mean() - 0.6) < 1e-9]
    choice = evolve(fitness, [50] * 4, LEVELS, 0.6, _rng(1), generations=60)
    assert fitness(tuple(choice), 0) == pytest.approx(min(fitness(c, 0) for c in choices))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(10, 1000), min_size=1, max_size=6), st.floats(0.3, 0.9), st.integers(0, 2**32 - 1))
def test_never_worse_than_the_start_nor_off_the_budget(sizes: list[int], sparsity: float, seed: int) -> None:
    rng = _rng(seed)
    table = rng.random((len(sizes), len(LEVELS)))
    start = to_levels([sparsity] * len(sizes), sizes, LEVELS)
    there, target = np.dot(sizes, LEVELS[start]), sparsity * sum(sizes)
    half = 0.05 * min(sizes)
    seen = []

    def fitness(levels: tuple[int, ...], samples: int) -> float:
        seen.append(levels)
        return float(table[range(len(sizes)), levels].sum())

    choice = evolve(fitness, sizes, LEVELS, sparsity, rng, start=start, generations=5)
    assert fitness(tuple(choice), 0) <= fitness(tuple(start), 0)
    for levels in seen:
        zeros = np.dot(sizes, LEVELS[list(levels)])
        assert min(there, target - half) - 1e-6 <= zeros <= max(there, target + half) + 1e-6


def test_a_fitness_that_flatters_on_few_samples_is_not_believed() -> None:
    start = (3, 3, 3)

    def fitness(levels: tuple[int, ...], samples: int) -> float:
        return 1.0 if samples == 8 else float(levels != start)

    assert evolve(fitness, [10] * 3, LEVELS, 0.6, _rng(), start=start, generations=5) == [3, 3, 3]


def test_nan_is_the_worst() -> None:
    def fitness(levels: tuple[int, ...], samples: int) -> float:
        return 1.0 if levels == (3, 3) else float("nan")

    assert evolve(fitness, [10] * 2, LEVELS, 0.6, _rng(), generations=5) == [3, 3]


def test_a_start_that_is_nan_is_left() -> None:
    def fitness(levels: tuple[int, ...], samples: int) -> float:
        return float("nan") if levels == (3, 3) else 1.0

    assert evolve(fitness, [10] * 2, LEVELS, 0.6, _rng(), generations=1) != [3, 3]


def test_the_same_seed_gives_the_same_calls() -> None:
    def calls(seed: int) -> list[tuple[tuple[int, ...], int]]:
        made = []

        def fitness(levels: tuple[int, ...], samples: int) -> float:
            made.append((levels, samples))
            return float(np.dot(levels, [3, 1, 4, 1, 5]))

        evolve(fitness, [10] * 5, LEVELS, 0.6, _rng(seed), generations=6, offspring=5, survivors=2)
        return made

    assert calls(4) == calls(4)
    assert calls(4) != calls(5)


def test_no_candidate_is_evaluated_twice_and_progress_is_told() -> None:
    made: Counter[tuple[tuple[int, ...], int]] = Counter()
    told = []

    def fitness(levels: tuple[int, ...], samples: int) -> float:
        made[levels, samples] += 1
        return float(np.dot(levels, [3, 1, 4]))

    evolve(
        fitness, [10] * 3, LEVELS, 0.6, _rng(), generations=7, samples=(2, 9), progress=lambda *news: told.append(news)
    )
    assert set(made.values()) == {1}
    assert {samples for _, samples in made} == {2, 9}
    assert [news[:2] for news in told] == [(done, 7) for done in range(1, 8)]
    best = [news[2] for news in told]
    assert best == sorted(best, reverse=True)


def test_one_layer_or_one_level_has_nothing_to_search() -> None:
    assert evolve(lambda levels, samples: 0.0, [10], LEVELS, 0.6, _rng(), generations=2) == [3]
    assert evolve(lambda levels, samples: 0.0, [10, 20], [0.6], 0.6, _rng(), generations=2) == [0, 0]


@pytest.mark.parametrize("start", [[0], [0, 7], [0, -1]])
def test_a_start_that_is_none_is_an_error(start: list[int]) -> None:
    with pytest.raises(ValueError, match="a start needs 2 levels from 0 to 6"):
        evolve(lambda levels, samples: 0.0, [10, 20], LEVELS, 0.6, _rng(), start=start)


@settings(deadline=None)
@given(st.lists(st.sampled_from([100, 300, 600]), min_size=1, max_size=8), st.floats(0.31, 0.89), st.integers(0, 99))
def test_rounding_to_levels_loses_at_most_half_a_step_of_the_smallest(sizes: list[int], mean: float, seed: int) -> None:
    """As long as a layer of the smallest size is left that can move."""
    share = np.clip(mean + _rng(seed).uniform(-0.2, 0.2, len(sizes)), 0.31, 0.89)
    choice = to_levels(share, sizes, LEVELS)
    off = abs(np.dot(sizes, LEVELS[choice]) - np.dot(sizes, share))
    free = [size for size, level in zip(sizes, choice, strict=True) if 0 < level < 6]
    assert off <= 0.05 * min(free, default=max(sizes) * len(sizes)) + 1e-6


def test_shares_on_levels_stay() -> None:
    assert to_levels([0.3, 0.9, 0.5], [10, 20, 30], LEVELS) == [0, 6, 2]


@pytest.mark.parametrize("levels", [0.5, [], [0.5, 0.4], [0.5, 0.5], [[0.1, 0.2], [0.3, 0.3]]])
def test_levels_that_do_not_ascend_are_an_error(levels: object) -> None:
    with pytest.raises(ValueError, match="levels must ascend"):
        to_levels([0.5, 0.5], [10, 20], levels)  # type: ignore[arg-type]
