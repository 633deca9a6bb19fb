"""Allocation: how a budget of zeros, or of what ranks cost, is divided among layers.

All are functions of arrays and callables. Of most, sizes are elements per layer, and the answer is a share of zeros per
layer with sum(sizes * share) = sparsity * sum(sizes), no share above `max_sparsity`, and no layer emptied. What each
needs:

    uniform        nothing
    erk            the weights' shapes
    lamp           the weights' magnitudes, or their means over the units of a pattern
    proportional   one number per layer: how much it matters
    ecoflap        the model's loss with one layer shaken, twice per layer and draw
    by_error       each layer's loss at a few levels of sparsity: the least sum of them
    evolve         the fitness of the whole model at any choice of levels, hundreds of times
    welore         singular values; the answer is a rank per layer
    knapsack       what every option of every layer costs and loses; the answer is an option per layer

`to_levels` takes shares to the nearest levels that were computed, as `evolve` wants its start.
"""

from spa_compiler.solvers.allocation.ecoflap import ecoflap
from spa_compiler.solvers.allocation.erk import erk
from spa_compiler.solvers.allocation.error import by_error
from spa_compiler.solvers.allocation.evolution import evolve
from spa_compiler.solvers.allocation.knapsack import knapsack
from spa_compiler.solvers.allocation.lamp import lamp
from spa_compiler.solvers.allocation.levels import to_levels
from spa_compiler.solvers.allocation.proportional import proportional
from spa_compiler.solvers.allocation.uniform import uniform
from spa_compiler.solvers.allocation.welore import welore

__all__ = [
    "by_error",
    "ecoflap",
    "erk",
    "evolve",
    "knapsack",
    "lamp",
    "proportional",
    "to_levels",
    "uniform",
    "welore",
]
