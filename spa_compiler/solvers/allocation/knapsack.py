"""Knapsack: one option of each layer, the least sum of losses within one budget.

    min sum_l loss_l(option_l)        s.t.  sum_l cost_l(option_l) <= budget

The options of a layer are its ranks, say, and to stay dense at loss 0. On the lower convex hull of each layer's
(cost, loss) points, steps in the order of loss saved per cost are the Lagrangian optimum, exact at every budget at
which a step ends. Squared singular values descend, so ranks alone are convex already and every rank is on the hull; the
dense point does not continue that curve (from the last rank that pays to dense the loss falls to 0 at once), and takes
the ranks near it off the hull. What the steps leave of the budget is then spent on single options, off the hull too,
and on exchanges between two layers. Sinha and Zoltners, "The multiple-choice knapsack problem", 1979.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.allocation.budget import F64
from spa_compiler.solvers.allocation.hull import lower_hull

Indices: TypeAlias = NDArray[np.int64]

_SLACK = 1e-9
"""Of a budget: shares are quotients, and a budget of 0.7 is met by 0.7. Of the whole loss: less is no change."""


def knapsack(costs: Sequence[F64], losses: Sequence[F64], budget: float) -> list[int]:
    """One option of each layer, the least loss within the budget; the index of each.

    The loss is above the optimum by less than one hull step saves, and is the optimum wherever steps end at the
    budget.

    Args:
        costs: for each layer what each of its options costs, in any order. At least one option.
        losses: what each option loses.
        budget: where it cannot be met, each layer gets its cheapest option.
    """
    budget += abs(budget) * _SLACK
    useful = [_useful(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    steps: list[tuple[float, int, int, int]] = []  # minus the loss saved per cost, layer, from, to
    for layer, some in enumerate(useful):
        corners = lower_hull(costs[layer][some], losses[layer][some])
        for here, there in itertools.pairwise(some[corners].tolist()):
            saved = losses[layer][here] - losses[layer][there]
            steps.append((-saved / (costs[layer][there] - costs[layer][here]), layer, here, there))
    chosen = [int(some[0]) for some in useful]
    left = budget - sum(float(costs[layer][option]) for layer, option in enumerate(chosen))
    for _, layer, here, there in sorted(steps):
        more = float(costs[layer][there] - costs[layer][here])
        if chosen[layer] == here and more <= left:  # a layer whose step was too long stays where it is
            chosen[layer] = there
            left -= more
    if left >= 0:
        _spend(costs, losses, useful, chosen, left)
    return chosen


def _useful(cost: F64, loss: F64) -> Indices:
    """The options that lose less than every cheaper one, cheapest first."""
    order = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[order])
    useful: Indices = order[np.append(True, least[1:] < least[:-1])]
    return useful


def _spend(
    costs: Sequence[F64], losses: Sequence[F64], useful: Sequence[Indices], chosen: list[int], left: float
) -> None:
    """Improve `chosen` within what is left: the best change of one layer or exchange of two, until there is none."""
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
                    partner = _best_within(costs[other], useful[other], costs[other][now] + left - change_cost)
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


def _best_within(cost: F64, useful: Indices, limit: F64) -> Indices:
    """For each limit the option of the least loss that costs no more, -1 where there is none."""
    place = np.searchsorted(cost[useful], limit, side="right") - 1
    return np.where(place >= 0, useful[np.maximum(place, 0)], -1)
