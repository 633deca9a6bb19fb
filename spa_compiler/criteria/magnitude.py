"""Magnitude: a weight matters as much as its square.

    importance[i, j] = W[i, j]^2

Zeroing a set of weights changes W by the square root of their summed importance (Frobenius norm), so the smallest
squares are the exact answer to "which S weights change W least". Han et al., "Learning both Weights and Connections
for Efficient Neural Networks", 2015.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def magnitude(weight: NDArray[Any]) -> NDArray[np.float64]:
    """Squared magnitude, `[n, k]` like `weight`.

    In float64, where the square of a float32 is exact (48 of 53 bits) and neither underflows nor overflows: the order
    of the scores is the order of the magnitudes, and ties are true ties.
    """
    scores: NDArray[np.float64] = np.square(weight, dtype=np.float64)
    return scores
