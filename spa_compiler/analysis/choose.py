"""Which units may go together: a Dim cannot lose all of its elements."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spa_compiler.analysis.analyze import Analysis
from spa_compiler.analysis.groups import Group
from spa_compiler.analysis.terms import Indices


def spare(group: Group, units: Iterable[int]) -> list[int]:
    """The longest prefix-greedy part of `units`, in their order, that leaves every Dim of the group an element."""
    left = [np.bincount(dim[dim >= 0], minlength=group.size) for dim in group.dims]
    free = [int(dim.size) for dim in group.dims]
    touched: dict[int, list[int]] = {}
    for number, counts in enumerate(left):
        for unit in np.flatnonzero(counts).tolist():
            touched.setdefault(unit, []).append(number)
    out = []
    for unit in units:
        places = touched.get(int(unit), [])
        if all(free[number] > left[number][unit] for number in places):
            for number in places:
                free[number] -= int(left[number][unit])
            out.append(int(unit))
    return out


def random_units(analysis: Analysis, ratio: float, rng: np.random.Generator) -> dict[int, list[int]]:
    """For each group a random `ratio` of its units, rounded down but at least one, as far as its Dims allow."""
    out: dict[int, list[int]] = {}
    for group in analysis.groups:
        order: Indices = rng.permutation(group.size)
        chosen = spare(group, order[: max(1, int(ratio * group.size + 1e-9))].tolist())
        if chosen:
            out[group.id] = sorted(chosen)
    return out
