"""Erdos-Renyi-Kernel: the more a weight has elements over its dimensions, the sparser it can be.

    density[l] ~ (n_out + n_in + k_1 + k_2 + ...) / (n_out * n_in * k_1 * k_2 * ...)

for a kernel of k_1 x k_2 x ..., and without the k for a plain matrix; scaled to the budget, and what a density of at
most 1 takes away goes to the other layers in proportion. Evci et al., "Rigging the Lottery: Making All Tickets
Winners", 2020, after Mocanu et al., 2018. A rule for sparsity fixed before training: it looks at no value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spa_compiler.solvers.allocation.budget import F64, ceilings, fit


def erk(shapes: Sequence[Sequence[int]], sparsity: float, *, max_sparsity: float | F64 | None = None) -> F64:
    """Share of zeros per layer, `[L]`.

    Args:
        shapes: (n_out, n_in, *kernel) of each weight, n_in per group of a grouped convolution.

    Raises:
        BudgetError: `max_sparsity` leaves too few zeros.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    return fit(0.0, raw, sizes, sparsity, ceilings(sizes, sparsity, max_sparsity))
