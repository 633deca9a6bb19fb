"""By error: the shares of zeros with the least sum of the layers' errors, from errors measured at a few levels.

    minimize sum_l E_l(share[l])      subject to sum_l sizes[l] * share[l] = sparsity * sum_l sizes[l]

Between its levels the logarithm of E_l is linear, which is close to how output errors grow; from a level without an
error it grows with the cube, as the sum of squares does when the smallest of weights with a density at 0 go. On the
lower convex hull of E_l the problem is exact: the optimum takes from all layers the steps with the least error per
zero first (Everett, "Generalized Lagrange multiplier method", 1963; the same as bisecting for the multiplier).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spa_compiler.solvers.allocation.budget import F64, Sizes, ceilings, fit
from spa_compiler.solvers.allocation.hull import lower_hull

_STEPS = 256
"""Points at which each curve is followed, besides its levels: shares are within 1/256 of those of the curves."""


def by_error(
    levels: ArrayLike, errors: ArrayLike, sizes: Sizes, sparsity: float, *, max_sparsity: float | F64 | None = None
) -> F64:
    """Share of zeros per layer, `[L]`; at most one layer is off the convex hull of its errors.

    Args:
        levels: shares of zeros at which errors are known, ascending, `[m]`, or `[L, m]` where layers have their own.
            No layer gets more than its last one.
        errors: additive losses, not negative, `[L, m]`; where one falls with the level, the higher before it counts.

    Raises:
        BudgetError: `max_sparsity` and the last levels leave too few zeros.
        ValueError: the levels do not ascend within [0, 1], or an error is negative or not finite.
    """
    known, losses = curves(levels, errors)
    limit = np.inf if max_sparsity is None else max_sparsity
    highest = ceilings(sizes, sparsity, np.minimum(limit, known[:, -1]))
    shares, steps, owners = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, np.int64)]
    for layer in range(len(sizes)):
        at = np.union1d(np.linspace(0, highest[layer], _STEPS + 1), known[layer][known[layer] < highest[layer]])
        curve = between(at, known[layer], losses[layer])
        corners = lower_hull(at, curve)
        shares.append(np.diff(at[corners]))
        steps.append(np.diff(curve[corners]) / (shares[-1] * sizes[layer]))
        owners.append(np.full(len(corners) - 1, layer))
    share, owner = np.concatenate(shares), np.concatenate(owners)
    order = np.argsort(np.concatenate(steps), kind="stable")
    zeros = (share * np.asarray(sizes, np.float64)[owner])[order].cumsum()
    target = sparsity * float(np.sum(sizes))
    whole = int(np.searchsorted(zeros, target, side="right"))
    result = np.bincount(owner[order[:whole]], share[order[:whole]], minlength=len(sizes))
    if whole < len(order):
        last = owner[order[whole]]
        result[last] += (target - (zeros[whole - 1] if whole else 0.0)) / sizes[last]
    # Takes up what rounding left.
    return fit(1 - result, 1.0, sizes, sparsity, highest)


def curves(levels: ArrayLike, errors: ArrayLike) -> tuple[F64, F64]:
    """Levels and errors, both `[L, m]` or `[L, m + 1]`: from level 0, where there is no error, and never falling.

    Raises:
        ValueError: as `by_error`.
    """
    losses = np.asarray(errors, np.float64)
    known = np.broadcast_to(np.asarray(levels, np.float64), losses.shape)
    if losses.ndim != 2 or not losses.shape[1]:
        raise ValueError(f"errors are [layers, levels], not {list(losses.shape)}")
    if not (np.isfinite(losses).all() and (losses >= 0).all()):
        raise ValueError("errors must be finite and not negative")
    if (known < 0).any() or (known > 1).any() or (np.diff(known) <= 0).any():
        raise ValueError("levels must ascend within [0, 1]")
    if (known[:, 0] > 0).any():
        zero = np.zeros((len(losses), 1))
        if (known[:, 0] == 0).any():
            raise ValueError("either all layers have a level 0 or none")
        known, losses = np.hstack([zero, known]), np.hstack([zero, losses])
    return known, np.maximum.accumulate(losses, axis=1)


def between(at: F64, levels: F64, errors: F64) -> F64:
    """The error at each share `at`, which lie between the first and the last of `levels [m]`."""
    if len(levels) == 1:
        return np.full(at.shape, errors[0])
    right = np.clip(np.searchsorted(levels, at, side="left"), 1, len(levels) - 1)
    left = right - 1
    part = (at - levels[left]) / (levels[right] - levels[left])
    low, high = errors[left], errors[right]
    positive = low > 0
    ratio = np.divide(high, low, out=np.ones_like(high), where=positive)
    return np.where(positive, low * ratio**part, high * part**3)
