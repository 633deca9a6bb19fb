"""k-level group envelope: a convex stand-in for "at most K weights, in whole units", minimized with the layer's error.

Among all convex functions, the largest one below |X|^2 / 2 on matrices whose nonzero units hold at most K weights is

    h(X) = min over t of 1/2 sum_g |X_g|^2 / t_g,       0 <= t_g <= 1,   sum_g s_g t_g <= K       s_g: size of unit g

The layer is put in coordinates X = W0 D, D^2 = diag G, where a unit's energy |X_g|^2 is its Wanda score (the weights of
the weighted envelope), and C = D^-1 G D^-1. Then

    minimize over X    1/2 tr((X0 - X) C (X0 - X)^T) + strength * h(X)

by accelerated proximal gradient steps (Beck and Teboulle, 2009). With the minimizing t, the proximal operator scales
units: the K strongest by 1 / (1 + l), some at the border by less, the rest to 0:

    prox(V)_g = V_g t_g / (t_g + l),    t_g = clip(c |V_g| / sqrt(s_g) - l, 0, 1),    c such that sum_g s_g t_g = K

N:M and fan-in have their K per group of inputs and per output. The support of the minimizer is the answer; the shrunken
weights on it are replaced by their least-squares refit.

Refael, Arbel and Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization",
2022, add this envelope to a training loss. Here the loss is the layer's output error, which needs no training.
"""

from __future__ import annotations

import numpy as np

from spa_compiler.patterns import Pattern
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import F64, Problem, Solution, Zeros
from spa_compiler.solvers.regions import join, split, spread

_STRENGTH = 0.1
"""Of the envelope, relative to the layer's error."""
_STEPS = 40

_NEWTON = 100
"""Steps to find c at most; about ten are usual, as the sum is piecewise linear in c."""


def envelope(problem: Problem, zeros: Zeros) -> Solution:
    """The refitted weights on the support that the envelope leaves. For any pattern."""
    pattern = zeros.pattern
    gram = problem.damped()
    scale = np.sqrt(np.diagonal(gram))
    correlation = gram / np.outer(scale, scale)
    # Weights of inputs that are always 0 have no say.
    target = np.where(np.diagonal(problem.gram) > 0, problem.weight * scale, 0.0)
    length = 1.0 / float(np.linalg.eigvalsh(correlation)[-1])
    n, k = target.shape
    budget = budgets(pattern, n, k, zeros.sparsity)
    point = old = target
    momentum = 1.0
    for _ in range(_STEPS):
        new = prox(pattern, point - length * ((point - target) @ correlation), length * _STRENGTH, budget)
        next_momentum = (1 + np.sqrt(1 + 4 * momentum * momentum)) / 2
        point = new + (momentum - 1) / next_momentum * (new - old)
        old, momentum = new, next_momentum
    mask = zeros.choose(np.square(old))
    return Solution(refit(problem, mask), mask)


def budgets(pattern: Pattern, n: int, k: int, sparsity: float) -> F64:
    """K of each region, `[regions, 1]`: the weights that stay there."""
    whole = split(pattern, np.array(pattern.sizes(n, k), np.float64)).sum(axis=1, keepdims=True)
    if pattern.sparsity is not None:
        # A short last group keeps min(N, L).
        return np.asarray(np.minimum(whole, pattern.cols * (1 - pattern.sparsity)))
    return np.asarray(whole * (1 - sparsity))


def prox(pattern: Pattern, value: F64, strength: float, budget: F64) -> F64:
    """argmin over X of |X - V|^2 / 2 + strength * h(X), for V = `value [n, k]`."""
    n, k = value.shape
    strengths = np.sqrt(pattern.scores(np.square(value)))
    sizes = split(pattern, np.array(pattern.sizes(n, k), np.float64))
    share = _shares(split(pattern, strengths), sizes, strength, budget)
    factors = join(pattern, share / (share + strength), strengths.shape)
    return value * spread(pattern, factors, n, k)


def _shares(members: F64, sizes: F64, strength: float, budget: F64) -> F64:
    """t of each member, `[regions, members]`: clip(c m - l, 0, 1) that add up to the budget where that binds."""
    most = (sizes * (members > 0)).sum(axis=1, keepdims=True)
    tight = most > budget
    low = np.zeros_like(budget)
    with np.errstate(divide="ignore", invalid="ignore"):
        high = (1 + strength) / np.where(members > 0, members, np.inf).min(axis=1, keepdims=True)
        c = np.where(tight, (budget / most + strength) / members.max(axis=1, keepdims=True), 0.0)
    high = np.where(tight, high, 0.0)
    for _ in range(_NEWTON):
        raw = c * members - strength
        share = np.clip(raw, 0.0, 1.0)
        excess = (sizes * share).sum(axis=1, keepdims=True) - budget
        if not (tight & (np.abs(excess) > 1e-12 * budget)).any():
            break
        low, high = np.where(excess < 0, c, low), np.where(excess > 0, c, high)
        slope = (sizes * members * ((raw > 0) & (raw < 1))).sum(axis=1, keepdims=True)
        step = c - excess / np.where(slope > 0, slope, np.inf)
        inside = (step > low) & (step < high) & (slope > 0)
        c = np.where(inside, step, (low + high) / 2)
    return np.where(tight, np.clip(c * members - strength, 0.0, 1.0), (members > 0).astype(np.float64))
