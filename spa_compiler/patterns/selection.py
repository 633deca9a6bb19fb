"""Which units go: the least important ones, to an exact share of elements, ties broken by index.

Units are compared by `(score, place)`, where a place is the index of the weight, then of the unit in row-major order;
the answer is the prefix of that order whose elements come nearest to the target. No sorting: where the units of several
weights or of several sizes compete, some counting rounds over the 64 bits of the scores find the score at which the
prefix ends, in memory of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from spa_compiler.patterns.pattern import F64, Keep, Sizes

Scores = F64
"""`[u, v]`, not NaN."""

_SIGN = 1 << 63
_CHUNK = 1 << 17
"""Units counted at a time: few enough for the cache, many enough that the tables of counts cost little."""
_FEW = 1 << 13
"""Up to so many units, eight rounds with small tables are faster than four with large ones."""


def keep_highest(scores: Sequence[Scores], sizes: Sequence[Sizes], sparsity: float) -> list[Keep]:
    """Removes the lowest units of all weights together until `sparsity` of their elements are gone.

    The share is met to half a unit. At least one unit stays.

    Args:
        scores: one array `[u, v]` per weight.
        sizes: elements per unit, one array `[u, v]` per weight, or one that broadcasts to it (`[u, 1]`).
        sparsity: 0 <= sparsity <= 1.

    Raises:
        ValueError: a score is NaN.
    """
    scores = [np.ascontiguousarray(array) for array in scores]
    sizes = [np.broadcast_to(size, array.shape) for array, size in zip(scores, sizes, strict=True)]
    for array in scores:
        _check_numbers(array)
    total = sum(int(size.sum()) for size in sizes)
    # Half an element less than all: the count must exceed the target somewhere, also at sparsity 1.
    target = min(sparsity * total, total - 0.5)
    threshold, below = _threshold(scores, sizes, target)
    keeps = [array >= threshold for array in scores]
    ties = [array == threshold for array in scores]
    gone = np.concatenate([[0], *(size[tie] for size, tie in zip(sizes, ties, strict=True))]).cumsum()
    count = _nearest(gone, target - below)
    if below + gone[count] == total:
        count -= 1  # a weight of nothing but zeros would be no layer any more
    for keep, tie in zip(keeps, ties, strict=True):
        places = np.flatnonzero(tie)
        keep.reshape(-1)[places[: max(count, 0)]] = False
        count -= len(places)
    return keeps


def keep_highest_with_floor(
    scores: Sequence[Scores], sizes: Sequence[Sizes], sparsity: float, floor: float
) -> list[Keep]:
    """`keep_highest`, but every weight keeps at least `floor` of its elements (at least one unit), its best ones.

    Args:
        scores: like `keep_highest`.
        sizes: like `keep_highest`.
        sparsity: like `keep_highest`.
        floor: 0 <= floor <= 1 - sparsity.
    """
    floors = [keep_highest([array], [size], 1 - floor)[0] for array, size in zip(scores, sizes, strict=True)]
    last = [np.where(kept, np.inf, array) for kept, array in zip(floors, scores, strict=True)]
    keeps = keep_highest(last, sizes, sparsity)
    # In tiny weights one unit can be more than the share leaves: then the floor holds and the share is missed.
    return [keep | kept for keep, kept in zip(keeps, floors, strict=True)]


def keep_highest_of_each(scores: Scores, count: int) -> Keep:
    """The `count` highest of each row of `scores [u, v]`; of equal ones the last stay.

    Args:
        scores: one group of units that compete per row.
        count: 0 <= count <= v.

    Raises:
        ValueError: a score is NaN.
    """
    _check_numbers(scores)
    width = scores.shape[1]
    if count == 0:
        return np.zeros(scores.shape, np.bool_)
    threshold = np.partition(scores, width - count, axis=1)[:, width - count, None]
    keep = scores >= threshold
    crowded = np.flatnonzero(np.count_nonzero(keep, axis=1) > count)
    if len(crowded):
        rows = scores[crowded]
        ties = rows == threshold[crowded]
        room = count - np.count_nonzero(rows > threshold[crowded], axis=1)
        last = ties[:, ::-1].cumsum(axis=1, dtype=np.int32)[:, ::-1]
        keep[crowded] &= ~ties | (last <= room[:, None])
    return np.asarray(keep)


def _nearest(rising: NDArray[np.int64], target: float) -> int:
    """Where `rising` comes nearest to `target`; of two that are as near, the first."""
    above = int(np.searchsorted(rising, target))
    if above == len(rising) or (above and target - rising[above - 1] <= rising[above] - target):
        return above - 1
    return above


def _check_numbers(scores: Scores) -> None:
    if scores.size and np.isnan(scores.min()):
        raise ValueError("a score is NaN")


def _threshold(scores: Sequence[Scores], sizes: Sequence[Sizes], target: float) -> tuple[np.float64, int]:
    """The score at which the running count of elements first exceeds `target`, and the count of those below it."""
    if len(scores) == 1 and scores[0].size and (each := int(sizes[0].flat[0])) == sizes[0].min() == sizes[0].max():
        place = int(target // each)
        found = np.partition(scores[0], place, axis=None)[place]
        return found, each * int(np.count_nonzero(scores[0] < found))
    prefix, below = 0, 0
    digit_bits = 8 if sum(array.size for array in scores) <= _FEW else 16
    for shift in range(64 - digit_bits, -1, -digit_bits):
        counts = np.zeros(1 << digit_bits, np.int64)
        for array, size in _chunks(scores, sizes):
            order = _order(array)
            if shift + digit_bits < 64:
                within = (order >> np.uint64(shift + digit_bits)) == np.uint64(prefix)
                order, size = order[within], size[within]
            digits = (order >> np.uint64(shift)) & np.uint64((1 << digit_bits) - 1)
            # Counts as float64 are exact up to 2^53 elements.
            counts += np.bincount(digits.ravel().astype(np.intp), size.ravel(), 1 << digit_bits).astype(np.int64)
        reached = below + counts.cumsum()
        digit = int(np.searchsorted(reached, target, side="right"))
        below += int(counts[:digit].sum())
        prefix = (prefix << digit_bits) | digit
    return _value(prefix), below


def _chunks(scores: Sequence[Scores], sizes: Sequence[Sizes]) -> Iterator[tuple[Scores, Sizes]]:
    """All units, some rows at a time."""
    for array, size in zip(scores, sizes, strict=True):
        rows = max(1, _CHUNK // max(1, array.shape[1]))
        for start in range(0, len(array), rows):
            yield array[start : start + rows], size[start : start + rows]


def _order(scores: Scores) -> NDArray[np.uint64]:
    """Whole numbers in the order of `scores`.

    The bits of floats that are not negative have the order of the values already, and go to the upper half; those of
    negative ones have the opposite order.
    """
    bits = (scores + 0.0).view(np.uint64)  # -0.0 becomes 0.0: they are equal, so they must have equal numbers
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(_SIGN))


def _value(order: int) -> np.float64:
    """The score with the number `order`."""
    bits = order ^ _SIGN if order & _SIGN else order ^ (2 * _SIGN - 1)
    return np.uint64(bits).view(np.float64)
