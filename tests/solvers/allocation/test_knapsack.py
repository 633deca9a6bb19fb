"""One option of each layer within a budget, against every combination there is; most options are ranks."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.solvers.allocation import knapsack
from spa_compiler.solvers.problem import F64


def tails_of(squares: F64) -> F64:
    """Of squared singular values."""
    return np.append(np.cumsum(np.sort(squares))[::-1], 0.0)


def combinations(costs: list[F64], losses: list[F64], budget: float) -> float:
    """The least loss of all combinations within the budget, infinite if there is none."""
    best = np.inf
    for options in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(c[o] for c, o in zip(costs, options, strict=True)) <= budget * (1 + 1e-9):
            best = min(best, sum(loss[o] for loss, o in zip(losses, options, strict=True)))
    return float(best)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[F64], list[float], list[float]]:
    """Tails, costs of a rank, dense costs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tails, per_rank, dense = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        n, k = draw(st.integers(2, 9)), draw(st.integers(2, 9))
        decay = draw(st.sampled_from([0.2, 0.7, 1.0]))
        tails.append(tails_of(rng.uniform(0.5, 1.5, min(n, k)) * decay ** np.arange(min(n, k))))
        per_rank.append(float(n + k))
        dense.append(float(n * k))
    return tails, per_rank, dense


def ranks_of(tail: F64, one: float, whole: float) -> list[int]:
    """The ranks that cost less than dense."""
    return [r for r in range(1, tail.size) if r * one < whole]


def options(tails: list[F64], per_rank: list[float], dense: list[float]) -> tuple[list[F64], list[F64]]:
    """What the ranks that pay and dense, the last option, cost and lose."""
    costs, losses = [], []
    for tail, one, whole in zip(tails, per_rank, dense, strict=True):
        ranks = ranks_of(tail, one, whole)
        costs.append(np.array([*(r * one for r in ranks), whole]))
        losses.append(np.array([*(tail[r] for r in ranks), 0.0]))
    return costs, losses


def allocate_ranks(
    tails: list[F64], per_rank: list[float], dense: list[float], budget: float, weights: tuple[float, ...] | None = None
) -> list[int | None]:
    """The rank of each layer, None where it stays dense."""
    costs, losses = options(tails, per_rank, dense)
    weighed = losses if weights is None else [loss * each for loss, each in zip(losses, weights, strict=True)]
    chosen = knapsack(costs, weighed, budget)
    return [
        [*ranks_of(tail, one, whole), None][option]
        for tail, one, whole, option in zip(tails, per_rank, dense, chosen, strict=True)
    ]


def spent(ranks: list[int | None], per_rank: list[float], dense: list[float]) -> float:
    return sum(d if r is None else r * c for r, c, d in zip(ranks, per_rank, dense, strict=True))


def lost(ranks: list[int | None], tails: list[F64]) -> float:
    return float(sum(0.0 if r is None else tail[r] for r, tail in zip(ranks, tails, strict=True)))


@given(layers(), st.floats(0.1, 1.1))
@settings(deadline=None, max_examples=150)
def test_budgets_against_brute_force(case: tuple[list[F64], list[float], list[float]], share: float) -> None:
    tails, per_rank, dense = case
    budget = share * sum(dense)
    ranks = allocate_ranks(tails, per_rank, dense, budget)
    costs, losses = options(tails, per_rank, dense)
    best = combinations(costs, losses, budget)
    if best == np.inf:
        assert spent(ranks, per_rank, dense) == sum(float(cost.min()) for cost in costs)
        return
    assert spent(ranks, per_rank, dense) <= budget * (1 + 1e-9)
    assert lost(ranks, tails) >= best - 1e-9
    step = max(float(loss[0] - loss[-1]) for loss in losses)  # no hull step saves more
    assert lost(ranks, tails) <= best + step
    # What a bound allows is not what is found: changes of single layers and of pairs leave nothing behind, so with
    # two layers the answer is the optimum.
    if len(tails) <= 2:
        assert lost(ranks, tails) <= best + 1e-6 * sum(float(loss[0]) for loss in losses)


def test_close_to_the_optimum_on_average() -> None:
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(60):
        tails = [tails_of(rng.uniform(0.1, 1, 8) * 0.7 ** np.arange(8)) for _ in range(4)]
        per_rank, dense = [16.0, 20.0, 16.0, 24.0], [64.0, 84.0, 60.0, 120.0]
        budget = rng.uniform(0.4, 0.9) * sum(dense)
        found = lost(allocate_ranks(tails, per_rank, dense, budget), tails)
        best = combinations(*options(tails, per_rank, dense), budget)
        gaps.append((found - best) / sum(float(tail[0]) for tail in tails))
    assert np.mean(np.array(gaps) < 1e-9) > 0.8
    assert np.max(gaps) < 0.02


