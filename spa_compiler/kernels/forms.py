"""All forms: those that a weight is tried in, and the one for a weight that leaves nothing out."""

from __future__ import annotations

from collections.abc import Iterator

from spa_compiler.kernels import rx1, sliced
from spa_compiler.kernels.form import F32, Form

#: Of a weight without zeros in a panel: with R = 4, the kernel runs at the peak of dense products.
FULL: Form = rx1.Blocks(4)


def forms_of(weight: F32) -> Iterator[Form]:
    """The forms that `weight` [n, k] can be stored in, whether they leave something out or not."""
    yield from (rx1.Blocks(rows) for rows in rx1.BLOCK_ROWS if rows <= len(weight))
    if len(weight) >= sliced.ROWS:
        yield sliced.Slices()
