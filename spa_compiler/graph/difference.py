"""How far two results of one computation are apart."""

from __future__ import annotations

import numpy as np


def difference(want: np.ndarray, got: np.ndarray, steady: np.ndarray | None = None) -> float | None:
    """max|got - want| relative to max|want|; 0 or 1 for integers, booleans and strings, which must be equal.

    Args:
        steady: for those, where the reference agrees with itself at two optimization levels; only there can equality
            be asked for (an ArgMax between two values that differ in the last bit).

    Returns:
        None when shape, type, or the places of NaN or Inf differ. The largest magnitude is taken over finite values,
        and is 1 when all are zero.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        return None
    if want.dtype.kind not in "fc":
        wrong = want != got
        return float(np.any(wrong if steady is None else wrong & steady))
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        return None
    return relative(want[finite], got[finite])


def relative(want: np.ndarray, got: np.ndarray) -> float:
    """max|got - want| over max|want|, which counts as 1 when all is zero; 0 for arrays without elements."""
    if want.size == 0:
        return 0.0
    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    a, b = want.astype(wide), got.astype(wide)
    return float(np.abs(a - b).max() / (np.abs(a).max() or 1.0))
