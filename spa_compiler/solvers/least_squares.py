"""The best values of the weights that stay: least squares on each output's support.

Output i keeps the inputs S and loses P. With the damped Gram matrix G (`Problem.damped`), what minimizes the damped
loss (w0 - w) G (w0 - w)^T among all w that are 0 on P is

    w_S = w0_S + (G_SS)^-1 G_SP w0_P        (normal equations)
        = w0_S - Ginv_SP (Ginv_PP)^-1 w0_P  (the same, with Ginv = G^-1: optimal brain surgeon, Hassibi & Stork, 1993)

The first system has the size of S, the second that of P. The damping pulls the weights towards w0, not towards 0.
Outputs with the same support share one factorization. Where both systems are large, conjugate gradients (Hestenes &
Stiefel, 1952) run on many outputs at once instead, preconditioned by Ginv_SS: their work is matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv

from spa_compiler.solvers.problem import DAMPING, F64, Mask, Problem

_Rows = NDArray[np.intp]

_TOLERANCE = 1e-6
"""Of conjugate gradients: the residual's norm over the right-hand side's. The loss grows with its square: by 1e-9."""

_ROUNDS = 1000
"""Of conjugate gradients, at most."""

_ROWS = 1024
"""Outputs that conjugate gradients work on at a time: about ten arrays of that many rows are held."""

_DIRECT = 256.0
"""A factorization of size m costs as much as conjugate gradients on one output where m^3 = 256 k^2 (measured)."""


def refit(problem: Problem, mask: Mask, damping: float = DAMPING) -> F64:
    """The weight `[n, k]` of least damped loss that is 0 where `mask [n, k]` is False.

    Raises:
        numpy.linalg.LinAlgError: `damping` is 0 and the Gram matrix is singular.
    """
    weight, gram = problem.weight, problem.damped(damping)
    k = weight.shape[1]
    out = np.where(mask, weight, 0.0)
    direct: list[_Rows] = []
    iterative: list[_Rows] = []
    for rows in _equal_rows(mask):
        kept = int(np.count_nonzero(mask[rows[0]]))
        if 0 < kept < k:
            large = min(kept, k - kept) ** 3 > _DIRECT * k * k * len(rows)
            (iterative if large else direct).append(rows)
    if not direct and not iterative:
        return out
    lost = np.where(mask, 0.0, weight)
    pull = lost @ gram
    by_kept = [rows for rows in direct if 2 * np.count_nonzero(mask[rows[0]]) <= k]
    by_lost = [rows for rows in direct if 2 * np.count_nonzero(mask[rows[0]]) > k]
    for rows in by_kept:
        support = np.flatnonzero(mask[rows[0]])
        out[np.ix_(rows, support)] += _solve(gram, support, pull[rows[:, None], support])
    if by_lost or iterative:
        inverse = _inverse(gram)
    if by_lost:
        force = np.zeros_like(weight)
        for rows in by_lost:
            gone = np.flatnonzero(~mask[rows[0]])
            force[np.ix_(rows, gone)] = _solve(inverse, gone, lost[rows[:, None], gone])
        every = np.concatenate(by_lost)
        out[every] -= np.where(mask[every], force[every] @ inverse, 0.0)
    if iterative:
        every = np.sort(np.concatenate(iterative))
        for start in range(0, len(every), _ROWS):
            rows = every[start : start + _ROWS]
            out[rows] += conjugate_gradients(gram, inverse, mask[rows], pull[rows])
    return out


def shift(problem: Problem, weight: F64) -> F64:
    """What to add to the bias, `[n]`, so that the mean output stays: W0 E[x] - W E[x].

    With G the centred Gram matrix E[(x - E[x]) (x - E[x])^T], weight and bias together are the best affine repair.
    """
    return np.asarray((problem.weight - weight) @ problem.mean)


def conjugate_gradients(gram: F64, inverse: F64, mask: Mask, target: F64, tolerance: float = _TOLERANCE) -> F64:
    """For every row, x with G_SS x_S = target_S, and 0 elsewhere; S is where the row of `mask` is True.

    Args:
        gram: G `[k, k]`, symmetric, positive definite.
        inverse: of `gram`.
        mask: `[rows, k]`.
        target: `[rows, k]`; read on the mask only.
        tolerance: a row is done when its residual's norm is at most this much of its target's.
    """
    out = np.zeros_like(target)
    rows = np.arange(len(target))
    x = np.zeros_like(target)
    residual = np.where(mask, target, 0.0)
    goal = np.square(tolerance) * np.einsum("ij,ij->i", residual, residual)
    step = np.where(mask, residual @ inverse, 0.0)
    energy = np.einsum("ij,ij->i", residual, step)
    for _ in range(_ROUNDS):
        done = np.einsum("ij,ij->i", residual, residual) <= goal
        # Rows that are done leave when they are many: each time, what goes on has to be copied.
        if done.all() or 4 * np.count_nonzero(done) >= len(done):
            out[rows[done]] = x[done]
            rows, mask, goal, energy = rows[~done], mask[~done], goal[~done], energy[~done]
            x, residual, step, done = x[~done], residual[~done], step[~done], done[~done]
        if not len(rows):
            break
        ahead = np.where(mask, step @ gram, 0.0)
        curvature = np.einsum("ij,ij->i", step, ahead)
        length = np.where(done, 0.0, energy / np.where(done, 1.0, curvature))[:, None]
        x += length * step
        residual -= length * ahead
        better = np.where(mask, residual @ inverse, 0.0)
        before, energy = energy, np.einsum("ij,ij->i", residual, better)
        step = better + np.where(done, 0.0, energy / np.where(done, 1.0, before))[:, None] * step
    out[rows] = x
    return out


def _equal_rows(mask: Mask) -> Iterator[_Rows]:
    """Indices of the rows of each distinct row."""
    _, group = np.unique(np.packbits(mask, axis=1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order])) + 1
    yield from np.split(order, starts)


def _solve(matrix: F64, index: NDArray[np.intp], right: F64) -> F64:
    """Right-hand sides `right [rows, m]` of the symmetric system `matrix[index, index]`."""
    # A transposed C array is Fortran's, which LAPACK overwrites in place instead of copying it.
    part = matrix.take(index, 0).take(index, 1).T
    _, solution, info = dposv(part, right.T, lower=True, overwrite_a=True)
    if info:
        raise np.linalg.LinAlgError("the Gram matrix is singular: it needs damping")
    return np.asarray(solution.T)


def _inverse(gram: F64) -> F64:
    """Symmetric to the last bit."""
    inverse = np.linalg.inv(gram)
    return np.asarray((inverse + inverse.T) / 2)
