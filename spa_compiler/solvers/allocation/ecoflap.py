"""ECoFLaP: how much the loss moves when a layer's weights are shaken, two forward passes per layer and draw.

    score[l] = mean over draws z ~ N(0, 1) of |L(w_l + eps z) - L(w_l - eps z)| / (2 eps)    ~ norm of dL/dw_l
    kept[l]  = (1 - max_sparsity) * sizes[l] + c * score[l],     at most sizes[l], c such that the budget is met

so what one full layer cannot take goes to the others in proportion. No gradients are needed. Sung, Yoon, Bansal,
"ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models", 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from spa_compiler.solvers.allocation.budget import F64, Sizes
from spa_compiler.solvers.allocation.proportional import proportional

Loss: TypeAlias = Callable[[int, int, int], float]
"""`loss(layer, direction, seed)`: of the model whose `layer` is moved by direction * eps * z, where direction is +1 or
-1 and z depends on the seed (and may on the layer); all other layers as they are."""


def gradient_norms(loss: Loss, layers: int, *, seeds: Sequence[int], eps: float = 1e-3) -> F64:
    """`score`, `[layers]`; every layer is shaken with every seed.

    Raises:
        ValueError: a loss is not finite, or there is no seed.
    """
    if not seeds:
        raise ValueError("a gradient needs at least one draw")
    scores = np.zeros(layers)
    for layer in range(layers):
        for seed in seeds:
            change = loss(layer, 1, seed) - loss(layer, -1, seed)
            if not np.isfinite(change):
                raise ValueError(f"the loss is not finite when layer {layer} is moved by {eps} (seed {seed})")
            scores[layer] += abs(change) / (2 * eps)
    return scores / len(seeds)


def ecoflap(
    loss: Loss,
    sizes: Sizes,
    sparsity: float,
    *,
    seeds: Sequence[int],
    eps: float = 1e-3,
    max_sparsity: float | F64 | None = None,
) -> F64:
    """Share of zeros per layer, `[L]`.

    Args:
        seeds: one per draw.
        eps: how far `loss` moves the weights; the result does not depend on its unit.

    Raises:
        BudgetError: `max_sparsity` leaves too few zeros.
        ValueError: as `gradient_norms`.
    """
    scores = gradient_norms(loss, len(sizes), seeds=seeds, eps=eps)
    # The paper divides the number of kept weights, not the density, in proportion to the scores.
    return proportional(scores / np.asarray(sizes, np.float64), sizes, sparsity, max_sparsity=max_sparsity)
