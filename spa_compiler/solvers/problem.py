"""The layer-wise problem that every solver works on: keep a layer's output with fewer weights.

    minimize over W in a pattern     E |W0 x - W x|^2  =  tr((W0 - W) G (W0 - W)^T),      G = E[x x^T]

`x [k]` is what one output position of the layer reads (a token's features, an im2col column), W0 `[n, k]` the weight
to come near. The expectation is over the calibration samples. Everything is float64: Gram matrices are ill
conditioned, and the solvers invert them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.patterns import Pattern

F64: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
"""True where a weight stays."""

DAMPING = 0.01
"""Of the Gram matrix's mean diagonal, added to its diagonal: SparseGPT's choice."""


@dataclass(frozen=True)
class Problem:
    """One layer, or one group of a grouped convolution.

    Attributes:
        weight: W0 `[n, k]`.
        gram: G `[k, k]`, symmetric, not negative definite; the mean over positions, not the sum.
        mean: E[x] `[k]`.
        count: positions that the statistics were taken over; below `k`, G is singular.
        centred: whether G is E[(x - E[x]) (x - E[x])^T], as where a bias takes up what the mean of x gives.
    """

    weight: F64
    gram: F64
    mean: F64
    count: int
    centred: bool = False

    @property
    def norms(self) -> F64:
        """Root mean square of each input, `[k]`; of x - E[x] where G is centred."""
        return np.asarray(np.sqrt(np.maximum(np.diagonal(self.gram), 0)))

    @property
    def variance(self) -> F64:
        """Var(x) of each input, `[k]`."""
        energy = np.diagonal(self.gram)
        return np.asarray(np.maximum(energy if self.centred else energy - np.square(self.mean), 0.0))

    def loss(self, weight: F64) -> float:
        """E |W0 x - W x|^2 of `weight [n, k]`."""
        change = weight - self.weight
        return max(0.0, float(np.einsum("ij,ij->", change @ self.gram, change)))

    def error(self, weight: F64) -> float:
        """Relative output error: sqrt(E |W0 x - W x|^2 / E |W0 x|^2); that of the weights where x is always 0."""
        whole = float(np.einsum("ij,ij->", self.weight @ self.gram, self.weight))
        if whole > 0:
            return float(np.sqrt(self.loss(weight) / whole))
        size = float(np.square(self.weight).sum())
        return float(np.sqrt(np.square(weight - self.weight).sum() / size)) if size else 0.0

    def damped(self, damping: float = DAMPING) -> F64:
        """G with `damping` times its mean diagonal on the diagonal; inputs that are always 0 get a 1 there.

        A new array, positive definite. Weights of inputs that are always 0 have no say: a solver may set them to 0.
        """
        gram = np.array(self.gram)
        diagonal = np.einsum("ii->i", gram)
        dead = diagonal <= 0
        diagonal += damping * float(diagonal.mean())
        diagonal[dead] = max(1.0, float(diagonal.max(initial=0.0)))
        return gram


def relative_loss(problems: Sequence[Problem], weights: Sequence[F64]) -> float | None:
    """What new weights of the groups of one layer lose, of what its output is; None where that is always 0."""
    lost = sum(problem.loss(weight) for problem, weight in zip(problems, weights, strict=True))
    whole = sum(problem.loss(np.zeros_like(problem.weight)) for problem in problems)
    return lost / whole if whole > 0 else None


@dataclass(frozen=True)
class Zeros:
    """How many zeros, and where they may be."""

    pattern: Pattern
    sparsity: float
    """Share of zeros, 0 <= sparsity < 1; N:M patterns have their own and do not look at it."""

    def choose(self, importance: F64) -> Mask:
        """What stays of `importance [n, m]` (any aligned run of m input columns): the units with the highest mean."""
        return self.pattern.choose(importance, self.sparsity)


@dataclass(frozen=True)
class Solution:
    """`weight [n, k]` is 0 wherever `mask [n, k]` is False."""

    weight: F64
    mask: Mask
