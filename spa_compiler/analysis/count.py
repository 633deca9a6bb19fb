"""What is left of a model when units are removed: exact numbers, without cutting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from spa_compiler.analysis.numbering import Mask
from spa_compiler.analysis.terms import Axis

if TYPE_CHECKING:
    from spa_compiler.analysis.analyze import Analysis

Removed: TypeAlias = Mapping[int, Iterable[int]]
"""Group id -> units that go."""


def dead(analysis: Analysis, removed: Removed) -> Mask:
    """`[labels]`: which labels of `analysis.numbering` go."""
    out = np.zeros(analysis.numbering.free.size + 1, np.bool_)  # the last one answers for label -1
    for group, units in removed.items():
        out[analysis.groups[group].labels[np.fromiter(units, np.int64)]] = True
    return out


class Counter:
    """Counts parameters and multiply-accumulates after removals, quickly enough for a search."""

    def __init__(self, analysis: Analysis) -> None:
        self._numbering = analysis.numbering
        self._weights = [analysis.facts.axes[name] for name in analysis.parameters]
        self._works = analysis.facts.works
        self._analysis = analysis

    def kept(self, removed: Removed) -> tuple[int, int | None]:
        """(params, macs) that stay; macs None where they hang on sizes that nobody knows."""
        gone = dead(self._analysis, removed)
        sizes: dict[int, int] = {}
        params = sum(math.prod(self._size(axis, gone, sizes) for axis in axes) for axes in self._weights)
        if any(work.times is None for work in self._works):
            return params, None
        macs = sum(
            (work.times or 0) * math.prod(self._size(axis, gone, sizes) for axis in work.axes) for work in self._works
        )
        return params, macs

    def _size(self, axis: Axis, gone: Mask, sizes: dict[int, int]) -> int:
        if id(axis) not in sizes:
            whole = self._analysis.facts.algebra.size(axis)
            lost = int(self._numbering.gone(axis, gone).sum()) if self._numbering.may_lose(axis) else 0
            sizes[id(axis)] = (1 if whole is None else whole) - lost
        return sizes[id(axis)]


def kept(analysis: Analysis, removed: Removed) -> tuple[int, int | None]:
    """See `Counter.kept`."""
    return Counter(analysis).kept(removed)
