"""Wanda: a weight matters as much as what it adds to its output.

    importance[i, j] = W[i, j]^2 * E[x_j^2]

The exact loss E |w x - w' x|^2 of zeroing one weight, and of zeroing any set where inputs are uncorrelated. Sun et al.,
"A Simple and Effective Pruning Approach for Large Language Models", 2024, state the root, |W[i, j]| * |x_j|: the order
is the same, but a pattern's units score the mean of their elements, and losses add up where their roots do not.

The paper ranks the weights of one output among themselves, and reports that this is better than ranking the whole
matrix. That comparison is a pattern here: `fan-in` keeps equally many weights in each output. `unstructured` ranks all
outputs together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def wanda(weight: NDArray[Any], norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared contribution of each weight, `[n, k]` like `weight`.

    Args:
        weight: `[n, k]`.
        norms: root mean square of each input, `[k]`; any common factor leaves the order as it is.
    """
    scores: NDArray[np.float64] = np.square(np.multiply(weight, norms, dtype=np.float64))
    return scores
