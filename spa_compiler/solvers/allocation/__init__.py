"""Allocation: how a budget of zeros, or of parameters, is divided among layers.

All are functions of arrays and callables. Sizes are elements per layer; the answer is a share of zeros per layer with
sum(sizes * share) = sparsity * sum(sizes), no share above `max_sparsity`, and no layer emptied. What each needs:

    uniform        nothing
    erk            the weights' shapes
    lamp           the weights' magnitudes, or their means over the units of a pattern
    proportional   one number per layer: how much it matters
    ecoflap        the model's loss with one layer shaken, twice per layer and draw
    by_error       each layer's loss at a few levels of sparsity: the least sum of them
    exact          the same, choosing among those very levels
    evolve         the fitness of the whole model at any choice of levels, hundreds of times
    welore         singular values; the answer is a rank per layer, here and in the next
    by_energy      singular values that compare across layers: the least sum of squares lost

`to_levels` takes shares to the nearest levels that were computed, as `evolve` wants its start.
"""

from spa_compiler.solvers.allocation.ecoflap import ecoflap, gradient_norms
from spa_compiler.solvers.allocation.energy import by_energy
from spa_compiler.solvers.allocation.erk import erk
from spa_compiler.solvers.allocation.error import by_error
from spa_compiler.solvers.allocation.evolution import evolve
from spa_compiler.solvers.allocation.knapsack import exact
from spa_compiler.solvers.allocation.lamp import lamp
from spa_compiler.solvers.allocation.levels import to_levels
from spa_compiler.solvers.allocation.proportional import proportional
from spa_compiler.solvers.allocation.ranks import saved
from spa_compiler.solvers.allocation.uniform import uniform
from spa_compiler.solvers.allocation.welore import welore

__all__ = [
    "by_energy",
    "by_error",
    "ecoflap",
    "erk",
    "evolve",
    "exact",
    "gradient_norms",
    "lamp",
    "proportional",
    "saved",
    "to_levels",
    "uniform",
    "welore",
]
