"""From shares to levels: the nearest choice among levels that were computed beforehand, with the budget kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spa_compiler.solvers.allocation.budget import F64, Sizes


def to_levels(share: ArrayLike, sizes: Sizes, levels: ArrayLike) -> list[int]:
    """The index of each layer's level: the nearest, then single steps that bring the sum of zeros nearer to that of
    `share`, those first that move a layer's elements least away from it, until no single step does.

    Args:
        share: of zeros per layer, `[L]`.
        levels: shares of zeros, ascending, `[m]`, or `[L, m]` where layers have their own.

    Raises:
        ValueError: the levels do not ascend, or there is none.
    """
    wanted, elements = np.asarray(share, np.float64), np.asarray(sizes, np.float64)
    zeros = level_zeros(levels, sizes)
    rows = np.arange(len(elements))
    away = np.abs(zeros - (wanted * elements)[:, None])
    choice = away.argmin(axis=1)
    missing = float(wanted @ elements) - float(zeros[rows, choice].sum())
    while True:
        best: tuple[float, int, int] | None = None
        for step in (-1, 1):
            to = np.clip(choice + step, 0, zeros.shape[1] - 1)
            gain = zeros[rows, to] - zeros[rows, choice]
            # Strictly nearer by more than rounding, so that this ends.
            nearer = np.abs(missing - gain) < abs(missing) - 1e-9 * elements
            cost = np.where(nearer, away[rows, to] - away[rows, choice], np.inf)
            layer = int(cost.argmin()) if len(cost) else 0
            if nearer.any() and (best is None or cost[layer] < best[0]):
                best = (float(cost[layer]), layer, step)
        if best is None:
            return [int(level) for level in choice]
        _, layer, step = best
        missing -= float(zeros[layer, choice[layer] + step] - zeros[layer, choice[layer]])
        choice[layer] += step


def level_zeros(levels: ArrayLike, sizes: Sizes) -> F64:
    """Zeros of each layer at each level, `[L, m]`, of levels `[m]` or `[L, m]` that ascend.

    Raises:
        ValueError: as `to_levels`.
    """
    shares = np.asarray(levels, np.float64)
    if shares.ndim == 0 or shares.shape[-1] == 0 or (np.diff(shares) <= 0).any():
        raise ValueError("levels must ascend, and there must be one")
    zeros: NDArray[np.float64] = shares * np.asarray(sizes, np.float64)[:, None]
    return zeros
