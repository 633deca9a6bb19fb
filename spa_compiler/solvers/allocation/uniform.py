"""Uniform: the same share of zeros in every layer, but for layers too small to have it."""

from __future__ import annotations

from spa_compiler.solvers.allocation.budget import F64, Sizes, ceilings, fit


def uniform(sizes: Sizes, sparsity: float, *, max_sparsity: float | F64 | None = None) -> F64:
    """Share of zeros per layer, `[L]`.

    Raises:
        BudgetError: `max_sparsity` leaves too few zeros.
    """
    return fit(1 - sparsity, 1.0, sizes, sparsity, ceilings(sizes, sparsity, max_sparsity))
