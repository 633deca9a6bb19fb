"""What a pattern is: which zeros a sparse weight may have.

A weight is always `[n, k]` = [outputs, inputs]. A pattern cuts it into **units**, the smallest things that can become
zero together: `rows` consecutive outputs of one input column. Units form a matrix `[n_groups, k]` with
`n_groups = ceil(n / rows)`; the last group is short where `rows` does not divide `n`.

           inputs k                      units
        +-----------+                 +-----------+
    n   | a b c d e |   rows = 2      | A B C D E |   A = {a, f}, B = {b, g}, ...
        | f g h i j |  ----------->   +-----------+
        | p q r s t |                 | P Q R S T |   the short last group: P = {p}
        +-----------+                 +-----------+
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""A numeric array of any dtype."""


class Pattern(Protocol):
    """Which zeros are allowed. Patterns are stateless values: two with equal names are interchangeable."""

    @property
    def name(self) -> str:
        """How the pattern is written on the command line and in recipes."""

    @property
    def rows(self) -> int:
        """Consecutive outputs that share one zero (R); 1 when every element is its own unit."""

    def sizes(self, n: int) -> NDArray[np.int64]:
        """Elements in a unit of each group, `[n_groups]`: `rows`, and fewer in a short last group."""

    def scores(self, importance: Array) -> NDArray[np.float64]:
        """Importance per unit, `[n_groups, k]`: the mean over the unit's elements of `importance [n, k]`.

        The mean and not the sum, so that a unit of a short last group competes by its harm per removed element.
        """

    def mask(self, keep: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
        """Elements that stay, `[n, k]`, from the units that stay, `[n_groups, k]`."""

    def fits(self, weight: Array) -> bool:
        """Whether the zeros of `weight [n, k]` follow the pattern: no unit is partly zero."""

    def fill(self, weight: Array) -> float:
        """Nonzeros over elements stored when `weight [n, k]` is stored in this pattern: 1.0 stores no zero.

        Rows that a kernel adds to complete the last group are not counted. A weight without nonzeros has fill 1.0.
        """
