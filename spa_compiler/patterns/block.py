"""`block:Rx1`: R consecutive outputs share a zero at the same input.

block:2x1     1 . . 4
              3 . . 5     one loaded activation vector feeds R multiplications, and one column index
              . 2 . .     serves R values
              . 6 . .
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spa_compiler.errors import UsageError
from spa_compiler.patterns.pattern import Array

MAX_ROWS = 64
"""Taller blocks have no use: a kernel keeps one accumulator per row, and a core has 32 vector registers."""


@dataclass(frozen=True)
class Block:
    """R x 1 blocks, `rows` = R consecutive outputs of one input. Implements `Pattern`.

    Raises:
        UsageError: R is not in 1..`MAX_ROWS`.
    """

    rows: int

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise UsageError(f"a block of {self.rows} rows is not possible", fix=f"R of block:Rx1 is 1 to {MAX_ROWS}")

    @property
    def name(self) -> str:
        """`block:Rx1`."""
        return f"block:{self.rows}x1"

    def sizes(self, n: int) -> NDArray[np.int64]:
        """`[ceil(n / R)]`: R, and `n % R` in a short last group."""
        sizes = np.full(-(-n // self.rows), self.rows, np.int64)
        if n % self.rows:
            sizes[-1] = n % self.rows
        return sizes

    def scores(self, importance: Array) -> NDArray[np.float64]:
        """Mean over each block, `[ceil(n / R), k]`."""
        importance = np.asarray(importance, np.float64)
        # Row by row, not `np.add.reduceat`: the sum's order, and so its last bit, must not depend on numpy's version.
        n, k = importance.shape
        sums = np.zeros((-(-n // self.rows), k))
        for row in range(self.rows):
            part = importance[row :: self.rows]
            sums[: len(part)] += part
        return sums / self.sizes(n)[:, None]

    def mask(self, keep: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
        """Each unit's answer for all of its rows, `[n, k]`.

        Raises:
            ValueError: `keep` does not have `ceil(n / R)` rows.
        """
        if keep.shape[0] != -(-n // self.rows):
            raise ValueError(f"{keep.shape[0]} rows of blocks of {self.rows} for {n} outputs")
        return np.repeat(keep, self.rows, axis=0)[:n]

    def fits(self, weight: Array) -> bool:
        """Whether no block is partly zero."""
        return self._stored(weight) == np.count_nonzero(weight)

    def fill(self, weight: Array) -> float:
        """Nonzeros over the elements of all blocks that have one."""
        stored = self._stored(weight)
        return float(np.count_nonzero(weight) / stored) if stored else 1.0

    def _stored(self, weight: Array) -> int:
        """Elements in blocks that are not wholly zero."""
        n, k = weight.shape
        used = np.zeros((-(-n // self.rows), k), np.bool_)
        for row in range(self.rows):
            part = weight[row :: self.rows]
            used[: len(part)] |= part != 0
        return int(np.count_nonzero(used, axis=1) @ self.sizes(n))
