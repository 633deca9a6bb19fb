"""The two kinds of units that patterns are made of: single elements, and tiles of R x C elements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from spa_compiler.patterns.pattern import F64, Array, Keep, Mask, Sizes
from spa_compiler.patterns.selection import keep_highest


class Units(ABC):
    """What follows from scores, sizes and masks. A part of `Pattern`."""

    @abstractmethod
    def sizes(self, n: int, k: int) -> Sizes:
        """See `Pattern.sizes`."""

    @abstractmethod
    def scores(self, importance: Array) -> F64:
        """See `Pattern.scores`."""

    @abstractmethod
    def mask(self, keep: Keep, n: int, k: int) -> Mask:
        """See `Pattern.mask`."""

    def select(self, scores: F64, sizes: Sizes, sparsity: float) -> Keep:
        """Any set of units may go: the lowest ones of the whole weight do."""
        return keep_highest([scores], [sizes], sparsity)[0]

    def choose(self, importance: Array, sparsity: float) -> Mask:
        """See `Pattern.choose`."""
        n, k = importance.shape
        return self.mask(self.select(self.scores(importance), self.sizes(n, k), sparsity), n, k)

    def on(self, kernel: int) -> Self:
        """The same: only `channel` asks where a channel ends."""
        return self


class Elements(Units):
    """Every element is its own unit: `[u, v]` = `[n, k]`."""

    def sizes(self, n: int, k: int) -> Sizes:
        """Ones."""
        return np.broadcast_to(np.int64(1), (n, k))

    def scores(self, importance: Array) -> F64:
        """`importance` itself, as float64."""
        return np.asarray(importance, np.float64)

    def mask(self, keep: Keep, n: int, k: int) -> Mask:
        """`keep` itself. Raises ValueError where it is not `[n, k]`."""
        _check_units(keep, (n, k), n, k)
        return keep


class Tiles(Units):
    """Tiles of `rows` x `cols` elements: `[u, v]` = `[ceil(n / rows), ceil(k / cols)]`."""

    rows: int
    cols: int
    """Both may exceed the weight: then there is one tile in that direction."""

    def sizes(self, n: int, k: int) -> Sizes:
        """rows x cols, and less in a short last row or column."""
        return np.outer(_lengths(n, self.rows), _lengths(k, self.cols))

    def scores(self, importance: Array) -> F64:
        """Mean over each tile."""
        importance = np.asarray(importance, np.float64)
        return np.asarray(self._fold(importance, np.add) / self.sizes(*importance.shape))

    def mask(self, keep: Keep, n: int, k: int) -> Mask:
        """Each tile's answer for all of its elements. Raises ValueError for another number of tiles."""
        _check_units(keep, (-(-n // self.rows), -(-k // self.cols)), n, k)
        if self.rows > 1:
            keep = np.repeat(keep, min(self.rows, n), axis=0)[:n]
        return np.repeat(keep, self.cols, axis=1)[:, :k] if self.cols > 1 else keep

    def fits(self, weight: Array) -> bool:
        """Whether no tile is partly zero."""
        return self._stored(weight) == np.count_nonzero(weight)

    def fill(self, weight: Array) -> float:
        """Nonzeros over the elements of all tiles that have one."""
        stored = self._stored(weight)
        return float(np.count_nonzero(weight) / stored) if stored else 1.0

    def _stored(self, weight: Array) -> int:
        """Elements in tiles that are not wholly zero."""
        return int(self.sizes(*weight.shape).sum(where=self._fold(weight != 0, np.logical_or)))

    def _fold(self, array: Array, combine: np.ufunc) -> Array:
        """`combine` over each tile, first over its rows and then over its columns."""
        return _fold_rows(_fold_rows(array, self.rows, combine).T, self.cols, combine).T


def _fold_rows(array: Array, height: int, combine: np.ufunc) -> Array:
    """`combine` over every `height` consecutive rows."""
    # Row by row, not `combine.reduceat`: the sum's order, and so its last bit, must not depend on numpy's version.
    out = np.array(array[::height])
    for row in range(1, min(height, len(array))):
        part = array[row::height]
        combine(out[: len(part)], part, out=out[: len(part)])
    return out


def _lengths(total: int, step: int) -> Sizes:
    """`step` as often as it goes into `total`, then the rest."""
    lengths = np.full(-(-total // step), step, np.int64)
    if total % step:
        lengths[-1] = total % step
    return lengths


def _check_units(keep: Keep, units: tuple[int, int], n: int, k: int) -> None:
    if keep.shape != units:
        raise ValueError(f"units {list(keep.shape)} for {n} outputs and {k} inputs, which have {list(units)}")
