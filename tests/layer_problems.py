"""Random layer-wise problems, and exact answers for small ones."""

from __future__ import annotations

import numpy as np

from spa_compiler.solvers.problem import F64, Mask, Problem


def correlated(n: int, k: int, seed: int, decay: float = 1.0) -> Problem:
    """Inputs of unequal size whose Gram matrix has eigenvalues that fall like 1 / index^decay (before the sizes)."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((k, k)))[0]
    spectrum = np.arange(1.0, k + 1) ** -decay
    sizes = np.exp(0.5 * rng.standard_normal(k))
    gram = (basis * spectrum) @ basis.T * k / spectrum.sum() * np.outer(sizes, sizes)
    return Problem(rng.standard_normal((n, k)), (gram + gram.T) / 2, rng.standard_normal(k), 100 * k)


def sampled(n: int, k: int, seed: int, samples: int = 0) -> Problem:
    """Moments of so many samples (four for each input if 0); inputs are correlated and of unequal size."""
    rng = np.random.default_rng(seed)
    count = samples or 4 * k
    inputs = rng.normal(size=(count, k)) @ (rng.normal(size=(k, k)) / np.sqrt(k) + np.eye(k)) * rng.uniform(0.3, 3, k)
    return Problem(rng.normal(size=(n, k)), inputs.T @ inputs / count, inputs.mean(axis=0), count)


def damped(problem: Problem, damping: float = 0.01) -> Problem:
    """The problem whose loss is the damped loss of `problem`."""
    return Problem(problem.weight, problem.damped(damping), problem.mean, problem.count)


def optimum(problem: Problem, mask: Mask, damping: float = 0.01) -> F64:
    """The weight of least damped loss on `mask`, output by output, by least squares on a root of the Gram matrix."""
    root = np.linalg.cholesky(problem.damped(damping)).T
    out = np.zeros_like(problem.weight)
    for row, kept, wanted in zip(out, mask, problem.weight, strict=True):
        row[kept] = np.linalg.lstsq(root[:, kept], root @ wanted)[0]
    return out


def with_a_dead_input(problem: Problem, which: int = 3) -> Problem:
    """The same with an input that is always 0."""
    gram, mean = np.array(problem.gram), np.array(problem.mean)
    gram[which], gram[:, which], mean[which] = 0, 0, 0
    return Problem(problem.weight, gram, mean, problem.count)
