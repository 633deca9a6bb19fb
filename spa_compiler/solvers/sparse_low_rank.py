"""Sparse + low rank: W0 ~ up @ down + S, where S has the zeros of a pattern.

    min over L of rank r, S in the pattern     E |W0 x - (L + S) x|^2

What is spread out goes into few directions, what sticks out of them into single weights: together they come nearer than
either alone at the same number of parameters. Alternating, as in robust PCA:

    L = whitened SVD_r(W0 - S')         the optimum given S'
    S = sparse solver on W0 - L         a heuristic: choosing the best support is hard
    S' = S + (S - S_before) / 2         a step ahead: plain alternation (S' = S) creeps

so the loss may rise on the way; the best pair is kept. Where it ends depends on where it starts, from S' = 0 or from
the sparse answer to W0; after a few sweeps from both, the better one goes on. Given its support, the two are at last
refitted to each other by least squares, which can only lower the loss. The form is LOST's and SLTrain's (Li et al.,
"LOST: Low-rank and sparse pre-training", 2025; Han et al., "SLTrain", 2024), the alternation GoDec's (Zhou and Tao,
2011).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

import numpy as np

from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import DAMPING, F64, Problem, Solution, Zeros
from spa_compiler.solvers.svd import Factors, damped, decompose

SparseSolver: TypeAlias = Callable[[Problem, Zeros], Solution]
Pair: TypeAlias = tuple[float, Factors, Solution]
"""The loss of L + S, L and S."""

_AHEAD = 0.5
_PROBES = 3
"""Sweeps from each start before one is chosen."""
_STALL = 1e-3
"""Refitting ends when a round lowers the loss by less than this much of it."""


def heaviest(problem: Problem, zeros: Zeros) -> Solution:
    """What stays is what weighs most at the output, w^2 E[x^2], and stays as it is."""
    mask = zeros.choose(np.square(problem.weight) * np.diagonal(problem.gram))
    return Solution(np.where(mask, problem.weight, 0.0), mask)


def sparse_low_rank(
    problem: Problem,
    rank: int,
    zeros: Zeros,
    sparse_solver: SparseSolver = heaviest,
    *,
    sweeps: int = 10,
    refits: int = 5,
    damping: float = DAMPING,
) -> tuple[Factors, Solution]:
    """L and S whose sum comes near W0. Their losses are taken with the damped Gram matrix, see `damped`.

    Args:
        rank: of L, 0 to min(n, k). It costs rank * (n + k) parameters.
        zeros: of S.
        sparse_solver: what finds S for the residual W0 - L; it is given the undamped Gram matrix.
        sweeps: of alternation from the better start, at least 1.
        refits: rounds of least squares, at most.
        damping: above 0 where the Gram matrix is singular.

    Raises:
        ValueError: there is no such rank, or no sweep.
        numpy.linalg.LinAlgError: `damping` is 0 and the Gram matrix is singular.
    """
    if sweeps < 1:
        raise ValueError("there must be one sweep at least")
    goal = replace(problem, gram=damped(problem.gram, damping))
    alone = sparse_solver(problem, zeros)
    low = _low_rank(goal, alone.weight, rank)
    beside = (goal.loss(low.weight + alone.weight), low, alone)  # never worse than sparse alone
    starts = (np.zeros_like(problem.weight), alone.weight)
    paths = [_alternate(problem, goal, rank, zeros, sparse_solver, start) for start in starts]
    probes = min(sweeps, _PROBES)
    ends = [min(islice(path, probes), key=_loss) for path in paths]
    path, end = min(zip(paths, ends, strict=True), key=lambda pair: _loss(pair[1]))
    return _refitted(goal, min([beside, end, *islice(path, sweeps - probes)], key=_loss), rounds=refits)


def _loss(pair: Pair) -> float:
    return pair[0]


def _alternate(
    problem: Problem, goal: Problem, rank: int, zeros: Zeros, sparse_solver: SparseSolver, start: F64
) -> Iterator[Pair]:
    """Sweeps without end, each the best L given S' and what S becomes then."""
    before = ahead = start
    while True:
        low = _low_rank(goal, ahead, rank)
        sparse = sparse_solver(replace(problem, weight=problem.weight - low.weight), zeros)
        yield goal.loss(low.weight + sparse.weight), low, sparse
        ahead = sparse.weight + _AHEAD * (sparse.weight - before)
        before = sparse.weight


def _low_rank(goal: Problem, sparse: F64, rank: int) -> Factors:
    """The best L given S."""
    return decompose(replace(goal, weight=goal.weight - sparse), goal.gram).truncate(rank)


def _refitted(goal: Problem, pair: Pair, rounds: int) -> tuple[Factors, Solution]:
    """S given L on the support it has, then L given S, for some rounds. The loss falls with every half of a round."""
    loss, low, sparse = pair
    for _ in range(rounds):
        weight = refit(replace(goal, weight=goal.weight - low.weight), sparse.mask, damping=0.0)
        factors = _low_rank(goal, weight, low.rank)
        after = goal.loss(factors.weight + weight)
        if not after < loss:  # at the optimum, up to rounding
            break
        stalled = loss - after < _STALL * loss
        loss, low, sparse = after, factors, Solution(weight, sparse.mask)
        if stalled:
            break
    return low, sparse
