"""Which units go: the least important ones, to an exact share of elements, ties broken by index.

Units are compared by `(score, place)`, where a place is the index of the weight, then of the unit in row-major order;
the answer is the prefix of that order whose elements come nearest to the target. No sorting: four counting rounds over
the 64 bits of the scores find the score at which the prefix ends, in memory of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""`[n_groups, k]`, not negative, not NaN."""
Sizes = NDArray[np.int64]
"""Elements in a unit of each group, `[n_groups]`."""
Keep = NDArray[np.bool_]
"""Units that stay, `[n_groups, k]`."""

_DIGIT = 16
_SHIFTS = (48, 32, 16, 0)


def keep_highest(scores: Sequence[Scores], sizes: Sequence[Sizes], sparsity: float) -> list[Keep]:
    """Removes the lowest units of all weights together until `sparsity` of their elements are gone.

    The share is met to half a unit. At least one unit stays.

    Args:
        scores: one array per weight.
        sizes: one array per weight.
        sparsity: 0 <= sparsity <= 1.
    """
    scores = [np.ascontiguousarray(array) for array in scores]
    total = sum(int(size.sum()) * array.shape[1] for array, size in zip(scores, sizes, strict=True))
    # Half an element less than all: the count must exceed the target somewhere, also at sparsity 1.
    target = min(sparsity * total, total - 0.5)
    threshold, below = _threshold(scores, sizes, target)
    keeps = [array >= threshold for array in scores]
    ties = [np.flatnonzero(array == threshold) for array in scores]
    gone = np.concatenate(
        [[0], *(size[tie // array.shape[1]] for array, size, tie in zip(scores, sizes, ties, strict=True))]
    ).cumsum()
    count = int(np.argmin(np.abs(below + gone - target)))
    if below + gone[count] == total:
        count -= 1  # a weight of nothing but zeros would be no layer any more
    for keep, tie in zip(keeps, ties, strict=True):
        keep.reshape(-1)[tie[: max(count, 0)]] = False
        count -= len(tie)
    return keeps


def keep_highest_with_floor(
    scores: Sequence[Scores], sizes: Sequence[Sizes], sparsity: float, floor: float
) -> list[Keep]:
    """`keep_highest`, but every weight keeps at least `floor` of its elements (at least one unit), its best ones.

    Args:
        floor: 0 <= floor <= 1 - sparsity.
    """
    floors = [keep_highest([array], [size], 1 - floor)[0] for array, size in zip(scores, sizes, strict=True)]
    last = [np.where(kept, np.inf, array) for kept, array in zip(floors, scores, strict=True)]
    keeps = keep_highest(last, sizes, sparsity)
    # In tiny weights one unit can be more than the share leaves: then the floor holds and the share is missed.
    return [keep | kept for keep, kept in zip(keeps, floors, strict=True)]


def _threshold(scores: Sequence[Scores], sizes: Sequence[Sizes], target: float) -> tuple[np.float64, int]:
    """The score at which the running count of elements first exceeds `target`, and the count of those below it.

    For floats that are not negative, the order of the bits is the order of the values.
    """
    prefix, below = 0, 0
    for shift in _SHIFTS:
        counts = np.zeros(1 << _DIGIT, np.int64)
        for array, size in zip(scores, sizes, strict=True):
            bits = array.view(np.int64)
            elements = np.broadcast_to(size[:, None], array.shape)
            if shift != _SHIFTS[0]:
                within = (bits >> (shift + _DIGIT)) == prefix
                bits, elements = bits[within], elements[within]
            digits = (bits >> shift) & ((1 << _DIGIT) - 1)
            # Counts as float64 are exact up to 2^53 elements.
            counts += np.bincount(digits.ravel(), elements.ravel(), 1 << _DIGIT).astype(np.int64)
        reached = below + counts.cumsum()
        digit = int(np.searchsorted(reached, target, side="right"))
        below += int(counts[:digit].sum())
        prefix = (prefix << _DIGIT) | digit
    return np.int64(prefix).view(np.float64), below
