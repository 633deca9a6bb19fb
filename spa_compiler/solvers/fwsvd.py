"""FWSVD: low rank in a norm where each input counts as much as the loss reacts to its weights.

    min over rank r of sum_j D_j^2 |W0[:, j] - W_r[:, j]|^2,        D_j = sqrt(sum_i F[i, j])

F `[n, k]` is the diagonal of the Fisher information, the mean of squared gradients of the loss. One number per input,
not per weight: an element-wise weighted low rank problem has no closed form, this one is an SVD of W0 diag(D). Hsu et
al., "Language model compression with weighted low-rank factorization", 2022.
"""

from __future__ import annotations

import numpy as np

from spa_compiler.solvers.problem import F64, Problem
from spa_compiler.solvers.svd import Decomposition, decompose


def fwsvd(problem: Problem, scores: F64 | None = None) -> Decomposition:
    """The best of each rank in the Fisher norm; `tails` are losses at the output.

    Args:
        scores: F `[n, k]`, not negative. None: the **activation proxy**, D_j^2 = E[x_j^2]. It is what F gives where
            gradients at the outputs g do not depend on the inputs: E[(g_i x_j)^2] = E[g_i^2] E[x_j^2].

    Raises:
        ValueError: `scores` have another shape than the weight, or one of them is negative or not finite.
    """
    if scores is None:
        return decompose(problem, np.square(problem.norms))
    if scores.shape != problem.weight.shape:
        raise ValueError(f"scores {list(scores.shape)} for a weight {list(problem.weight.shape)}")
    if not (np.isfinite(scores).all() and (scores >= 0).all()):
        raise ValueError("scores must be finite and not negative")
    return decompose(problem, np.asarray(scores.sum(axis=0, dtype=np.float64)))
