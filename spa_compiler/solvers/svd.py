"""Low rank by singular values: W0 ~ up @ down, y = up (down x), in the norm of the weights or of what they put out.

    plain      min |W0 - W_r|_F                                   Eckart and Young, 1936
    whitened   min E |W0 x - W_r x|^2 = |(W0 - W_r) S|_F          G = S S^T; Wang et al., "SVD-LLM", 2024

Both are projections of the outputs: with the singular value decomposition W0 S = U s V^T,

    W_r = U_r s_r V_r^T S^-1 = U_r U_r^T W0,        U the eigenvectors of W0 G W0^T,        loss = sum_{i > r} s_i^2

The form on the right (principal components of the outputs) needs no inverse, so G may be singular: along directions
that the calibration never saw, W_r is still a projection of W0, neither 0 (as with a pseudo-inverse) nor blown up (as
with the inverse of a nearly singular S). With more outputs than inputs the eigenproblem moves to the range of W0, by
QR, so that it is always of size m = min(n, k).

To have a bias absorb what the mean of x gives, hand in the centred Gram matrix G - mu mu^T and add (W0 - W_r) mu to the
bias. To have several weights that read one input share `down`, hand in their stacked rows and take the result apart
with `split_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from spa_compiler.solvers.problem import F64, Problem


@dataclass(frozen=True, eq=False)
class Factors:
    """A weight of rank r at most: `up [n, r]` @ `down [r, k]`."""

    up: F64
    down: F64

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def weight(self) -> F64:
        """The product, `[n, k]`."""
        return np.asarray(self.up @ self.down)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The factors of every rank at once: W_r = left[:, :r] @ right[:r].

    Attributes:
        left: `[n, m]`, m = min(n, k); the columns are orthonormal, the most important first.
        right: `[m, k]` = left^T W0.
        tails: `[m + 1]`, E |W0 x - W_r x|^2 for r = 0 ... m, whichever norm the order of the columns came from.
    """

    left: F64
    right: F64
    tails: F64

    def truncate(self, rank: int) -> Factors:
        """The factors of one rank, balanced: column i of `up` is as long as row i of `down` (sqrt(s_i) if plain).

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.tails.size:
            raise ValueError(f"rank {rank} of a weight whose rank is {self.tails.size - 1} at most")
        right = self.right[:rank]
        lengths = np.sqrt(np.linalg.norm(right, axis=1))
        lengths[lengths == 0] = 1.0
        return Factors(self.left[:, :rank] * lengths, right / lengths[:, None])


def plain(problem: Problem) -> Decomposition:
    """The best of each rank for the weight itself. `tails` are losses at the output all the same."""
    return decompose(problem, None)


def whitened(problem: Problem) -> Decomposition:
    """The best of each rank for the output."""
    return decompose(problem, problem.gram)


def decompose(problem: Problem, metric: F64 | None) -> Decomposition:
    """The best of each rank in the norm sum((W0 - W_r) `metric` * (W0 - W_r)).

    Args:
        metric: `[k, k]`, `[k]` for a diagonal, None for the identity; symmetric, not negative definite. Components
            without any weight in it come last, in the order of the identity.
    """
    weight = problem.weight
    tall = weight.shape[0] > weight.shape[1]
    basis, core = np.linalg.qr(weight) if tall else (None, weight)
    weighed = core if metric is None else core * metric if metric.ndim == 1 else core @ metric
    values, vectors = _eigen(weighed @ core.T)
    unseen = values <= values.max(initial=0.0) * values.size * np.finfo(np.float64).eps
    if metric is not None and unseen.any():
        part = vectors[:, unseen].T @ core
        vectors[:, unseen] = vectors[:, unseen] @ _eigen(part @ part.T)[1]
    right = vectors.T @ core
    left = vectors if basis is None else basis @ vectors
    losses = np.maximum(np.einsum("ij,ij->i", right @ problem.gram, right), 0.0)
    tails = np.zeros(losses.size + 1)
    tails[:-1] = np.cumsum(losses[::-1])[::-1]
    return Decomposition(left, right, tails)


def damped(gram: F64, damping: float) -> F64:
    """G with `damping` times its mean diagonal on the diagonal; a new array.

    Unlike `Problem.damped`, inputs that are always 0 get no more than that: they must not attract rank.
    """
    out = np.array(gram, np.float64)
    diagonal = np.einsum("ii->i", out)
    diagonal += damping * float(diagonal.mean())
    return out


def split_rows(factors: Factors, sizes: Sequence[int]) -> list[Factors]:
    """Factors of stacked weights as those of each weight: an `up` for each, one `down` that all of them share.

    Args:
        sizes: the outputs of each weight, in the order in which they were stacked.

    Raises:
        ValueError: the sizes do not add up to the outputs.
    """
    if sum(sizes) != factors.up.shape[0]:
        raise ValueError(f"{factors.up.shape[0]} stacked outputs, but parts of {list(sizes)}")
    parts = np.split(factors.up, np.cumsum(sizes)[:-1])
    return [Factors(part, factors.down) for part in parts]


def _eigen(matrix: F64) -> tuple[F64, F64]:
    """Eigenvalues of a symmetric matrix, descending, and its eigenvectors as columns in that order."""
    # Divide and conquer: the fastest of LAPACK's drivers where all vectors are wanted.
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2, driver="evd", check_finite=False)
    return np.asarray(values[::-1]), np.ascontiguousarray(vectors[:, ::-1])
