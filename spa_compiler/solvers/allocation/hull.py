"""The lower convex hull of a curve: where spending more on one layer brings less and less."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.allocation.budget import F64


def lower_hull(at: F64, values: F64) -> NDArray[np.int64]:
    """Indices of the corners of the greatest convex function below the points, first and last point included.

    Andrew, "Another efficient algorithm for convex hulls in two dimensions", 1979.

    Args:
        at: ascending, `[m]`.
        values: `[m]`.
    """
    corners: list[int] = []
    for point in range(len(at)):
        while len(corners) > 1:
            left, middle = corners[-2:]
            if (values[middle] - values[left]) * (at[point] - at[left]) < (values[point] - values[left]) * (
                at[middle] - at[left]
            ):
                break
            corners.pop()
        corners.append(point)
    return np.array(corners, np.int64)
