"""Which indices of the first model are left after several cuts in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.analysis import Analysis
from spa_compiler.passes.matching import slabs

Place: TypeAlias = tuple[str, int]


class Trail:
    """Follows axes by the names of their tensors, which cuts do not change."""

    def __init__(self) -> None:
        self._left: dict[Place, NDArray[np.int64]] = {}
        self._gone: dict[Place, NDArray[np.bool_]] = {}

    def cut(
        self, analysis: Analysis, removed: Mapping[int, Sequence[int] | NDArray[Any]]
    ) -> dict[Place, NDArray[np.bool_]]:
        """Notes a cut, and says what of the first model is gone after it.

        All cuts so far count: of a head dimension, an earlier one may have taken what lay on the heads that it took.
        Axes that this cut has nothing to say about are left out: a name may mean something else by now (a norm's scale
        that was padded).

        Args:
            analysis: of the model right before the cut.
            removed: units by group.

        Returns:
            (tensor, axis) -> for each index of the first model, whether it is gone.
        """
        out: dict[Place, NDArray[np.bool_]] = {}
        for place, goes in slabs(analysis, removed).items():
            left = self._left.get(place, np.arange(goes.size, dtype=np.int64))
            if left.size != goes.size:
                continue
            gone = self._gone.get(place, np.zeros(goes.size, np.bool_)).copy()
            gone[left[goes]] = True
            out[place] = self._gone[place] = gone
            self._left[place] = left[~goes]
        return out


def also(known: Mapping[int, NDArray[np.int64]], more: Mapping[int, NDArray[np.int64]]) -> dict[int, NDArray[np.int64]]:
    """Units of both, by group, ascending."""
    none = np.zeros(0, np.int64)
    return {group: np.union1d(known.get(group, none), more.get(group, none)) for group in {**known, **more}}
