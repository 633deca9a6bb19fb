"""What a pattern is: which zeros a sparse weight may have.

A weight is always `[n, k]` = [outputs, inputs]. A pattern cuts it into **units**, the smallest things that can become
zero: one element each, or tiles of `rows` consecutive outputs by `cols` consecutive inputs. Units form a matrix
`[u, v]`; those at the lower and the right border are short where the tiles do not divide the weight.

           inputs k                     units [u, v] = [2, 3]
        +---------------+              +---------+
    n   | a b | c d | e |   2 x 2      | A  B  C |   A = {a, b, f, g}, B = {c, d, h, i}, C = {e, j}: short
        | f g | h i | j |  -------->   +---------+
        +-----+-----+---+              | P  Q  T |   the short last row: P = {p, q}, T = {t}
        | p q | r s | t |              +---------+
        +---------------+

A pattern also says which sets of units may go. For most that is any set; N:M and constant fan-in count what stays in
each group of inputs and in each output:

    scores [n, k]  --scores-->  [u, v]  --select-->  kept units [u, v]  --mask-->  kept elements [n, k]      = choose
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""A numeric array of any dtype."""
F64 = NDArray[np.float64]
Keep = NDArray[np.bool_]
"""Units that stay, `[u, v]`."""
Mask = NDArray[np.bool_]
"""Elements that stay, `[n, k]`."""
Sizes = NDArray[np.int64]
"""Elements in each unit, `[u, v]`; possibly a read-only view."""


class Pattern(Protocol):
    """Which zeros are allowed. Patterns are stateless values: equal ones are interchangeable."""

    @property
    def name(self) -> str:
        """How the pattern is written on the command line and in recipes."""

    @property
    def rows(self) -> int:
        """Consecutive outputs that share one zero (R). Where all do (`channel`), more than any weight has."""

    @property
    def cols(self) -> int:
        """Consecutive inputs that a choice must see together: C of R x C blocks, M of N:M, a channel's columns; else 1.

        `choose` may be asked run by run of columns: of runs that begin at a multiple of `cols` and whose width is one
        (the last may be narrower), the masks side by side are a mask of the whole weight.
        """

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself fixes (N:M: 1 - N/M), else None."""

    def sizes(self, n: int, k: int) -> Sizes:
        """Elements in each unit of a weight `[n, k]`, `[u, v]`."""

    def scores(self, importance: Array) -> F64:
        """Importance per unit, `[u, v]`: the mean over the unit's elements of `importance [n, k]`.

        The mean and not the sum, so that a short unit competes by its harm per removed element.
        """

    def mask(self, keep: Keep, n: int, k: int) -> Mask:
        """Elements that stay, `[n, k]`, from the units that stay, `[u, v]`.

        Raises:
            ValueError: a weight `[n, k]` has another number of units.
        """

    def select(self, scores: F64, sizes: Sizes, sparsity: float) -> Keep:
        """The units of one weight that stay, `[u, v]`: the ones with the highest scores that the pattern allows.

        As many go as come nearest to `sparsity` (a pattern with its own `sparsity` does not look at it); something
        always stays. Of units with equal scores those with the lower index go first.

        Raises:
            ValueError: a score is NaN.
        """

    def choose(self, importance: Array, sparsity: float) -> Mask:
        """Elements that stay, `[n, k]`, of a weight with `importance [n, k]`: `scores`, `select`, `mask`."""

    def fits(self, weight: Array) -> bool:
        """Whether the zeros of `weight [n, k]` follow the pattern."""

    def fill(self, weight: Array) -> float:
        """Nonzeros over elements stored when `weight [n, k]` is stored in this pattern: 1.0 stores no zero.

        What a kernel adds to complete units at the border is not counted. Where nothing is stored, fill is 1.0.
        """

    def on(self, kernel: int) -> Pattern:
        """The pattern for a weight whose input channels are `kernel` columns wide each (a convolution's kernel)."""
