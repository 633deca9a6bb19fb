"""`fan-in`: every output keeps the same number of inputs (constant fan-in).

1 . . 4 . .
. 2 . . . 5     any input, like `unstructured`, but all rows have one length: indices and values are two plain
. . 3 6 . .     [n, kept] matrices, and work divides evenly over outputs

Every output keeps round((1 - sparsity) k) inputs, its best ones, at least one.

Lasby et al., Dynamic Sparse Training with Structured Sparsity (SRigL, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spa_compiler.patterns.pattern import F64, Array, Keep, Sizes
from spa_compiler.patterns.selection import keep_highest_of_each
from spa_compiler.patterns.units import Elements


@dataclass(frozen=True)
class FanIn(Elements):
    """The same number of nonzeros in every row. Implements `Pattern`."""

    name: ClassVar[str] = "fan-in"
    rows: ClassVar[int] = 1
    cols: ClassVar[int] = 1
    sparsity: ClassVar[None] = None

    def select(self, scores: F64, sizes: Sizes, sparsity: float) -> Keep:
        """The best of each output; as many for each."""
        return keep_highest_of_each(scores, max(1, round((1 - sparsity) * scores.shape[1])))

    def fits(self, weight: Array) -> bool:
        """Whether all rows have as many nonzeros."""
        counts = np.count_nonzero(weight, axis=1)
        return bool((counts == counts[:1]).all())

    def fill(self, weight: Array) -> float:
        """Nonzeros over rows as long as the one that has most."""
        counts = np.count_nonzero(weight, axis=1)
        longest = int(counts.max(initial=0))
        return float(counts.sum() / (longest * len(counts))) if longest else 1.0
