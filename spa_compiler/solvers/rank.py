"""Which rank: for one layer by a share of energy, an error or a cost; for many layers by one budget.

A rank r costs r * (cost of one), n + k parameters for a linear layer; dense costs n * k. A rank pays only where it
costs less. Many layers at once are a multiple-choice knapsack:

    min sum_l weights_l * loss_l(option_l)        s.t.  sum_l cost_l(option_l) <= budget

where the options of a layer are its ranks and to stay dense, at loss 0. On the lower convex hull of each layer's
(cost, loss) points, steps in the order of loss saved per cost are the Lagrangian optimum, exact at every budget at
which a step ends. Squared singular values descend, so ranks alone are convex already and every rank is on the hull; the
dense point does not continue that curve (from the last rank that pays to dense the loss falls to 0 at once), and takes
the ranks near it off the hull. What the steps leave of the budget is then spent on single options, off the hull too,
and on exchanges between two layers. Sinha and Zoltners, "The multiple-choice knapsack problem", 1979.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.problem import F64

Indices: TypeAlias = NDArray[np.int64]

_SLACK = 1e-9
"""Of a budget or a threshold: shares are quotients, and a budget of 0.7 is met by 0.7."""
_ZERO = 1e-14
"""Of the whole loss: what rounding leaves where the loss is 0."""


def by_energy(tails: F64, share: float) -> int:
    """The least rank that keeps `share` of the energy: tails[r] <= (1 - share) * tails[0]; 0 where there is none."""
    return _first(tails, 1.0 - share)


def by_error(tails: F64, error: float) -> int:
    """The least rank with a relative output error, sqrt(tails[r] / tails[0]), of `error` at most."""
    return _first(tails, error * error)


def by_cost(cost_per_rank: float, dense_cost: float, share: float, *, multiple: int = 1) -> int:
    """The greatest rank that costs `share` of dense at most, parameters or MACs alike; 0 where none does.

    Args:
        multiple: the rank is a multiple of it.
    """
    steps = math.floor(share * dense_cost * (1 + _SLACK) / (cost_per_rank * multiple))
    return max(0, steps) * multiple


def allocate_ranks(
    tails: Sequence[F64],
    costs_per_rank: Sequence[float],
    dense_costs: Sequence[float],
    budget: float,
    *,
    weights: Sequence[float] | None = None,
    multiple: int = 1,
    floor: int = 1,
    saving: float = 0.0,
) -> list[int | None]:
    """The rank of each layer, None where it stays dense, so that the loss is least within the budget.

    Args:
        tails: for each layer its loss at rank 0, 1, ... min(n, k), as `Decomposition.tails`.
        costs_per_rank: n + k parameters, or the MACs of one rank.
        dense_costs: n * k parameters, or MACs; in the unit of `costs_per_rank`.
        budget: what all layers may cost together. Where it cannot be met, each layer gets its cheapest option.
        weights: what a layer's loss counts, 1 if None. 1 / tails[0] makes losses relative to the layer's output;
            1 / (tails[0] - tails[1]) relative to its first singular value, the scale on which WeLore compares layers.
        multiple: ranks are multiples of it; kernels like 8 or 16.
        floor: no rank is below it; 1 or more.
        saving: a rank must cost less than (1 - saving) of dense.

    Raises:
        ValueError: the sequences differ in length, or a number is out of its range.
    """
    counts = {len(tails), len(costs_per_rank), len(dense_costs), len(tails) if weights is None else len(weights)}
    if len(counts) != 1:
        raise ValueError("tails, costs and weights must be as many as there are layers")
    if multiple < 1 or floor < 1 or not 0 <= saving < 1 or any(cost <= 0 for cost in costs_per_rank):
        raise ValueError("multiple, floor and the costs of a rank must be positive, saving at least 0 and below 1")
    ranks: list[list[int | None]] = []
    costs: list[F64] = []
    losses: list[F64] = []
    for layer, tail in enumerate(tails):
        per_rank, dense = costs_per_rank[layer], dense_costs[layer]
        some = np.arange(-(-floor // multiple) * multiple, tail.size, multiple)
        some = some[some * per_rank < dense * (1 - saving)]
        ranks.append([*some.tolist(), None])
        costs.append(np.append(some * float(per_rank), float(dense)))
        losses.append(np.append(tail[some], 0.0) * (1.0 if weights is None else weights[layer]))
    return [own[option] for own, option in zip(ranks, allocate(costs, losses, budget), strict=True)]


def allocate(costs: Sequence[F64], losses: Sequence[F64], budget: float) -> list[int]:
    """One option of each layer, the least loss within the budget; the index of each.

    The loss is above the optimum by less than one hull step saves, and is the optimum wherever steps end at the
    budget.

    Args:
        costs: for each layer what each of its options costs, in any order. At least one option.
        losses: what each option loses.
        budget: where it cannot be met, each layer gets its cheapest option.
    """
    budget += abs(budget) * _SLACK
    hulls = [_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    steps: list[tuple[float, int, int, int]] = []  # minus the loss saved per cost, layer, from, to
    for layer, hull in enumerate(hulls):
        for here, there in itertools.pairwise(hull):
            saved = losses[layer][here] - losses[layer][there]
            steps.append((-saved / (costs[layer][there] - costs[layer][here]), layer, here, there))
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(float(costs[layer][option]) for layer, option in enumerate(chosen))
    for _, layer, here, there in sorted(steps):
        more = float(costs[layer][there] - costs[layer][here])
        if chosen[layer] == here and more <= left:  # a layer whose step was too long stays where it is
            chosen[layer] = there
            left -= more
    if left >= 0:
        _spend(costs, losses, chosen, left)
    return chosen


def _first(tails: F64, share: float) -> int:
    """The least rank at which the loss is `share` of the whole at most."""
    return int(np.argmax(tails <= (max(share, 0.0) * (1 + _SLACK) + _ZERO) * tails[0]))


def _hull(cost: F64, loss: F64) -> list[int]:
    """The options on the lower convex hull, cheapest first, the loss falling at each."""
    hull: list[int] = []
    for option in np.lexsort((loss, cost)).tolist():
        if hull and loss[option] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], option, cost, loss):
            hull.pop()
        hull.append(option)
    return hull


def _above(first: int, middle: int, last: int, cost: F64, loss: F64) -> bool:
    """Whether the middle option is on or above the line between the others."""
    rise = (loss[middle] - loss[first]) * (cost[last] - cost[first])
    return bool(rise >= (loss[last] - loss[first]) * (cost[middle] - cost[first]))


def _spend(costs: Sequence[F64], losses: Sequence[F64], chosen: list[int], left: float) -> None:
    """Improve `chosen` within what is left: the best change of one layer or exchange of two, until there is none."""
    # For each layer a table "within this much more cost (less, if negative), the least change of loss", so that the
    # best partner of a change is one look-up.
    tables = [_Table(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    whole = sum(float(loss[option]) for loss, option in zip(losses, chosen, strict=True))
    while True:
        best = (-whole * _SLACK, -1, 0, -1, 0)  # change of loss, layer, option, other layer, its option
        for layer, option in enumerate(chosen):
            change_cost = costs[layer] - costs[layer][option]
            change_loss = losses[layer] - losses[layer][option]
            for other in range(layer, len(chosen)):
                partner: Indices = np.full(change_cost.size, option)
                if other == layer:
                    total = np.where(change_cost <= left, change_loss, np.inf)
                else:
                    now = chosen[other]
                    partner = tables[other].within(costs[other][now] + left - change_cost)
                    total = np.where(partner >= 0, change_loss + losses[other][partner] - losses[other][now], np.inf)
                pick = int(np.argmin(total))
                if total[pick] < best[0]:
                    best = (float(total[pick]), layer, pick, other, int(partner[pick]))
        _, layer, pick, other, partner_pick = best
        if layer < 0:
            return
        before = costs[layer][chosen[layer]] + (costs[other][chosen[other]] if other != layer else 0.0)
        chosen[layer] = pick
        if other != layer:
            chosen[other] = partner_pick
        after = costs[layer][pick] + (costs[other][partner_pick] if other != layer else 0.0)
        left -= float(after - before)


class _Table:
    """The best option of a layer within a cost."""

    def __init__(self, cost: F64, loss: F64) -> None:
        order = np.lexsort((loss, cost))
        so_far = np.minimum.accumulate(loss[order])
        fresh = np.append(True, so_far[1:] < so_far[:-1])
        self._costs = cost[order]
        self._best: Indices = order[np.maximum.accumulate(np.where(fresh, np.arange(order.size), 0))]

    def within(self, cost: F64) -> Indices:
        """For each cost the option of the least loss that costs no more, -1 where there is none."""
        place = np.searchsorted(self._costs, cost, side="right") - 1
        return np.where(place >= 0, self._best[np.maximum(place, 0)], -1)
