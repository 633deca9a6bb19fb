"""SparseGPT: choose zeros and repair the damage, one input column after another (Frantar & Alistarh, 2023).

With U upper triangular, U^T U = G^-1 (G damped), setting column j of the weights W [n, k] to 0 costs an output
w_j^2 / U_jj^2 when only the columns after j may change to make up for it, and the best such change is

    W[:, j:] -= (w_j / U_jj) U[j, j:]

Row j of U is the same for every output and every mask, so one factorization serves all outputs: k^3 + n k^2. Columns
go in blocks; a block's zeros are chosen when its turn comes, on values that its predecessors have already changed.

Two things differ from the paper, both because they were measured to be better. The paper gives every block the same
share of zeros. Here a block's scores compete with those of all columns that are still to come, so that the zeros go
where they cost least and only the share of the whole weight is fixed. And the columns of small inputs go first: what
carries little is cut most, and the strong columns stay free to make up for it. Together they take a sixth off the loss
at 70 % zeros of random weights with correlated inputs of unequal size. N:M fixes the share of every group, so there
large inputs go first, while the others can still make up for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtri

from spa_compiler.solvers.problem import DAMPING, F64, Mask, Problem, Solution, Zeros

_Columns = NDArray[np.intp]


def sparsegpt(
    problem: Problem,
    zeros: Zeros,
    *,
    damping: float = DAMPING,
    block: int | None = None,
    ordered: bool = True,
    mask: Mask | None = None,
) -> Solution:
    """Weights with `zeros`, repaired column by column.

    Not the least squares of its own mask: only later columns make up for a zero. `refit` goes on from there.

    Args:
        damping: of the Gram matrix.
        block: columns whose zeros are chosen at once, on the same values; rounded to whole units of the pattern.
            A sixteenth of all where it is None. For N:M, each group is chosen when its own turn comes.
        ordered: whether the inputs' sizes say which columns go first; otherwise they go as they stand.
        mask: the zeros, where they are chosen already; then `zeros` only says which columns belong together.

    Raises:
        numpy.linalg.LinAlgError: `damping` is 0 and the Gram matrix is singular.
    """
    gram = problem.damped(damping)
    runs = _runs(len(gram), zeros.pattern.cols)
    if ordered:
        sizes = np.array([np.diagonal(gram)[run].mean() for run in runs])
        first = sizes if zeros.pattern.sparsity is None else -sizes
        runs = [runs[index] for index in np.argsort(first, kind="stable")]
    order = np.concatenate(runs)
    factor = factor_of_inverse(gram[np.ix_(order, order)])
    chooser = _Chooser(problem.weight.shape, zeros, mask)
    # Transposed, so that a column of weights is contiguous.
    values = problem.weight.T[order]
    # Inputs that are always 0 have a made-up size: their weights must not look important.
    values[problem.norms[order] == 0] = 0
    start = 0
    for part in _blocks(runs, len(gram) // 16 if block is None else block):
        stop = start + sum(map(len, part))
        chooser.begin(values[start:], np.diagonal(factor)[start:], order[start:], stop - start)
        errors = np.empty((stop - start, values.shape[1]))
        left = start
        for run in part:
            right = left + len(run)
            lost = ~chooser.choose(values[left:right], np.diagonal(factor)[left:right], run)
            for column, gone in zip(range(left, right), lost.T, strict=True):
                error = np.where(gone, values[column] / factor[column, column], 0.0)
                values[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
                values[column, gone] = 0
                errors[column - start] = error
            left = right
        values[stop:] -= factor[start:stop, stop:].T @ errors
        start = stop
    out = np.empty_like(problem.weight)
    out[:, order] = values.T
    return Solution(out, chooser.mask)


class _Chooser:
    """Which weights stay, decided part by part: those of columns that had their turn are settled.

    Attributes:
        mask: `[n, k]`; what it says of columns that had no turn yet is preliminary.
    """

    def __init__(self, shape: tuple[int, ...], zeros: Zeros, mask: Mask | None) -> None:
        self._zeros = zeros
        self._given = mask is not None
        self.mask = np.ones(shape, np.bool_) if mask is None else np.array(mask)

    def begin(self, values: F64, diagonal: F64, columns: _Columns, width: int) -> None:
        """Settles the first `width` of the `columns` that are still open.

        Args:
            values: now, `[len(columns), n]`.
            diagonal: U_jj of each.
        """
        if self._given or self._zeros.pattern.sparsity is not None:
            return
        # The whole weight is asked each time: what is settled stays so by its score, and the count comes out right.
        importance = np.where(self.mask, np.inf, -1.0)
        importance[:, columns] = np.square(values.T / diagonal)
        self.mask = self._zeros.choose(importance)

    def choose(self, values: F64, diagonal: F64, run: _Columns) -> Mask:
        """What stays of the columns `run`, `[n, len(run)]`; their arguments are like those of `begin`."""
        if not self._given and self._zeros.pattern.sparsity is not None:
            self.mask[:, run] = self._zeros.choose(np.square(values.T / diagonal))
        return np.asarray(self.mask[:, run])


def _runs(k: int, cols: int) -> list[_Columns]:
    """Columns that the pattern wants chosen together."""
    return [np.arange(start, min(k, start + cols)) for start in range(0, k, cols)]


def _blocks(runs: list[_Columns], block: int) -> Iterator[list[_Columns]]:
    """Runs in groups of about `block` columns."""
    count = max(1, block // max(map(len, runs)))
    for start in range(0, len(runs), count):
        yield runs[start : start + count]


def factor_of_inverse(gram: F64) -> F64:
    """U upper triangular with U^T U = gram^-1.

    Raises:
        numpy.linalg.LinAlgError: `gram` is not positive definite.
    """
    # Read backwards, gram = L L^T becomes gram = R R^T with R upper triangular; then U = R^-1.
    lower = np.linalg.cholesky(gram[::-1, ::-1])
    factor, info = dtrtri(lower[::-1, ::-1])
    if info:
        raise np.linalg.LinAlgError("the Gram matrix is singular: it needs damping")
    return np.asarray(np.triu(factor))
