"""Ranks of one layer, and of many within a budget: against enumeration, and what must hold for every model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.passes import ranks
from spa_compiler.passes.ranks import Layer
from spa_compiler.solvers import svd
from spa_compiler.solvers.problem import F64
from spa_compiler.solvers.tucker import channels_of, energies, tucker2
from tests.layer_problems import correlated


def layer_of(n: int, k: int, seed: int = 0, multiple: int = 1, each: float = 1.0) -> Layer:
    return ranks.linear(svd.whitened(correlated(n, k, seed)).tails, (n, k), each, multiple)


def test_the_ranks_of_a_weight_cost_what_their_factors_hold_and_save_a_tenth() -> None:
    layer = layer_of(12, 16, each=5.0)
    assert layer.options == ((1,), (2,), (3,), (4,), (5,), (6,))  # 28 * 6 = 168 <= 0.9 * 192 < 28 * 7
    np.testing.assert_array_equal(layer.costs, [140, 280, 420, 560, 700, 840])
    assert layer.dense == 960
    problem = correlated(12, 16, 0)
    whole = problem.loss(np.zeros((12, 16)))
    for (rank,), loss in zip(layer.options, layer.losses, strict=True):
        lost = problem.loss(svd.whitened(problem).truncate(rank).weight)
        assert loss == pytest.approx(lost / whole, rel=1e-9)


def test_ranks_are_multiples() -> None:
    assert layer_of(64, 64, multiple=8).options == ((8,), (16,), (24,))
    assert layer_of(8, 8, multiple=8).options == ()
    assert layer_of(8, 8, multiple=64).options == ()


def test_the_dearest_option_within_a_share() -> None:
    layer = layer_of(12, 16)
    assert layer.within(3 * 28 / 192) == (3,)
    assert layer.within(3 * 28 / 192 - 1e-6) == (2,)
    assert layer.within(0.99) == (6,)
    assert layer.within(0.0) == (1,)
    assert layer.within(1.0) is None
    assert layer_of(8, 8, multiple=8).within(0.5) is None
    assert [layer.cost((2,)), layer.cost(None)] == [56, 192]
    assert [layer.loss((2,)), layer.loss(None)] == [layer.losses[1], 0.0]


def test_the_cheapest_option_of_a_loss() -> None:
    layer = layer_of(12, 16)
    for place, loss in enumerate(layer.losses):
        assert layer.by_loss(float(loss)) == layer.options[place]
    assert layer.by_loss(float(layer.losses[-1]) * 0.99) is None
    assert layer.by_loss(1.0) == (1,)
    assert layer_of(8, 8, multiple=8).by_loss(1.0) is None


def test_a_weight_of_zeros_loses_nothing_at_any_rank() -> None:
    problem = correlated(12, 16, 0)
    tails = svd.whitened(type(problem)(np.zeros((12, 16)), problem.gram, problem.mean, problem.count)).tails
    assert ranks.linear(tails, (12, 16), 1.0, 1).by_loss(0.0) == (1,)


def kernel_of(seed: int = 0, multiple: int = 1, inside: float = 1.0, outside: float = 1.0) -> tuple[Layer, F64, F64]:
    problem = correlated(6, 5 * 9, seed)
    weight = problem.weight.reshape(6, 5, 3, 3)
    gram = channels_of(problem.gram, 5)
    return ranks.kernel(weight, gram, inside, outside, multiple), weight, gram


@pytest.mark.parametrize("inside, outside", [(1.0, 1.0), (49.0, 16.0)])
def test_pairs_of_ranks_of_a_kernel(inside: float, outside: float) -> None:
    layer, weight, gram = kernel_of(inside=inside, outside=outside)
    whole = np.einsum("mcyx,cd,mdyx->", weight, gram, weight)
    assert layer.dense == 270 * outside
    assert layer.costs[-1] <= 0.9 * layer.dense
    # A frontier: what costs more loses less.
    assert (np.diff(layer.costs) >= 0).all()
    assert (np.diff(layer.losses) < 0).all()
    for (inner, outer), cost, loss in zip(layer.options, layer.costs, layer.losses, strict=True):
        found = tucker2(weight, (inner, outer), gram)
        assert cost == found.first.size * inside + (found.core.size + found.last.size) * outside
        change = found.weight - weight
        assert np.einsum("mcyx,cd,mdyx->", change, gram, change) <= loss * whole * (1 + 1e-9)
    # Every pair that saves enough is matched by one that costs no more and loses no more.
    lost_inside, lost_outside = energies(weight, gram)
    for inner, outer in itertools.product(range(1, 6), range(1, 7)):
        cost = 5 * inner * inside + (inner * outer * 9 + outer * 6) * outside
        loss = (lost_inside[inner] + lost_outside[outer]) / whole
        if cost <= 0.9 * layer.dense:
            assert layer.losses[layer.costs <= cost].min() <= loss * (1 + 1e-9)


def test_pairs_of_ranks_are_multiples_and_may_be_none() -> None:
    assert all(inner % 2 == outer % 3 == 0 for inner, outer in kernel_of(multiple=6)[0].options)
    assert all(inner % 2 == outer % 2 == 0 for inner, outer in kernel_of(multiple=2)[0].options)
    assert kernel_of(multiple=2)[0].options
    assert kernel_of(multiple=8)[0].options == ()


layers = st.lists(
    st.builds(layer_of, st.integers(2, 24), st.integers(2, 24), st.integers(0, 5), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=4,
)


def total(chosen: list[ranks.Rank | None], several: list[Layer]) -> float:
    return sum(layer.cost(choice) for layer, choice in zip(several, chosen, strict=True))


def cheapest(several: list[Layer]) -> float:
    return sum(layer.cost(layer.within(0.0)) for layer in several)


@given(layers, st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_every_allocation_keeps_the_budget_where_it_can(several: list[Layer], share: float) -> None:
    budget = share * sum(layer.dense for layer in several)
    for chosen in (ranks.uniform(several, share), ranks.by_error(several, share)):
        assert total(chosen, several) <= max(budget, cheapest(several)) * (1 + 1e-6)


@given(layers, st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_uniform_is_the_largest_share_that_fits(several: list[Layer], share: float) -> None:
    chosen = ranks.uniform(several, share)
    whole = sum(layer.dense for layer in several)
    parts = sorted({float(cost / layer.dense) for layer in several for cost in layer.costs})
    fits = [part for part in parts if total([layer.within(part) for layer in several], several) <= share * whole]
    assert chosen == [layer.within(fits[-1] if fits else 0.0) for layer in several]


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_by_error_comes_near_the_best_of_all_choices(share: float, seed: int) -> None:
    several = [layer_of(12, 16, seed), layer_of(16, 8, seed + 10), layer_of(10, 10, seed + 20)]
    weights = np.array([1.0, 3.0, 0.2])
    budget = share * sum(layer.dense for layer in several)

    def lost(chosen: tuple[ranks.Rank | None, ...] | list[ranks.Rank | None]) -> float:
        powers = np.sqrt(weights)
        return sum(p * layer.loss(c) for p, layer, c in zip(powers, several, chosen, strict=True))

    everything = itertools.product(*[(*layer.options, None) for layer in several])
    best = min(lost(chosen) for chosen in everything if total(list(chosen), several) <= budget)
    found = ranks.by_error(several, share, weights)
    assert total(found, several) <= budget * (1 + 1e-9)
    assert lost(found) <= 1.1 * best + 1e-12


def test_what_the_outputs_react_to_keeps_more() -> None:
    several = [layer_of(24, 24, 1), layer_of(24, 24, 1)]
    equal = ranks.by_error(several, 0.5)
    skewed = ranks.by_error(several, 0.5, np.array([100.0, 1.0]))
    assert several[0].cost(skewed[0]) > several[0].cost(equal[0])
    assert several[1].cost(skewed[1]) < several[1].cost(equal[1])
    # Nothing reacts: as if all did alike. One does not: it still counts a little.
    assert ranks.by_error(several, 0.5, np.zeros(2)) == equal
    assert all(choice is not None for choice in ranks.by_error(several, 0.1, np.array([1.0, 0.0])))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_welore_is_one_threshold_on_relative_singular_values(share: float) -> None:
    several = [layer_of(24, 24, 1), layer_of(24, 16, 2), layer_of(20, 24, 3)]
    chosen = ranks.by_welore(several, share, 1)
    assert total(chosen, several) <= share * sum(layer.dense for layer in several)
    spectra = [layer.spectrum / layer.spectrum[0] for layer in several if layer.spectrum is not None]
    kept = [s[c[0] - 1] for s, c in zip(spectra, chosen, strict=True) if c is not None]
    gone = [s[c[0]] for s, c in zip(spectra, chosen, strict=True) if c is not None]
    assert min(kept) >= max(gone)


def test_welore_where_a_rank_saves_too_little() -> None:
    # At rank 11 of 24 x 24 528 of 576 parameters are left: less than a tenth saved, so it gets rank 10.
    layer = layer_of(24, 24, 1)
    assert ranks.by_welore([layer], 0.93, 1) == [(10,)]
