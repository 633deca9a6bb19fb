"""Proportional: a layer keeps the more, the more its error matters.

    density[l] = 1 - max_sparsity + c * score[l]^power,     at most 1, c such that the budget is met

The form of ECoFLaP's rule (`ecoflap.py`), with any score per weight in place of its gradient: a layer's relative
output error when all layers have the same share of zeros, say.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spa_compiler.solvers.allocation.budget import F64, Sizes, ceilings, fit


def proportional(
    scores: ArrayLike, sizes: Sizes, sparsity: float, *, power: float = 1.0, max_sparsity: float | F64 | None = None
) -> F64:
    """Share of zeros per layer, `[L]`. A factor on all scores changes nothing.

    Args:
        scores: what an average weight of each layer matters, not negative, `[L]`.
        power: below 1 draws the layers together (0 is uniform), above 1 apart.

    Raises:
        BudgetError: `max_sparsity` leaves too few zeros.
        ValueError: a score is negative or not finite.
    """
    highest = ceilings(sizes, sparsity, max_sparsity)
    values = np.asarray(scores, np.float64)
    # Scaled before the power, which could otherwise overflow.
    return fit(1 - highest, (values / (values.max(initial=0.0) or 1)) ** power, sizes, sparsity, highest)
