"""The budget that every allocation meets: so many zeros in all layers together, none of them emptied.

    sum_l sizes[l] * share[l] = sparsity * sum_l sizes[l],        0 <= share[l] <= ceilings[l] < 1

`fit` solves this exactly, up to rounding, for all rules in which one number raises the density of every layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spa_compiler.errors import BudgetError

F64: TypeAlias = NDArray[np.float64]
Sizes: TypeAlias = Sequence[int] | NDArray[np.int64] | F64
"""Elements of each layer, `[L]`, all positive."""

MIN_KEEP = 0.2
"""What a layer keeps at least where nothing else is asked, of the mean share that layers keep."""

_ROUNDING = 1e-12
"""Relative; below it, two counts of elements are the same and a slope is none."""


def ceilings(sizes: Sizes, sparsity: float, max_sparsity: float | F64 | None) -> F64:
    """The highest share of zeros that each layer may get, `[L]`; one element of every layer stays in any case.

    Args:
        max_sparsity: of every layer, or one for each, `[L]`; None keeps `MIN_KEEP` of the mean density everywhere.

    Raises:
        BudgetError: even with all layers at their ceilings there are too few zeros.
        ValueError: a layer has no element, or `sparsity` is not in [0, 1).
    """
    elements = np.asarray(sizes, np.float64)
    if (elements < 1).any():
        raise ValueError("every layer needs at least one element")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, not in [0, 1)")
    limit = 1 - MIN_KEEP * (1 - sparsity) if max_sparsity is None else np.asarray(max_sparsity, np.float64)
    highest: F64 = np.clip(np.broadcast_to(limit, elements.shape), 0, 1 - 1 / elements)
    reachable, total = float(elements @ highest), float(elements.sum())
    if sparsity * total > reachable + _ROUNDING * total:
        raise BudgetError(
            f"no allocation has {sparsity:.2%} zeros, all layers at their highest shares have {reachable / total:.2%}",
            fix="Ask for fewer zeros, or allow more per layer",
        )
    return highest


def fit(base: ArrayLike, slope: ArrayLike, sizes: Sizes, sparsity: float, highest: F64) -> F64:
    """Shares of zeros whose densities are `base + c * slope`, clipped, with the c that meets the budget.

        density[l] = clip(base[l] + c * slope[l], 1 - highest[l], 1),      share = 1 - density

    What clipping takes or adds is so made up for by the layers that are not clipped. When all layers with a slope are
    dense and the budget keeps still more, layers without one are raised evenly.

    Args:
        base: `[L]`.
        slope: `[L]`, not negative.
        highest: `ceilings` of the same sizes and sparsity, `[L]`.

    Raises:
        ValueError: a slope is negative or not finite.
    """
    elements = np.asarray(sizes, np.float64)
    start, rise = np.broadcast_to(base, elements.shape).astype(np.float64), np.asarray(slope, np.float64)
    rise = np.broadcast_to(rise, elements.shape)
    if not elements.size:
        return np.zeros(0)
    if not (np.isfinite(rise).all() and (rise >= 0).all()):
        raise ValueError("scores of layers must be finite and not negative")
    rise = rise / (rise.max() or 1)
    sloped = rise > _ROUNDING
    lowest = 1 - highest
    kept = (1 - sparsity) * float(elements.sum())

    def densities(c: float) -> F64:
        return np.clip(start + c * np.where(sloped, rise, 0), lowest, 1)

    def count(c: float) -> float:
        return float(elements @ densities(c))

    # The count is linear between the c at which some layer enters or leaves its bounds.
    bends = np.unique(np.concatenate([bound[sloped] for bound in _bends(start, rise, sloped, lowest)]))
    at = bisect_left(bends, kept, key=count)
    if at == 0:
        return _even(densities(bends[0]) if bends.size else densities(0), elements, kept, highest, sloped)
    if at == bends.size:
        return _even(densities(bends[-1]), elements, kept, highest, sloped)
    left, right = count(bends[at - 1]), count(bends[at])
    c = bends[at - 1] + (bends[at] - bends[at - 1]) * (kept - left) / (right - left)
    return np.clip(1 - densities(c), 0, highest)


def _bends(start: F64, rise: F64, sloped: NDArray[np.bool_], lowest: F64) -> tuple[F64, F64]:
    safe = np.where(sloped, rise, 1)
    return (lowest - start) / safe, (1 - start) / safe


def _even(density: F64, elements: F64, kept: float, highest: F64, sloped: NDArray[np.bool_]) -> F64:
    """All sloped layers are at a bound: the others take what is left, by one step for all of them."""
    others = ~sloped
    rest = kept - float(elements[sloped] @ density[sloped])
    if others.any() and abs(float(elements[others] @ density[others]) - rest) > _ROUNDING * float(elements.sum()):
        part = elements[others]
        share = fit(density[others], np.ones(part.size), part, 1 - rest / float(part.sum()), highest[others])
        density = density.copy()
        density[others] = 1 - share
    return np.clip(1 - density, 0, highest)
