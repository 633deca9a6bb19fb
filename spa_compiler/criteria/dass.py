"""DaSS: in a gated feed-forward block, weights that make a strong intermediate feature matter more.

    h = act(x Wgate^T) * (x Wup^T),   y = h Wdown^T

    gate, up:  importance[i, j] = (|W[i, j]| * |h_i|^alpha)^2        |h_i|: root mean square of the intermediate feature
    down:      Wanda, where |h| is the norm of the inputs

Guo et al., "Dependency-aware Semi-structured Sparsity of GLU Variants in Large Language Models", 2024. All weights
that meet in one intermediate feature (a row of gate, a row of up, a column of down) then share its norm, as they do in
structured pruning; alpha = 0.5 is the paper's. Squared for the reason that `wanda` states.

The norm is the same for all weights of one output. A pattern that ranks the weights of an output among themselves
(`fan-in`, N:M along the inputs) therefore chooses by magnitude alone; `unstructured`, blocks and `channel` compare
outputs and do use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.5
"""Between 0, magnitude, and 1, the full norm."""


def dass(weight: NDArray[Any], output_norms: NDArray[np.float64], alpha: float = ALPHA) -> NDArray[np.float64]:
    """Importance of a gate or up projection, `[n, k]` like `weight`; for a down projection take `wanda`.

    Args:
        weight: `[n, k]`.
        output_norms: root mean square of each intermediate feature, `[n]`: what the down projection reads.
        alpha: how much the norms count.
    """
    factors = np.power(np.asarray(output_norms, np.float64), alpha)
    scores: NDArray[np.float64] = np.square(np.multiply(weight, factors[:, None], dtype=np.float64))
    return scores
