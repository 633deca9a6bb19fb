"""DSnoT: exchanges zeros so that each output's mean change comes near 0; no weight changes its value.

    e = sum over removed j of w_j E[x_j]                the mean change of an output

Per step and output: the removed weight that cancels most of e for the least variance grows back,

    argmax of sign(e) w_j E[x_j] / Var(x_j)^p

and of the kept weights whose removal moves e the other way, the one with the least Wanda score goes in its place. An
exchange that would not bring e nearer to 0 ends the output's search. Zhang et al., "Dynamic Sparse No Training:
Training-Free Fine-tuning for Sparse LLMs", 2024.

Where R outputs share their zeros, e and a unit's contribution c_j are vectors of R, and e . c_j / |e| takes the place
of sign(e) c_j: the same for R = 1. For N:M the partner is in the grown weight's own group of M inputs.

Only means and variances are read, so this is as cheap as Wanda and sees no correlation: `swap` does, at its price.
"""

from __future__ import annotations

import numpy as np

from spa_compiler.errors import UsageError
from spa_compiler.solvers.problem import F64, Mask, Problem, Zeros
from spa_compiler.solvers.regions import exchangeable

CYCLES = 50
POWER = 1.0
"""p: how much a noisy input is held back from growing."""

_TOLERANCE = 1e-3
"""Of the root of the summed variances of an output's terms: a mean change below it is nothing."""


def dsnot(
    problem: Problem,
    mask: Mask,
    zeros: Zeros,
    cycles: int = CYCLES,
    power: float = POWER,
) -> Mask:
    """A mask with as many zeros in each output and the same pattern, whose mean output is no farther from W0's.

    Args:
        problem: the layer; its weights are those that stay.
        mask: `[n, k]`, follows the pattern.
        zeros: its pattern; the share of zeros is that of `mask`.
        cycles: exchanges per output at most.
        power: of the variance.

    Raises:
        UsageError: the pattern's units are more than one input wide.
    """
    pattern = zeros.pattern
    grouped = pattern.sparsity is not None
    if not exchangeable(pattern):
        raise UsageError(
            f"DSnoT cannot exchange zeros in the pattern {pattern.name}",
            fix="It can for unstructured, fan-in, N:M, block:Rx1 and a linear layer's channels",
        )
    n = len(problem.weight)
    height = min(pattern.rows, n)
    variance = problem.variance
    terms = _stack(problem.weight * problem.mean, height)
    scores = _stack(np.square(problem.weight * problem.norms), height).sum(axis=1)
    noise = np.sqrt((_stack(np.square(problem.weight), height) * variance).sum(axis=(1, 2)))
    damping = _power(variance, power)
    kept = np.array(mask[::height])
    change = np.einsum("urk,uk->ur", terms, ~kept)
    active = np.flatnonzero(kept.any(axis=1) & ~kept.all(axis=1))
    for _ in range(cycles):
        size = np.sqrt(np.square(change[active]).sum(axis=1))
        active = active[size > _TOLERANCE * noise[active]]
        if not len(active):
            break
        old = change[active]
        size = np.sqrt(np.square(old).sum(axis=1))
        along = np.einsum("ur,urk->uk", old / size[:, None], terms[active])
        inside, cost = kept[active], scores[active]
        gain = np.where(inside, -np.inf, along / damping)
        if grouped:
            # The partner is known before: whatever grows, its group's least kept weight goes.
            partners = _least(np.where(inside, cost, np.inf), pattern.cols)
            after = old[:, :, None] - terms[active] + np.take_along_axis(terms[active], partners[:, None, :], 2)
            none = ~np.take_along_axis(inside, partners, 1)
            gain[none | (np.square(after).sum(axis=1) >= np.square(size)[:, None])] = -np.inf
            grow = gain.argmax(axis=1)
            leave = np.take_along_axis(partners, grow[:, None], 1)[:, 0]
            possible = np.isfinite(gain.max(axis=1))
        else:
            grow = gain.argmax(axis=1)
            cost = np.where(inside & (along < 0), cost, np.inf)
            leave = cost.argmin(axis=1)
            possible = (gain.max(axis=1) > 0) & np.isfinite(cost.min(axis=1))
        new = old - terms[active, :, grow] + terms[active, :, leave]
        possible &= np.square(new).sum(axis=1) < np.square(size)
        active, grow, leave = active[possible], grow[possible], leave[possible]
        kept[active, grow], kept[active, leave] = True, False
        change[active] = new[possible]
    return np.asarray(np.repeat(kept, height, axis=0)[:n])


def _stack(array: F64, height: int) -> F64:
    """`[n, k]` as `[u, height, k]`: rows that share their zeros, zeros below a short last one."""
    n, k = array.shape
    count = -(-n // height)
    out = np.zeros((count * height, k))
    out[:n] = array
    return out.reshape(count, height, k)


def _power(variance: F64, power: float) -> F64:
    """Var^p, where a constant input counts as the least noisy of the others: no input may win by a division by 0."""
    noisy = variance > 1e-12 * variance.max(initial=0.0)
    least = float(variance[noisy].min(initial=np.inf)) if noisy.any() else 1.0
    return np.asarray(np.where(noisy, variance, least) ** power)


def _least(cost: F64, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    """For every input the index of the cheapest one in its group of `width`, `[u, k]`."""
    rows, k = cost.shape
    count = -(-k // width)
    padded = np.full((rows, count * width), np.inf)
    padded[:, :k] = cost
    best = padded.reshape(rows, count, width).argmin(axis=2) + np.arange(0, count * width, width)
    return np.asarray(np.repeat(best, width, axis=1)[:, :k])
