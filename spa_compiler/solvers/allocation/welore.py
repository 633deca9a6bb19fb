"""WeLore: ranks from one threshold on the singular values, each layer's divided by its largest.

    rank[l] = number of i with s[l, i] / s[l, 0] >= t,      t as low as the budget of parameters allows

Layers whose singular values fall off fast get low ranks; those with a flat spectrum stay dense, as a factorization
that saves nothing is none: a weight [n, k] at rank r has min(r (n + k), n k) parameters. Jaiswal et al., "From GaLore
to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.errors import BudgetError
from spa_compiler.solvers.allocation.budget import F64

Ranks: TypeAlias = NDArray[np.int64]
"""Rank per layer, `[L]`; min(n, k) means dense."""


def welore(singular: Sequence[F64], shapes: Sequence[tuple[int, int]], sparsity: float, *, multiple: int = 1) -> Ranks:
    """The ranks of the lowest threshold whose parameters are at most `1 - sparsity` of the dense ones.

    A layer keeps at least its first `multiple` singular values. What is left over is less than the next step costs.

    Args:
        singular: singular values of each layer in descending order, `[min(n, k)]`.
        shapes: (n, k) of each layer.
        multiple: ranks come in multiples of this, and a step is as good as its first singular value.

    Raises:
        BudgetError: even ranks of `multiple` have more parameters.
        ValueError: singular values are not as many as a layer has, or not in descending order.
    """
    _check_spectra(singular, shapes)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}, not in [0, 1)")
    values, steps, owners = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for layer, (spectrum, (n, k)) in enumerate(zip(singular, shapes, strict=True)):
        ranks = np.minimum(np.arange(0, len(spectrum) + multiple, multiple), len(spectrum))
        first = np.asarray(spectrum[::multiple], np.float64) / (spectrum[0] or 1)
        first[0] = np.inf  # no layer without a rank
        values.append(first)
        steps.append(np.diff(np.minimum(ranks * (n + k), n * k)))
        owners.append(np.full(len(first), layer))
    step, owner = np.concatenate(steps), np.concatenate(owners)
    order = np.argsort(-np.concatenate(values), kind="stable")
    dense = sum(n * k for n, k in shapes)
    reached = step[order].cumsum()
    # (1 - 0.9) * 10 is less than 1: a little more, so that whole numbers stay what they are.
    count = int(np.searchsorted(reached, int((1 - sparsity) * dense * (1 + 1e-12)), side="right"))
    if count < len(shapes):
        least = int(reached[len(shapes) - 1])
        raise BudgetError(
            f"ranks of {multiple} in all layers have {least / dense:.2%} of the parameters, more than "
            f"{1 - sparsity:.2%}",
            fix="Ask for less, or leave out the smallest layers",
        )
    whole = np.array([min(shape) for shape in shapes], np.int64)
    return np.minimum(multiple * np.bincount(owner[order[:count]], minlength=len(shapes)), whole)


def _check_spectra(singular: Sequence[F64], shapes: Sequence[tuple[int, int]]) -> None:
    for layer, (spectrum, (n, k)) in enumerate(zip(singular, shapes, strict=True)):
        # Written so that NaN fails too.
        if len(spectrum) != min(n, k) or not (np.diff(spectrum) <= 0).all() or not spectrum[-1] >= 0:
            raise ValueError(f"layer {layer} [{n}, {k}] needs {min(n, k)} singular values in descending order")
