"""What ranks cost: a weight [n, k] of rank r is two factors of r (n + k) elements, or dense where that is no less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.allocation.budget import F64

Ranks: TypeAlias = NDArray[np.int64]
"""Rank per layer, `[L]`; min(n, k) means dense."""


def parameters(rank: Ranks, n: int, k: int) -> Ranks:
    """Elements of a weight `[n, k]` at each rank."""
    return np.minimum(rank * (n + k), n * k)


def affordable(shapes: Sequence[tuple[int, int]], sparsity: float) -> int:
    """The most elements that weights `[n, k]` may have together when `sparsity` of them are to be saved."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, not in [0, 1)")
    # (1 - 0.9) * 10 is less than 1: a little more, so that whole numbers stay what they are.
    return int((1 - sparsity) * sum(n * k for n, k in shapes) * (1 + 1e-12))


def saved(ranks: Ranks, shapes: Sequence[tuple[int, int]]) -> F64:
    """The share of parameters that each layer saves at its rank, `[L]`: 0 where it stays dense."""
    n, k = np.asarray(shapes, np.int64).reshape(-1, 2).T
    share: F64 = 1 - np.minimum(ranks * (n + k), n * k) / (n * k)
    return share


def check_spectra(singular: Sequence[F64], shapes: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError where a layer's singular values are not as many as it has, in descending order."""
    for layer, (spectrum, (n, k)) in enumerate(zip(singular, shapes, strict=True)):
        # Written so that NaN fails too.
        if len(spectrum) != min(n, k) or not (np.diff(spectrum) <= 0).all() or not spectrum[-1] >= 0:
            raise ValueError(f"layer {layer} [{n}, {k}] needs {min(n, k)} singular values in descending order")
