"""Spectrum-preserving sparsification: keep what is large, draw from the rest, and be right on average.

    E[W'] = W, but for the smallest units      so |W' - W|, which bounds every singular value's change, is noise

Units have scores s, the root mean square of their weights. The smallest are zeroed outright (Drineas and Zouzias, "A
Note on Element-wise Matrix Sparsification via a Matrix-valued Bernstein Inequality", 2011); the others draw priorities
s / u, u uniform on (0, 1], and the pattern keeps the highest. With T the highest priority that was removed, a unit that
stays is scaled by max(1, T / s): those above T stay what they are, all others come out equally large. Each unit that
takes part is then unbiased, exactly and for any number of units that stay (priority sampling; Duffield, Lund and
Thorup, "Priority sampling for estimation of arbitrary subset sums", 2007). T is taken per group of inputs for N:M and
per output for fan-in, where they count what stays.

Yao, Yu and Koutis, "Neural Network Pruning as Spectrum Preserving Process", 2023, prune a layer as such a matrix
sparsification: truncation and sampling. Priorities draw a number that is known before, which independent draws do not,
and so meet the sparsity and the pattern. The method reads no data.
"""

from __future__ import annotations

import numpy as np

from spa_compiler.solvers.problem import F64, Problem, Solution, Zeros
from spa_compiler.solvers.regions import join, split, spread

BAND = 0.1
"""Of the units that stay: how many more take part. Without a bound all do, and chance weighs more than truncation."""


def spectrum(problem: Problem, zeros: Zeros, rng: np.random.Generator, band: float = BAND) -> Solution:
    """A random sparse weight whose mean is W0 but for its smallest units. For any pattern.

    Unbiased where all units of a region have one size; a short unit at the border is kept a little too rarely or too
    often.

    Args:
        problem: the layer; only its weight is read.
        zeros: pattern and share of zeros.
        rng: draws.
        band: 0 is magnitude pruning, infinity lets all units take part.
    """
    pattern = zeros.pattern
    n, k = problem.weight.shape
    sizes = pattern.sizes(n, k)
    scores = np.sqrt(pattern.scores(np.square(problem.weight)))
    kept = split(pattern, pattern.select(scores, sizes, zeros.sparsity).astype(np.float64)).sum(axis=1)
    taking_part = join(pattern, _largest(split(pattern, scores), np.ceil(kept * (1 + band))), scores.shape)
    priorities = taking_part / (1.0 - rng.random(scores.shape))
    keep = pattern.select(priorities, sizes, zeros.sparsity)
    removed = split(pattern, np.where(keep, 0.0, priorities)).max(axis=1, keepdims=True)
    members = split(pattern, scores)
    scale = np.maximum(1.0, np.divide(removed, members, out=np.ones_like(members), where=members > 0))
    mask = pattern.mask(keep, n, k)
    factors = spread(pattern, join(pattern, scale, scores.shape), n, k)
    return Solution(np.where(mask, problem.weight * factors, 0.0), mask)


def _largest(members: F64, counts: F64) -> F64:
    """The largest `counts` of each row as they are, the others as 0; with all that are equal to the last of them."""
    last = np.minimum(counts, members.shape[1]).astype(np.intp) - 1
    descending = -np.sort(-members, axis=1)
    return np.where(members >= descending[np.arange(len(members)), last][:, None], members, 0.0)
