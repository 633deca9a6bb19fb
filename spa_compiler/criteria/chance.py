"""Chance: what everything else must beat.

importance[i] ~ U[0, 1)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def chance(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """One draw for each of `size` units."""
    return rng.random(size)
