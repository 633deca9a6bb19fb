"""By energy: the ranks with the least sum of squared singular values lost, in a budget of parameters.

    minimize sum_l sum_{i >= r_l} s[l, i]^2      subject to sum_l min(r_l (n_l + k_l), n_l k_l) <= budget

With the singular values of activation-whitened weights, the sum is the loss of all layers' outputs (Eckart, Young,
1936). A layer's loss falls convexly with its rank, but for the last step, to the dense weight; on the lower convex hull
the best ranks take the steps with the most energy per parameter first. What then is too little for the next step
goes to the best single steps that it still pays for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation.budget import F64
from spa_compiler.solvers.allocation.hull import lower_hull
from spa_compiler.solvers.allocation.ranks import Ranks, affordable, check_spectra, parameters


def by_energy(
    singular: Sequence[F64], shapes: Sequence[tuple[int, int]], sparsity: float, *, multiple: int = 1
) -> Ranks:
    """Ranks with at most `1 - sparsity` of the dense parameters.

    Args:
        singular: singular values of each layer in descending order, `[min(n, k)]`, scaled so that their squares
            compare across layers: relative to a layer's whole energy, say.
        shapes: (n, k) of each layer.
        multiple: ranks come in multiples of this; no layer has less.

    Raises:
        BudgetError: even ranks of `multiple` have more parameters.
    """
    check_spectra(singular, shapes)
    if not shapes:
        return np.zeros(0, np.int64)
    curves = [_curve(spectrum, n, k, multiple) for spectrum, (n, k) in zip(singular, shapes, strict=True)]
    budget = affordable(shapes, sparsity)
    least = sum(int(cost[0]) for _, cost, _ in curves)
    left = budget - least
    if left < 0:
        raise BudgetError(
            f"ranks of {multiple} in all layers have {least} parameters, more than {budget}",
            fix="Ask for less, or leave out the smallest layers",
        )
    at = [0] * len(curves)
    for _, layer, corner in sorted(_steps(curves)):
        _, cost, _ = curves[layer]
        price = int(cost[corner] - cost[at[layer]])
        if price > left:
            break
        left -= price
        at[layer] = corner
    while (best := max(_next(curves, at, left), default=None)) is not None:
        layer = -best[1]
        _, cost, _ = curves[layer]
        left -= int(cost[at[layer] + 1] - cost[at[layer]])
        at[layer] += 1
    return np.array([ranks[place] for (ranks, _, _), place in zip(curves, at, strict=True)], np.int64)


def _curve(spectrum: F64, n: int, k: int, multiple: int) -> tuple[Ranks, Ranks, F64]:
    """Ranks worth having, ascending and the last one dense; what each costs; the energy lost at each."""
    ranks = np.arange(multiple, min(n, k), multiple)
    ranks = np.append(ranks[ranks * (n + k) < n * k], min(n, k))
    energy = np.square(np.asarray(spectrum, np.float64))
    lost = np.append(energy[::-1].cumsum()[::-1], 0.0)
    return ranks, parameters(ranks, n, k), lost[ranks]


def _steps(curves: Sequence[tuple[Ranks, Ranks, F64]]) -> list[tuple[float, int, int]]:
    """(minus the energy per parameter, layer, place that the step leads to) for all steps on the hulls."""
    steps = []
    for layer, (_, cost, lost) in enumerate(curves):
        corners = lower_hull(cost.astype(np.float64), lost)
        slopes = np.diff(lost[corners]) / np.diff(cost[corners])
        steps += [(float(slope), layer, int(corner)) for slope, corner in zip(slopes, corners[1:], strict=True)]
    return steps


def _next(curves: Sequence[tuple[Ranks, Ranks, F64]], at: Sequence[int], left: int) -> list[tuple[float, int]]:
    """(energy per parameter, minus the layer) of each layer's next step, where `left` pays for it."""
    found = []
    for layer, ((ranks, cost, lost), place) in enumerate(zip(curves, at, strict=True)):
        if place + 1 < len(ranks) and (price := int(cost[place + 1] - cost[place])) <= left:
            found.append((float(lost[place] - lost[place + 1]) / price, -layer))
    return found
