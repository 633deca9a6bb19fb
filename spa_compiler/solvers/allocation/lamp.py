"""LAMP: one threshold for all layers on what a weight is of all weights of its layer that are at least as large.

    score[k] = w_(k)^2 / sum_{j >= k} w_(j)^2        w_(1)^2 <= w_(2)^2 <= ... the squares of one layer in order

The largest weight of a layer scores 1, and a factor on a layer changes nothing, so layers compare whatever their
scale. Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.allocation.budget import F64, Sizes, ceilings, fit

_BITS = 48
"""Of a score, left out of the first count: 16 bits have its exponent and the first four digits of its fraction."""


def lamp(
    importance: Callable[[int], NDArray[Any]],
    sizes: Sizes,
    sparsity: float,
    *,
    max_sparsity: float | F64 | None = None,
) -> F64:
    """Share of zeros per layer, `[L]`. Equal scores at the threshold go in equal parts.

    Memory: the squares of one layer, and of all layers only the scores within a sixteenth of the threshold.

    Args:
        importance: the squared magnitudes of a layer, or their means over the units of a pattern, in any shape; called
            twice per layer.

    Raises:
        BudgetError: `max_sparsity` leaves too few zeros.
    """
    highest = ceilings(sizes, sparsity, max_sparsity)
    target = sparsity * float(np.sum(sizes))

    def removable(layer: int) -> tuple[F64, float]:
        """Scores in order, without those that the ceiling protects; and the elements that one of them stands for."""
        scores = layer_scores(importance(layer))
        return scores[: int(highest[layer] * scores.size)], sizes[layer] / scores.size

    counts = np.zeros(1 << 16)
    for layer in range(len(sizes)):
        scores, weight = removable(layer)
        counts += weight * np.bincount(_digits(scores), minlength=counts.size)
    digit = int(np.searchsorted(counts.cumsum(), target))
    gone, weights = np.zeros(len(sizes)), np.zeros(len(sizes))
    near, owners = [np.zeros(0)], [np.zeros(0, np.int64)]
    for layer in range(len(sizes)):
        scores, weight = removable(layer)
        first, last = np.searchsorted(_digits(scores), [digit, digit + 1])
        gone[layer] = first * weight
        near.append(scores[first:last].copy())
        owners.append(np.full(last - first, layer))
        weights[layer] = weight
    gone += _lowest(np.concatenate(near), np.concatenate(owners), weights, target - float(gone.sum()))
    # A ceiling that falls between two elements leaves less than one element per layer to make up for.
    return fit(1 - gone / np.asarray(sizes, np.float64), 1.0, sizes, sparsity, highest)


def layer_scores(importance: NDArray[Any]) -> F64:
    """The scores of one layer's elements in ascending order, `[size]`; zeros score 0."""
    squares = np.sort(np.asarray(importance, np.float64).ravel())
    rest = squares[::-1].cumsum()[::-1]
    scores: F64 = np.divide(squares, rest, out=np.zeros_like(squares), where=rest > 0)
    return scores


def _digits(scores: F64) -> NDArray[np.int64]:
    """In the order of the scores, which are not negative."""
    return scores.view(np.int64) >> _BITS


def _lowest(scores: F64, owners: NDArray[np.int64], weights: F64, target: float) -> F64:
    """Elements of each layer, `[L]`, among the lowest `target` elements of those with `scores`."""
    gone = np.zeros(weights.size)
    if not scores.size or target <= 0:
        return gone
    order = np.argsort(scores)
    reached = weights[owners[order]].cumsum()
    threshold = scores[order[min(int(np.searchsorted(reached, target)), order.size - 1)]]
    gone += weights * np.bincount(owners[scores < threshold], minlength=weights.size)
    ties = weights * np.bincount(owners[scores == threshold], minlength=weights.size)
    part = (target - float(gone.sum())) / float(ties.sum())
    return gone + min(part, 1.0) * ties
