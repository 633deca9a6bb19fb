"""Sums over everything but one axis, in float64 and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Measure: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Element by element."""

_BLOCK = 1 << 20
"""Elements that are held in float64 at a time: 8 MB."""


def sums(measure: Measure, weight: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """For each index of `axis`, the sum of `measure` over its slab.

    Args:
        weight: of any float type, those of ml_dtypes included.
        axis: counted from 0.
    """
    size = weight.shape[axis]
    slabs = np.moveaxis(weight, axis, 0).reshape(size, -1)  # a view where the layout allows, else one copy as it is
    width = slabs.shape[1]
    out = np.zeros(size, np.float64)
    rows = max(1, _BLOCK // max(1, width))
    for start in range(0, size, rows):
        block = slabs[start : start + rows]
        for left in range(0, width, _BLOCK):
            part = measure(np.asarray(block[:, left : left + _BLOCK], np.float64))
            out[start : start + rows] += part.sum(axis=1)
    return out
