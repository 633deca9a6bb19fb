"""L2: an index of an axis matters as much as the squares in its slab.

    importance[i] = sum W[i, ...]^2

The squared norm, not the norm: squares add up over the weights in which a unit has slabs, and removing a set of units
changes the weights by the square root of their summed importance. Both rank the slabs of one weight alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.criteria.along import sums


def l2(weight: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """Sum of squares for each index of `axis`, `[size of the axis]`."""
    return sums(np.square, weight, axis)
