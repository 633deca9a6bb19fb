"""`unstructured`: any element may be zero.

1 . . 4
. 2 . .     most freedom, least harm at a given share of zeros; a kernel loads one activation vector
3 . . 5     for every multiplication, where R x 1 blocks load one for R
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa_compiler.patterns.pattern import Array


@dataclass(frozen=True)
class Unstructured:
    """Every element is its own unit. Implements `Pattern`."""

    name: str = "unstructured"
    rows: int = 1

    def sizes(self, n: int) -> NDArray[np.int64]:
        """`[n]` ones."""
        return np.ones(n, np.int64)

    def scores(self, importance: Array) -> NDArray[np.float64]:
        """`importance` itself, as float64."""
        return np.asarray(importance, np.float64)

    def mask(self, keep: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
        """`keep` itself.

        Raises:
            ValueError: `keep` does not have `n` rows.
        """
        if keep.shape[0] != n:
            raise ValueError(f"{keep.shape[0]} rows of units for {n} outputs")
        return keep

    def fits(self, weight: Array) -> bool:
        """Always: any zero is allowed."""
        return True

    def fill(self, weight: Array) -> float:
        """Always 1.0: only nonzeros are stored."""
        return 1.0
