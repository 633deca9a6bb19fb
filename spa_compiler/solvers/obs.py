"""Whole input channels removed one after another, each time the one that costs least (optimal brain surgeon).

Removing the columns c of W [n, k] from all outputs, and letting all other columns make up for it, costs

    s_c = tr(W_c [Ginv_cc]^-1 W_c^T)            Ginv = G^-1 (damped)

exactly, and leaves W - W_c [Ginv_cc]^-1 Ginv_c,: ; the inverse for the columns that are left is
Ginv - Ginv_:,c [Ginv_cc]^-1 Ginv_c,: . So one inverse serves all removals: k^2 |c| + n k |c| each, in total no more
than k^3 + n k^2. (Hassibi & Stork, 1993; for structures: Kurtic et al., ZipLM, 2023.)

Greedy is not optimal as a set, but it sees what scores taken once do not: of two channels that say the same, the
first costs nothing and the second, from then on, a lot.
"""

from __future__ import annotations

import numpy as np

from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import DAMPING, F64, Problem, Solution, Zeros


def remove_channels(problem: Problem, zeros: Zeros, *, damping: float = DAMPING) -> Solution:
    """Weights without the cheapest channels; those that are left are the least squares of what they can read.

    Args:
        zeros: of a pattern whose units are whole channels: all outputs of `cols` input columns.
        damping: of the Gram matrix.

    Raises:
        ValueError: the pattern has other units.
        numpy.linalg.LinAlgError: `damping` is 0 and the Gram matrix is singular.
    """
    n, k = problem.weight.shape
    pattern = zeros.pattern
    if pattern.sizes(n, k).shape != (1, k // pattern.cols) or k % pattern.cols:
        raise ValueError(f"{pattern.name} has no whole channels in a weight of {n} outputs and {k} inputs")
    channels = k // pattern.cols
    everything = np.ones((n, k))
    count = channels - int(np.count_nonzero(zeros.choose(everything)[0])) // pattern.cols
    # What goes first is least important; all that is left is equally so.
    rank = np.full(channels, float(count))
    for place, channel in enumerate(_removed(problem, pattern.cols, count, damping)):
        rank[channel] = place
    mask = zeros.choose(everything * np.repeat(rank, pattern.cols))
    return Solution(refit(problem, mask, damping), mask)


def channel_costs(weight: F64, inverse: F64, cols: int) -> F64:
    """s_c of every channel of `cols` columns, `[k / cols]`: the damped loss when it alone goes and the others adapt.

    Args:
        weight: `[n, k]`, the best for the columns in use.
        inverse: of the damped Gram matrix.
    """
    n, k = weight.shape
    if cols == 1:
        return np.asarray(np.square(weight).sum(axis=0) / np.diagonal(inverse))
    channels = np.arange(k // cols)
    blocks = inverse.reshape(k // cols, cols, k // cols, cols)[channels, :, channels]
    columns = weight.reshape(n, k // cols, cols).transpose(1, 2, 0)
    return np.asarray(np.einsum("cii->c", np.linalg.solve(blocks, columns @ columns.transpose(0, 2, 1))))


def _removed(problem: Problem, cols: int, count: int, damping: float) -> list[int]:
    """The first `count` channels to go, in their order."""
    inverse: F64 = np.linalg.inv(problem.damped(damping)).astype(np.float64)
    # Inputs that are always 0 have a made-up size: their weights must not look costly.
    weight = np.where(problem.norms > 0, problem.weight, 0.0)
    left = np.arange(weight.shape[1] // cols)
    gone: list[int] = []
    while len(gone) < count:
        cheapest = int(channel_costs(weight, inverse, cols).argmin())
        gone.append(int(left[cheapest]))
        columns = np.arange(len(left) * cols) // cols == cheapest
        share = np.linalg.solve(inverse[np.ix_(columns, columns)], inverse[columns][:, ~columns])
        weight = weight[:, ~columns] - weight[:, columns] @ share
        inverse = inverse[np.ix_(~columns, ~columns)] - inverse[~columns][:, columns] @ share
        left = np.delete(left, cheapest)
    return gone
