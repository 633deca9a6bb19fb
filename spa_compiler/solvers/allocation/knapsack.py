"""Exact: the best choice of one level per layer, by dynamic programming over the number of zeros.

    minimize sum_l errors[l, c[l]]      subject to sum_l sizes[l] * levels[c[l]] >= sparsity * sum_l sizes[l]

The multiple-choice knapsack (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11). For losses that add
up; `evolution.py` is for those that do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation.budget import Sizes

_PARTS = 1000
"""Zeros are counted in thousandths of an element, so that shares like 0.3 compare as they are meant."""


def exact(
    levels: ArrayLike, errors: ArrayLike, sizes: Sizes, sparsity: float, *, resolution: int = 10_000
) -> list[int]:
    """The index of each layer's level, the lowest where losses are equal.

    Args:
        levels: shares of zeros, `[m]`, or `[L, m]` where layers have their own.
        errors: losses that add up, `[L, m]`; infinite where a layer must not have a level.
        resolution: cells that the budget is divided into. If the zeros of all choices are multiples of a cell (as with
            even levels and sizes that are multiples of each other), the answer is the best there is. Else zeros are
            counted down to whole cells, and the answer may have up to a cell of zeros per layer more than it needs.

    Raises:
        BudgetError: no allowed choice has enough zeros.
    """
    losses = np.asarray(errors, np.float64)
    if losses.ndim != 2 or np.isnan(losses).any():
        raise ValueError(f"errors are [layers, levels] without NaN, not {list(losses.shape)}")
    shares = np.broadcast_to(np.asarray(levels, np.float64), losses.shape)
    elements = np.asarray(sizes, np.float64)
    zeros = np.rint(_PARTS * shares * elements[:, None]).astype(np.int64)
    # Each layer's zeros were rounded by up to half a part.
    target = max(0, int(np.rint(_PARTS * sparsity * float(elements.sum()))) - len(losses) // 2)
    most = np.where(np.isfinite(losses), zeros, -1).max(axis=1, initial=-1)
    if (most < 0).any() or int(most.sum()) < target:
        reach = max(0.0, float(most.sum())) / (_PARTS * float(elements.sum()))
        raise BudgetError(
            f"no choice of levels has {sparsity:.2%} zeros, at most {reach:.2%}", fix="Ask for fewer zeros"
        )
    cell = max(int(np.gcd.reduce(zeros, axis=None)), -(-target // resolution), 1)
    needed = -(-target // cell)
    if needed > int((most // cell).sum()):
        # Counted down, even the most zeros are too few; whole, they are enough, and less than L cells too many.
        return [int(level) for level in np.where(np.isfinite(losses), zeros, -1).argmax(axis=1)]
    return _choose(zeros // cell, losses, needed)


def _choose(zeros: NDArray[np.int64], losses: NDArray[np.float64], target: int) -> list[int]:
    """Levels with the least loss that have at least `target` cells of zeros."""
    need = np.arange(target + 1)
    least = np.where(need == 0, 0.0, np.inf)  # of the layers behind, for each number of cells that they must have
    picks = []
    for layer in reversed(range(len(losses))):
        costs = np.stack(
            [loss + least[np.maximum(need - z, 0)] for z, loss in zip(zeros[layer], losses[layer], strict=True)]
        )
        picks.append(costs.argmin(axis=0))
        least = costs.min(axis=0)
    chosen, rest = [], len(need) - 1
    for layer, pick in enumerate(reversed(picks)):
        chosen.append(int(pick[rest]))
        rest = max(0, rest - int(zeros[layer, chosen[-1]]))
    return chosen
