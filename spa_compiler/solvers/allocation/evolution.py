"""Evolution: a search over one level per layer by what the whole model makes of it, for losses that do not add up.

    parent    = the start, or uniform levels
    offspring = the parent with 1 to 4 layers raised (or lowered) by a level, then others moved the other way by single
                levels until the budget holds again, drawn by the size of their steps among those that do not overshoot
    few       = the fitness of all offspring on few samples; the best of them survive
    parent    = the best of parent and survivors on more samples

As in EvoPress (Sieberling et al., 2025), DarwinLM (Tang et al., 2025) and Tyr-the-Pruner (Li et al., 2025). The fitness
is best a divergence from the dense model's outputs on calibration samples.

The budget holds where the zeros are within half of the smallest step that any layer can make: where sizes are multiples
of the smallest step, that is exact. A start that is further away widens this to itself on its side, so that no
candidate is further from the budget than the start on the side where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from spa_compiler.solvers.allocation.budget import F64, Sizes
from spa_compiler.solvers.allocation.levels import level_zeros, to_levels
from spa_compiler.solvers.allocation.uniform import uniform

Choice: TypeAlias = tuple[int, ...]
"""The index of each layer's level."""

Fitness: TypeAlias = Callable[[Choice, int], float]
"""`fitness(levels, samples)`: lower is better; NaN counts as the worst. The same arguments give the same value."""

_MOST_SWITCHES = 4
_ATTEMPTS = 32
"""Draws for one more offspring before the generation goes on with those that it has."""


def evolve(
    fitness: Fitness,
    sizes: Sizes,
    levels: ArrayLike,
    sparsity: float,
    rng: np.random.Generator,
    *,
    start: Sequence[int] | None = None,
    generations: int = 100,
    offspring: int = 16,
    survivors: int = 4,
    samples: tuple[int, int] = (8, 32),
    progress: Callable[[int, int, float], None] | None = None,
) -> list[int]:
    """The best choice found; on `samples[1]` samples never worse than the start.

    Args:
        levels: shares of zeros, ascending, `[m]`, or `[L, m]` where layers have their own.
        start: the index of each layer's level; None takes those nearest to uniform.
        samples: for the offspring, and for parent and survivors. No candidate is evaluated twice on as many.
        progress: called with generations done, `generations`, and the parent's fitness.

    Raises:
        BudgetError: the highest levels have too few zeros.
        ValueError: the levels do not ascend, or the start has other layers or levels.
    """
    zeros = level_zeros(levels, sizes)
    if start is None:
        highest = np.broadcast_to(np.asarray(levels, np.float64), zeros.shape)[:, -1]
        start = to_levels(uniform(sizes, sparsity, max_sparsity=highest), sizes, levels)
    parent = _checked(start, zeros.shape)
    window = _window(zeros, parent, sparsity * float(np.sum(sizes)))
    known: dict[tuple[Choice, int], float] = {}

    def value(choice: Choice, count: int) -> float:
        if (choice, count) not in known:
            found = float(fitness(choice, count))
            known[choice, count] = math.inf if math.isnan(found) else found
        return known[choice, count]

    few, many = samples
    for generation in range(generations):
        children: dict[Choice, None] = {}  # in the order of their birth, each once
        for _ in range(offspring):
            child = _mutate(parent, zeros, window, rng, known=children)
            if child is None:
                break
            children[child] = None
        fittest = sorted(children, key=lambda child: value(child, few))[:survivors]
        # The parent comes first, and `min` takes the first among equals: only something better replaces it.
        parent = min([parent, *fittest], key=lambda child: value(child, many))
        if progress is not None:
            progress(generation + 1, generations, value(parent, many))
    return list(parent)


def _checked(start: Sequence[int], shape: tuple[int, ...]) -> Choice:
    layers, count = shape
    choice = tuple(int(level) for level in start)
    if len(choice) != layers or any(not 0 <= level < count for level in choice):
        raise ValueError(f"a start needs {layers} levels from 0 to {count - 1}, not {list(choice)}")
    return choice


def _window(zeros: F64, start: Choice, target: float) -> tuple[float, float]:
    """The fewest and the most zeros that a candidate may have."""
    steps = np.diff(zeros, axis=1)
    half = float(steps.min()) / 2 if steps.size else 0.0
    there = float(zeros[np.arange(len(start)), start].sum())
    return min(there, target - half), max(there, target + half)


def _mutate(
    parent: Choice,
    zeros: F64,
    window: tuple[float, float],
    rng: np.random.Generator,
    known: dict[Choice, None],
) -> Choice | None:
    """A candidate that is neither the parent nor `known`, with its zeros in the window; None if none was found."""
    low, high = window
    rounding = 1e-9 * float(zeros.max(initial=0.0))
    rows, last = np.arange(len(parent)), zeros.shape[1] - 1
    for _ in range(_ATTEMPTS):
        choice = np.array(parent)
        direction = 1 if rng.integers(2) else -1
        moved = np.zeros(len(parent), np.bool_)
        for _ in range(int(rng.integers(1, _MOST_SWITCHES + 1))):
            movable = np.flatnonzero((choice + direction >= 0) & (choice + direction <= last))
            if movable.size:
                layer = rng.choice(movable)
                choice[layer] += direction
                moved[layer] = True
        total = float(zeros[rows, choice].sum())
        while not low - rounding <= total <= high + rounding:
            back = -1 if total > high else 1
            to = np.clip(choice + back, 0, last)
            after = total + zeros[rows, to] - zeros[rows, choice]
            fits = after >= low - rounding if back < 0 else after <= high + rounding
            fits &= (to != choice) & ~moved
            if not fits.any():
                break
            # Large steps rather than small ones: fewer layers change.
            weights = np.where(fits, np.abs(after - total), 0)
            layer = rng.choice(len(parent), p=weights / weights.sum())
            choice[layer], total = to[layer], float(after[layer])
        child = tuple(int(level) for level in choice)
        if low - rounding <= total <= high + rounding and child != parent and child not in known:
            return child
    return None
