"""How much of a Gram matrix is chance, and how far to draw it to its diagonal for that.

    G(a) = (1 - a) G + a diag(G)

What a few samples say about how inputs hang together is partly chance, and a solver that trusts it makes up for zeros
with inputs that happened to agree. Shrinkage towards the diagonal is Ledoit & Wolf's (2004); the share a is not taken
from their formula, which counts positions as independent (those of one image are not), but by a test: from one half of
the samples, a random half of the inputs is refitted for the loss of the other half, and the loss is taken on the other
half of the samples.

EfficientNet-Lite0, 50 % zeros in 1x1 layers by SparseGPT, four folds of the calibration images: with this, and with
shares from losses on the other half, the outputs change by 0.485 instead of 0.515, and the divergence of the predicted
classes falls from 0.405 to 0.372.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from spa_compiler.solvers.problem import DAMPING, F64

_F32 = NDArray[np.float32]

SHARES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
"""What is tried, until it gets worse."""


def shrunk(gram: F64, share: float) -> F64:
    """`gram [k, k]` with what lies off the diagonal times 1 - `share`."""
    if share == 0:
        return gram
    out = gram * (1 - share)
    np.einsum("ii->i", out)[:] = np.diagonal(gram)
    return out


def shrinkage(weight: F64, one: F64, other: F64) -> float:
    """The share, 0 to 1, by which to shrink either of two Gram matrices of independent halves of the samples.

    Args:
        weight: W0 `[n, k]`, which the loss is of.
        one: `[k, k]`.
        other: `[k, k]`.
    """
    k = weight.shape[1]
    if k < 2:
        return 0.0
    picked = np.zeros(k, np.bool_)
    picked[np.random.default_rng(0).permutation(k)[: k // 2]] = True
    tried = [
        _Trial(weight.astype(np.float32), np.flatnonzero(~lost), np.flatnonzero(lost), seen, unseen)
        for lost in (picked, ~picked)
        for seen, unseen in ((one, other), (other, one))
    ]
    best, least = 0.0, np.inf
    for share in SHARES:
        loss = sum(trial.loss(share) for trial in tried)
        if loss < least:
            best, least = share, loss
        elif np.isfinite(loss):
            break
    return best


class _Trial:
    """One half of the inputs made up for by the other, from one half of the samples, judged on the other."""

    def __init__(self, weight: _F32, kept: NDArray[np.intp], lost: NDArray[np.intp], seen: F64, unseen: F64) -> None:
        gone = weight[:, lost]
        self._kept, self._seen, self._unseen = kept, seen, unseen
        self._right = _part(seen, kept, lost) @ gone.T
        self._unseen_right = _part(unseen, kept, lost) @ gone.T
        self._whole = float(np.einsum("ij,ij->", gone @ _part(unseen, lost, lost), gone))
        self._damping = np.float32(DAMPING * np.diagonal(seen).mean())

    def loss(self, share: float) -> float:
        """|gone x - v x_kept|^2 on the samples not seen, v being the best on those seen after shrinkage."""
        rest = np.float32(1 - share)
        gram = _part(self._seen, self._kept, self._kept)
        diagonal = np.einsum("ii->i", gram)
        own = diagonal + self._damping
        gram *= rest
        diagonal[:] = own
        try:
            factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:  # all 0; or single precision finds a nearly singular matrix indefinite
            return np.inf
        v = scipy.linalg.cho_solve(factor, self._right * rest, check_finite=False)
        judged = _part(self._unseen, self._kept, self._kept) @ v - 2 * self._unseen_right
        return self._whole + float(np.einsum("ij,ij->", v, judged))


def _part(gram: F64, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> _F32:
    return gram[np.ix_(rows, columns)].astype(np.float32)
