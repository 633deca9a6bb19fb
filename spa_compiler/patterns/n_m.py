"""`N:M`: of every M consecutive inputs of an output, at most N are not zero.

2:4      1 . . 4 | . 2 2 .     a group stores its N values and where they are in the group, so the place of every
         . . 3 1 | 5 . . 7     value is known to within M inputs, and every row has the same length
         ------- + -------

4:4 is dense, and 1:M a choice of one. Groups begin at multiples of M; where M does not divide the inputs, the last
group of L inputs keeps min(N, L). The share of zeros is the pattern's own, 1 - N/M.

Mishra et al., Accelerating Sparse Deep Neural Networks (2021), for 2:4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler.errors import UsageError
from spa_compiler.patterns.pattern import F64, Array, Keep, Sizes
from spa_compiler.patterns.selection import keep_highest_of_each
from spa_compiler.patterns.units import Elements

MAX_GROUP = 64
"""In wider groups the choice is hardly bound any more: `fan-in` then says as much."""


@dataclass(frozen=True)
class NofM(Elements):
    """At most `kept` = N nonzeros in every `cols` = M inputs. Implements `Pattern`.

    Raises:
        UsageError: not 1 <= N <= M <= `MAX_GROUP`.
    """

    kept: int
    cols: int
    rows: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.cols <= MAX_GROUP:
            raise UsageError(f"{self.name}: M of N:M is 1 to {MAX_GROUP}", fix="For wider groups take fan-in")
        if self.kept > self.cols:
            raise UsageError(f"{self.name}: N of N:M is at most M", fix=f"{self.cols}:{self.cols} keeps everything")
        if self.kept < 1:
            raise UsageError(f"{self.name}: N of N:M is at least 1", fix=f"1:{self.cols} keeps least")

    @property
    def name(self) -> str:
        """`N:M`."""
        return f"{self.kept}:{self.cols}"

    @property
    def sparsity(self) -> float:
        """1 - N/M."""
        return 1 - self.kept / self.cols

    def select(self, scores: F64, sizes: Sizes, sparsity: float) -> Keep:
        """The N best of each group, whatever `sparsity` says."""
        n, k = scores.shape
        whole = k - k % self.cols
        keep = np.empty((n, k), np.bool_)
        keep[:, :whole] = keep_highest_of_each(scores[:, :whole].reshape(-1, self.cols), self.kept).reshape(n, whole)
        if whole < k:
            keep[:, whole:] = keep_highest_of_each(scores[:, whole:], min(self.kept, k - whole))
        return keep

    def fits(self, weight: Array) -> bool:
        """Whether no group has more than N nonzeros."""
        return bool((self._nonzeros(weight) <= self.kept).all())

    def fill(self, weight: Array) -> float:
        """Nonzeros over N places per group (min(N, L) in a short last group).

        Where a group has more than N nonzeros, every one of them has a place.
        """
        nonzeros = self._nonzeros(weight)
        widths = np.minimum(self.cols, weight.shape[1] - np.arange(0, weight.shape[1], self.cols))
        places = int(np.maximum(nonzeros, np.minimum(widths, self.kept)).sum())
        return float(nonzeros.sum() / places) if places else 1.0

    def _nonzeros(self, weight: Array) -> NDArray[np.int64]:
        """Nonzeros of each group, `[n, ceil(k / M)]`."""
        starts = np.arange(0, weight.shape[1], self.cols)
        return np.add.reduceat(weight != 0, starts, axis=1, dtype=np.int64)
