"""WeLore: ranks from one threshold on the singular values, each layer's divided by its largest.

    rank[l] = number of i with s[l, i] / s[l, 0] >= t,      t as low as the budget of parameters allows

Layers whose singular values fall off fast get low ranks; those with a flat spectrum stay dense, as a factorization
that saves nothing is none: a weight [n, k] at rank r has min(r (n + k), n k) parameters. Jaiswal et al., "From GaLore
to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation.budget import F64
from spa_compiler.solvers.allocation.ranks import Ranks, affordable, check_spectra, parameters


def welore(singular: Sequence[F64], shapes: Sequence[tuple[int, int]], sparsity: float, *, multiple: int = 1) -> Ranks:
    """The ranks of the lowest threshold whose parameters are at most `1 - sparsity` of the dense ones.

    A layer keeps at least its first `multiple` singular values. What is left over is less than the next step costs.

    Args:
        singular: singular values of each layer in descending order, `[min(n, k)]`.
        shapes: (n, k) of each layer.
        multiple: ranks come in multiples of this, and a step is as good as its first singular value.

    Raises:
        BudgetError: even ranks of `multiple` have more parameters.
    """
    check_spectra(singular, shapes)
    values, steps, owners = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for layer, (spectrum, (n, k)) in enumerate(zip(singular, shapes, strict=True)):
        ranks = np.minimum(np.arange(0, len(spectrum) + multiple, multiple), len(spectrum))
        first = np.asarray(spectrum[::multiple], np.float64) / (spectrum[0] or 1)
        first[0] = np.inf  # no layer without a rank
        values.append(first)
        steps.append(np.diff(parameters(ranks, n, k)))
        owners.append(np.full(len(first), layer))
    step, owner = np.concatenate(steps), np.concatenate(owners)
    order = np.argsort(-np.concatenate(values), kind="stable")
    dense = sum(n * k for n, k in shapes)
    reached = step[order].cumsum()
    count = int(np.searchsorted(reached, affordable(shapes, sparsity), side="right"))
    if count < len(shapes):
        least = int(reached[len(shapes) - 1])
        raise BudgetError(
            f"ranks of {multiple} in all layers have {least / dense:.2%} of the parameters, more than "
            f"{1 - sparsity:.2%}",
            fix="Ask for less, or leave out the smallest layers",
        )
    whole = np.array([min(shape) for shape in shapes], np.int64)
    return np.minimum(multiple * np.bincount(owner[order[:count]], minlength=len(shapes)), whole)
