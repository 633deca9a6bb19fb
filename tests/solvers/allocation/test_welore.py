"""WeLore: one threshold, the budget kept, dense where a factorization saves nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation import welore

SHAPES = st.lists(st.tuples(st.integers(4, 30), st.integers(4, 30)), min_size=1, max_size=5)


def _spectra(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        10.0 ** rng.integers(-5, 5) * np.sort(rng.random(min(shape)) ** rng.integers(1, 6))[::-1] for shape in shapes
    ]


def _parameters(ranks: np.ndarray, shapes: list[tuple[int, int]]) -> int:
    return sum(min(int(rank) * (n + k), n * k) for rank, (n, k) in zip(ranks, shapes, strict=True))


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.floats(0, 0.5), st.sampled_from([1, 1, 3, 8]))
def test_one_threshold_and_the_most_that_the_budget_has(
    shapes: list[tuple[int, int]], seed: int, sparsity: float, multiple: int
) -> None:
    spectra = _spectra(shapes, seed)
    dense = sum(n * k for n, k in shapes)
    try:
        ranks = welore(spectra, shapes, sparsity, multiple=multiple)
    except BudgetError:
        assert _parameters(np.full(len(shapes), multiple), shapes) > (1 - sparsity) * dense
        return
    assert (ranks >= 1).all()
    assert _parameters(ranks, shapes) <= (1 - sparsity) * dense + 1e-6
    kept, gone = [np.inf], []
    for spectrum, rank in zip(spectra, ranks, strict=True):
        assert rank % multiple == 0 or rank == len(spectrum)
        first = spectrum[::multiple] / spectrum[0]
        kept.extend(first[1 : -(-int(rank) // multiple)])
        gone.extend(first[-(-int(rank) // multiple) :])
    assert min(kept) >= max(gone, default=0)
    if gone:
        # One threshold lower, ties included one by one, and the budget is broken.
        more = []
        for layer, (spectrum, rank) in enumerate(zip(spectra, ranks, strict=True)):
            if rank < len(spectrum) and spectrum[rank] / spectrum[0] == max(gone):
                raised = ranks.copy()
                raised[layer] = min(rank + multiple, len(spectrum))
                more.append(_parameters(raised, shapes))
        assert max(more) > (1 - sparsity) * dense


def test_scale_does_not_matter_and_a_steep_spectrum_gets_less() -> None:
    flat, steep = np.linspace(1, 0.5, 64), 0.8 ** np.arange(64)
    ranks = welore([flat, 1e6 * steep], [(64, 64)] * 2, 0.4)
    assert ranks[0] == 64  # dense
    assert ranks[1] < 10


def test_nothing_asked_is_everything_kept() -> None:
    assert welore([np.ones(4), np.arange(5, 0, -1.0)], [(4, 9), (5, 5)], 0.0).tolist() == [4, 5]


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"ranks of 8 in all layers have 100.00% .* more than 50.00%"):
        welore([np.ones(8)], [(8, 8)], 0.5, multiple=8)


def test_a_spectrum_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer 1 \[3, 4\] needs 3"):
        welore([np.ones(2), np.ones(4)], [(2, 2), (3, 4)], 0.5)
    with pytest.raises(ValueError, match="descending"):
        welore([np.array([1.0, 2.0])], [(2, 2)], 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_of_its_range_is_an_error(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        welore([np.ones(2)], [(2, 2)], sparsity)


def test_a_layer_of_zeros_compares_with_others() -> None:
    with np.errstate(invalid="raise"):
        assert welore([np.zeros(8), 0.5 ** np.arange(8)], [(8, 8)] * 2, 0.5).tolist() == [1, 3]