def test_equal_layers_and_equal_costs_take_the_largest_singular_values() -> None:
    rng = np.random.default_rng(1)
    squares = [np.sort(rng.uniform(size=20))[::-1] * scale for scale in (1.0, 1.5, 2.0)]
    ranks = allocate_ranks([tails_of(s) for s in squares], [1.0] * 3, [1000.0] * 3, 30)
    cut = np.sort(np.concatenate(squares))[-30]
    assert ranks == [int((s >= cut).sum()) for s in squares]


def test_a_layer_that_needs_its_rank_stays_dense() -> None:
    flat, steep = tails_of(np.full(8, 1.0)), tails_of(0.1 ** np.arange(8.0))
    # Flat layers lose a quarter of their energy at the largest rank that pays; all of the budget's cut is for the other.
    assert allocate_ranks([flat, steep], [16, 16], [64, 64], 64 + 16) == [None, 1]
    assert allocate_ranks([steep, flat], [16, 16], [64, 64], 128) == [None, None]


def test_weights_change_who_gets_rank() -> None:
    tail = tails_of(0.5 ** np.arange(8.0))
    first = allocate_ranks([tail, tail], [16, 16], [64, 64], 64, weights=(100.0, 1.0))
    assert first == [3, 1]
    assert allocate_ranks([tail, tail], [16, 16], [64, 64], 64, weights=(1.0, 100.0)) == [1, 3]


@given(layers(), st.floats(0.2, 1.0))
@settings(deadline=None)
def test_repeats_are_equal(case: tuple[list[F64], list[float], list[float]], share: float) -> None:
    tails, per_rank, dense = case
    budget = share * sum(dense)
    assert allocate_ranks(tails, per_rank, dense, budget) == allocate_ranks(tails, per_rank, dense, budget)


def test_an_impossible_budget_gets_the_cheapest() -> None:
    tail = tails_of(0.5 ** np.arange(8.0))
    assert allocate_ranks([tail, tail], [16, 30], [64, 64], 1) == [1, 1]
    assert allocate_ranks([tail, tail], [16, 65], [64, 64], 1) == [1, None]


def test_more_budget_is_never_worse_for_the_lagrangian() -> None:
    rng = np.random.default_rng(4)
    tails = [tails_of(rng.uniform(0.1, 1, 12) * 0.8 ** np.arange(12)) for _ in range(6)]
    losses = [
        lost(allocate_ranks(tails, [24.0] * 6, [144.0] * 6, share * 864), tails) for share in np.linspace(0.2, 1, 40)
    ]
    assert losses[-1] == 0
    assert np.all(np.diff(losses) <= 1e-12)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_two_layers_with_any_options_get_the_optimum(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    costs = [rng.integers(1, 9, size).astype(np.float64) for size in rng.integers(1, 7, 2)]
    losses = [rng.random(len(cost)) for cost in costs]
    least, most = (sum(float(pick(cost)) for cost in costs) for pick in (np.min, np.max))
    budget = least + share * (most - least)
    chosen = knapsack(costs, losses, budget)
    assert sum(cost[option] for cost, option in zip(costs, chosen, strict=True)) <= budget * (1 + 1e-9)
    found = sum(loss[option] for loss, option in zip(losses, chosen, strict=True))
    assert abs(found - combinations(costs, losses, budget)) < 1e-8


def test_options_need_no_order_and_dominated_ones_are_not_taken() -> None:
    costs = [np.array([5.0, 1.0, 3.0, 3.0]), np.array([2.0, 4.0])]
    losses = [np.array([0.0, 9.0, 9.5, 2.0]), np.array([1.0, 1.5])]
    assert knapsack(costs, losses, 5) == [3, 0]
    with np.errstate(divide="raise", invalid="raise"):  # two cost the same
        assert knapsack([np.array([1.0, 3.0, 3.0])], [np.array([9.0, 2.0, 9.5])], 5) == [1]
    assert knapsack(costs, losses, 7) == [0, 0]
    assert knapsack(costs, losses, 3) == [1, 0]


def test_a_step_is_not_taken_after_one_that_it_follows_was_too_dear() -> None:
    # On the hull of the first layer, 6 more is too dear and 1 more after it is not; the second layer takes what is left.
    costs = [np.array([1.0, 7.0, 8.0]), np.array([1.0, 3.0])]
    losses = [np.array([20.0, 2.0, 0.0]), np.array([1.0, 0.5])]
    assert knapsack(costs, losses, 5) == [0, 1]


def test_a_budget_that_rounding_took_a_little_from_is_met() -> None:
    assert 0.29 * 100 < 29
    assert knapsack([np.array([10.0, 29.0])], [np.array([1.0, 0.0])], 0.29 * 100) == [1]
