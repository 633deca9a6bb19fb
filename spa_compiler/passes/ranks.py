"""Who gets which rank: what each layer's ranks cost and lose, and the choices over all layers.

A *layer* is one weight, or several that share a `down`. Its options are ranks that save enough, the dearest last; to
stay dense costs most and loses nothing. Losses are relative to what the layer puts out.

    uniform     every layer keeps the same share, the largest that fits the budget
    error       the least sum of losses within the budget, each counted as the model's outputs react to the layer
    welore      one threshold on the singular values of all layers, each divided by its largest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from spa_compiler.solvers import tucker
from spa_compiler.solvers.allocation import knapsack, welore
from spa_compiler.solvers.problem import F64

Rank: TypeAlias = tuple[int, ...]
"""r, or r_in and r_out."""

SAVING = 0.1
"""A rank saves at least this share of its layer, else the layer stays dense: two operators for one cost time, too."""

_POWER = 0.5
"""Of the model's reaction to a layer: later layers make up for a part of what earlier ones lose."""

_SLACK = 1e-9
_HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Layer:
    """What a layer's ranks cost and lose, in the order of cost; an option that costs more loses less.

    Attributes:
        options: not dense; empty where no rank saves enough.
        costs: of each option, in parameters or MACs.
        losses: of each option, relative to the energy of the layer's output.
        dense: what the layer costs as it is.
        spectrum: singular values in descending order, `[min(n, k)]`; None for a Tucker form.
        shape: (n, k).
    """

    options: tuple[Rank, ...]
    costs: F64
    losses: F64
    dense: float
    shape: tuple[int, int]
    spectrum: F64 | None = None

    def within(self, share: float) -> Rank | None:
        """The dearest option that costs `share` of dense at most, else the cheapest; None at 1 or without options."""
        if share >= 1 or not self.options:
            return None
        return self.options[max(0, self._count(share) - 1)]

    def cost(self, choice: Rank | None) -> float:
        """What an option costs."""
        return self.dense if choice is None else float(self.costs[self.options.index(choice)])

    def loss(self, choice: Rank | None) -> float:
        """What an option loses."""
        return 0.0 if choice is None else float(self.losses[self.options.index(choice)])

    def by_loss(self, loss: float) -> Rank | None:
        """The cheapest option that loses `loss` at most; None where only dense does."""
        fits = np.flatnonzero(self.losses <= loss * (1 + _SLACK))
        return self.options[fits[0]] if fits.size else None

    def _count(self, share: float) -> int:
        return int(np.searchsorted(self.costs, share * self.dense * (1 + _SLACK), side="right"))


def linear(tails: F64, shape: tuple[int, int], per_parameter: float, multiple: int) -> Layer:
    """Ranks of a weight `[n, k]`.

    Args:
        tails: the loss at rank 0, 1, ... min(n, k).
        per_parameter: what one parameter costs: 1, or the positions that it is multiplied at.
        multiple: ranks are multiples of it.
    """
    n, k = shape
    each, dense = (n + k) * per_parameter, n * k * per_parameter
    ranks = np.arange(multiple, len(tails), multiple)
    ranks = ranks[ranks * each <= dense * (1 - SAVING)]
    whole = float(tails[0]) or 1.0
    spectrum = np.sqrt(np.maximum(tails[:-1] - tails[1:], 0.0))
    options = tuple((int(r),) for r in ranks)
    # Rounding may leave the values of a singular weight's last ones out of order.
    return Layer(
        options,
        np.asarray(ranks * each, np.float64),
        tails[ranks] / whole,
        dense,
        shape,
        np.minimum.accumulate(spectrum),
    )


def kernel(weight: F64, channel_gram: F64 | None, inside: float, outside: float, multiple: int) -> Layer:
    """Pairs of ranks of a convolution `[M, C, kh, kw]`; the loss is a bound, in the channel-whitened norm.

    Args:
        inside: what a parameter in front of the kernel costs: 1, or the positions of the input.
        outside: and all others: 1, or the positions of the output.
    """
    outputs, channels, height, width = weight.shape
    lost_inside, lost_outside = tucker.energies(weight, channel_gram)
    whole = float(lost_outside[0]) or 1.0
    grid = np.meshgrid(
        np.arange(multiple, channels + 1, multiple), np.arange(multiple, outputs + 1, multiple), indexing="ij"
    )
    r_in, r_out = grid[0].ravel(), grid[1].ravel()
    costs = channels * r_in * inside + (r_in * r_out * height * width + r_out * outputs) * outside
    losses = (lost_inside[r_in] + lost_outside[r_out]) / whole
    dense = weight.size * outside
    keep = np.flatnonzero(costs <= dense * (1 - SAVING))
    keep = keep[np.lexsort((losses[keep], costs[keep]))]
    best = np.minimum.accumulate(losses[keep]) if keep.size else np.zeros(0)
    keep = keep[np.append(True, best[1:] < best[:-1])] if keep.size else keep
    options = tuple((int(r_in[i]), int(r_out[i])) for i in keep)
    shape = (outputs, channels * height * width)
    return Layer(options, costs[keep].astype(np.float64), losses[keep], float(dense), shape)


def uniform(layers: Sequence[Layer], share: float) -> list[Rank | None]:
    """Every layer within one share of its own cost, the largest at which all of them are within `share`."""
    budget = share * sum(layer.dense for layer in layers) * (1 + _SLACK)

    def total(part: float) -> float:
        return sum(layer.cost(layer.within(part)) for layer in layers)

    if total(1.0) <= budget:
        return [None for _ in layers]
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return [layer.within(low) for layer in layers]


def by_error(
    layers: Sequence[Layer], share: float, weights: F64 | None = None, power: float = _POWER
) -> list[Rank | None]:
    """The least sum of losses within `share` of what all layers cost.

    Args:
        weights: how much the model's outputs react to a loss of each layer, `[L]`; None: alike.
    """
    count = np.ones(len(layers)) if weights is None else _tempered(weights, power)
    costs = [np.append(layer.costs, layer.dense) for layer in layers]
    losses = [np.append(layer.losses, 0.0) * each for layer, each in zip(layers, count, strict=True)]
    chosen = knapsack(costs, losses, share * sum(layer.dense for layer in layers))
    return [(*layer.options, None)[option] for layer, option in zip(layers, chosen, strict=True)]


def by_welore(layers: Sequence[Layer], share: float, multiple: int) -> list[Rank | None]:
    """WeLore's ranks. A layer whose rank would save too little gets the largest that saves enough.

    Raises:
        BudgetError: the smallest ranks have more parameters.
    """
    spectra = [layer.spectrum for layer in layers]
    assert all(spectrum is not None for spectrum in spectra)  # the pass takes no Tucker forms then
    found = welore(
        [s for s in spectra if s is not None], [layer.shape for layer in layers], 1 - share, multiple=multiple
    )
    choices: list[Rank | None] = []
    for layer, r in zip(layers, found.tolist(), strict=True):
        dense = not layer.options or r * sum(layer.shape) >= layer.shape[0] * layer.shape[1]
        choices.append(None if dense else min(layer.options[-1], (r,)))
    return choices


def _tempered(weights: F64, power: float) -> F64:
    """Powers of weights, with a mean of 1; a layer that the outputs do not react to at all still counts a little."""
    floor = 1e-3 * float(weights.max(initial=0.0))
    if floor <= 0:
        return np.ones_like(weights)
    raised = np.maximum(weights, floor) ** power
    return np.asarray(raised / raised.mean())
