"""Ranks by energy against the knapsack that knows all choices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation import by_energy, exact, saved

SHAPES = st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=1, max_size=4)


def _spectra(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.random(min(shape)) ** rng.integers(1, 6))[::-1] for shape in shapes]


def _lost(spectra: list[np.ndarray], ranks: np.ndarray) -> float:
    return sum(float(np.square(spectrum[rank:]).sum()) for spectrum, rank in zip(spectra, ranks, strict=True))


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_close_to_the_best_ranks_there_are(shapes: list[tuple[int, int]], seed: int, sparsity: float) -> None:
    spectra, sizes = _spectra(shapes, seed), np.array([n * k for n, k in shapes])
    most = max(min(shape) for shape in shapes)
    losses = np.full((len(shapes), most), np.inf)
    shares = np.zeros((len(shapes), most))
    for layer, (n, k) in enumerate(shapes):
        for rank in range(1, min(n, k) + 1):
            losses[layer, rank - 1] = _lost([spectra[layer]], np.array([rank]))
            shares[layer, rank - 1] = saved(np.array([rank]), [(n, k)])[0]
    try:
        ranks = by_energy(spectra, shapes, sparsity)
    except BudgetError:
        with pytest.raises(BudgetError):
            exact(shares, losses, sizes, sparsity)
        return
    best = exact(shares, losses, sizes, sparsity, resolution=10**6)
    optimum = losses[range(len(shapes)), best].sum()
    assert saved(ranks, shapes) @ sizes >= sparsity * sizes.sum() - 1e-6
    # The gap is at most the one step that did not fit, which is at most what some layer lost.
    assert (
        optimum - 1e-9
        <= _lost(spectra, ranks)
        <= optimum + max(losses[layer, 0] for layer in range(len(shapes))) + 1e-9
    )


def test_planted_ranks_are_found() -> None:
    spectra = [np.r_[np.ones(rank), np.full(32 - rank, 1e-6)] for rank in (3, 9, 5)]
    budget = (3 + 9 + 5) * 64 / (3 * 32 * 32)
    assert by_energy(spectra, [(32, 32)] * 3, 1 - budget).tolist() == [3, 9, 5]


def test_a_flat_spectrum_stays_dense_where_a_steep_one_can_pay() -> None:
    spectra = [np.ones(32), 0.5 ** np.arange(32)]
    ranks = by_energy(spectra, [(32, 32)] * 2, 0.4)
    assert ranks[0] == 32
    assert ranks[1] <= 6


def test_multiples() -> None:
    ranks = by_energy(_spectra([(64, 64)] * 3, 0), [(64, 64)] * 3, 0.5, multiple=8)
    assert all(rank % 8 == 0 for rank in ranks)
    assert saved(ranks, [(64, 64)] * 3).mean() >= 0.5


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="ranks of 4 in all layers have 64 parameters, more than 32"):
        by_energy([np.ones(8)], [(8, 8)], 0.5, multiple=4)


def test_no_layers_have_no_ranks() -> None:
    assert by_energy([], [], 0.5).shape == (0,)
