"""An order of outputs in which zeros fall into blocks of R more easily.

With scores s [n, K] (what an element is worth; K over all weights that share the order) and blocks of R consecutive
outputs, a block is worth the sum of its elements' scores, and the best blocks are kept. For a threshold t that keeps
the wanted share, the order that keeps most maximizes

    sum over blocks B, inputs j of  max(0, sum over i in B of s_ij - t)

which is what is kept minus t for each kept block. Outputs that need the same inputs belong together. The start pairs
outputs, and then pairs of them, by how far the inputs above the threshold overlap; then single outputs are exchanged
between blocks, each with its best partner by the objective itself, until a sweep gains little (the exchange search
that Pool and Yu, "Channel Permutations for N:M Sparsity", 2021, use for columns). Each sweep has its own threshold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.problem import F64

Order = NDArray[np.intp]

_SWEEPS = 4
_LEAST_GAIN = 1e-3
"""Of the objective: a sweep that gains less is the last."""

_VALUES = 1 << 18
"""Scores that are looked at, at most: of more inputs, evenly spread ones stand for all."""


def row_order(scores: F64, rows: int, sparsity: float) -> Order:
    """The order `[n]`: output i of the new weight is output `order[i]` of the old one.

    Args:
        scores: `[n, K]`, not negative.
        rows: R. Where it does not divide n, the outputs of the last, short block stay.
        sparsity: share of blocks that go.

    Returns:
        An order that keeps no less of the scores that were looked at than the one there was.
    """
    n = len(scores)
    whole = n // rows * rows
    if rows == 1 or whole <= rows or not scores.any():
        return np.arange(n)
    step = max(1, -(-scores.size // _VALUES))
    search = _Search(scores[:whole, ::step].astype(np.float32), rows, sparsity)
    candidates = [np.arange(whole), search.paired()]
    found = max((search.exchanged(start) for start in candidates), key=search.kept)
    if search.kept(found) <= search.kept(candidates[0]):
        return np.arange(n)
    blocks = np.sort(found.reshape(-1, rows), axis=1)
    # Where it makes no difference, what was first stays first.
    return np.append(blocks[np.argsort(blocks[:, 0])], np.arange(whole, n))


class _Search:
    def __init__(self, scores: NDArray[np.float32], rows: int, sparsity: float) -> None:
        self._scores, self._rows, self._sparsity = scores, rows, sparsity

    def _sums(self, order: Order) -> NDArray[np.float32]:
        return np.asarray(self._scores[order].reshape(-1, self._rows, self._scores.shape[1]).sum(axis=1))

    def _threshold(self, sums: NDArray[np.float32]) -> np.float32:
        place = min(sums.size - 1, int(self._sparsity * sums.size))
        return np.float32(np.partition(sums.ravel(), place)[place])

    def kept(self, order: Order) -> float:
        """The scores that the best blocks have together."""
        sums = np.sort(self._sums(order).ravel())
        return float(sums[int(self._sparsity * sums.size) :].sum(dtype=np.float64))

    def paired(self) -> Order:
        """Outputs with overlapping inputs side by side: pairs, pairs of pairs, as far as R is even."""
        groups = np.arange(len(self._scores))[:, None]
        rows = self._rows
        while rows % 2 == 0 and len(groups) % 2 == 0:
            rows //= 2
            sums = self._scores[groups].sum(axis=1)
            above = np.maximum(sums - self._threshold(sums), 0)
            with np.errstate(invalid="ignore", divide="ignore"):
                unit = np.nan_to_num(above / np.linalg.norm(above, axis=1, keepdims=True))
            groups = np.concatenate([groups[pair] for pair in _matched(unit @ unit.T).T], axis=1)
        return np.asarray(groups.ravel(), np.intp)

    def exchanged(self, order: Order) -> Order:
        """The order after exchanges of outputs between blocks; each raises the objective at that sweep's threshold."""
        order = order.copy()
        for _ in range(_SWEEPS):
            sums = self._sums(order)
            limit = self._threshold(sums)
            worth = np.maximum(sums - limit, 0).sum(axis=1, dtype=np.float64)
            before = worth.sum()
            for place in range(len(order)):
                self._exchange(order, place, sums, worth, limit)
            if worth.sum() - before <= _LEAST_GAIN * before:
                break
        return order

    def _exchange(self, order: Order, place: int, sums: NDArray[np.float32], worth: F64, limit: np.float32) -> None:
        """Exchanges the output at `place` with the one that gains most, if any does."""
        scores, rows, own = self._scores, self._rows, place // self._rows
        without = sums[own] - scores[order[place]]
        there = np.maximum(scores[order] + (without - limit), 0).sum(axis=1)
        blocks = np.arange(len(order)) // rows
        # Here a, there b: their block gets a for b.
        moved = (sums - limit + scores[order[place]])[blocks]
        moved -= scores[order]
        here = np.maximum(moved, 0, out=moved).sum(axis=1)
        gain = there + here - worth[own] - worth[blocks]
        gain[own * rows : (own + 1) * rows] = 0
        best = int(gain.argmax())
        if gain[best] <= 1e-6 * (worth[own] + worth[blocks[best]]):
            return
        other = int(blocks[best])
        order[place], order[best] = order[best], order[place]
        for block in (own, other):
            sums[block] = scores[order[block * rows : (block + 1) * rows]].sum(axis=0)
            worth[block] = np.maximum(sums[block] - limit, 0).sum(dtype=np.float64)


def _matched(alike: NDArray[np.float32]) -> Order:
    """Pairs `[n / 2, 2]`, the most alike first."""
    n = len(alike)
    np.fill_diagonal(alike, -np.inf)
    free = np.ones(n, np.bool_)
    pairs = []
    for flat in np.argsort(-alike, axis=None, kind="stable"):
        i, j = divmod(int(flat), n)
        if free[i] and free[j]:
            free[i] = free[j] = False
            pairs.append((i, j))
            if 2 * len(pairs) == n:
                break
    return np.array(pairs)
