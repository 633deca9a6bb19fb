"""L1: an index of an axis matters as much as the absolute values in its slab.

    importance[i] = sum |W[i, ...]|

Li et al., "Pruning Filters for Efficient ConvNets", 2017.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.criteria.along import sums


def l1(weight: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """Sum of absolute values for each index of `axis`, `[size of the axis]`."""
    return sums(np.abs, weight, axis)
