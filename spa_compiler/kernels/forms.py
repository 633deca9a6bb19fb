"""All forms: those that a weight is tried in, and the one for a weight that leaves nothing out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels import grouped, permuted, rx1, rxc, sliced
from spa_compiler.kernels.form import F32, Form

#: Of a weight without zeros in a panel: with R = 4, the kernel runs at the peak of dense products.
FULL: Form = rx1.Blocks(4)

_GROUPS = [grouped.Groups(kept, of) for kept, of in grouped.KINDS]
_EXACT = 1.05  # stored elements for each nonzero, in blocks that a weight was pruned in


def forms_of(weight: F32, tokens: int) -> Iterator[Form]:
    """The forms that `weight` [n, k] can be stored in, whether they leave something out or not.

    Args:
        tokens: the fewest that it will meet; one form is for a single one.
    """
    yield from (rx1.Blocks(rows) for rows in rx1.BLOCK_ROWS if rows <= len(weight))
    if len(weight) >= sliced.ROWS:
        yield sliced.Slices()
        if tokens == 1 and weight.shape[1] >= permuted.LEAST_COLUMNS:
            yield permuted.Permuted()
    rows, cols = block_of(weight)
    if cols > 1:
        yield rxc.Rectangles(rows, cols)
    elif rows in rx1.PRUNED_ROWS:
        yield rx1.Blocks(rows)
    yield from itertools.islice((form for form in _GROUPS if form.takes(weight)), 1)


def block_of(weight: F32) -> tuple[int, int]:
    """(R, C): the largest blocks that a form has in which the zeros of `weight` [n, k] come; (1, 1): none.

    Each of the factors is doubled as long as next to no zero is stored: what was not pruned in blocks has 2 x 1 and
    1 x 2 looked at, and no more.
    """
    rows = cols = 1
    kept: NDArray[np.bool_] = weight != 0
    most = _EXACT * np.count_nonzero(kept)
    while 2 * rows <= min(rxc.MAX_ROWS, len(weight)):
        padded = kept if len(kept) % 2 == 0 else np.vstack([kept, np.zeros_like(kept[:1])])
        taller = padded[0::2] | padded[1::2]
        if np.count_nonzero(taller) * 2 * rows > most:
            break
        kept, rows = taller, 2 * rows
    while 2 * cols <= rxc.MAX_COLS and kept.shape[1] % 2 == 0:
        wider = kept[:, 0::2] | kept[:, 1::2]
        if np.count_nonzero(wider) * rows * 2 * cols > most:
            break
        kept, cols = wider, 2 * cols
    if (rows, cols) == (2, 1) and len(weight) % 6 == 0:
        taller = kept[0::3] | kept[1::3] | kept[2::3]
        rows = 6 if np.count_nonzero(taller) * 6 <= most else rows
    return rows, cols
