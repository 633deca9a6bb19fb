"""`channel`: an input channel is zero for all outputs.

1 . 4 . 7
2 . 5 . 8     what is left is a smaller dense weight that reads fewer inputs; of a convolution, all columns of the
3 . 6 . 9     channel's kernel go together

The channels themselves stay where they are made: to remove them from the model, cut them with `prune-groups`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from spa_compiler.errors import UsageError
from spa_compiler.patterns.units import Tiles

ALL_ROWS = 2**31 - 1
"""More outputs than a weight has: ceil(n / ALL_ROWS) = 1."""


@dataclass(frozen=True)
class Channel(Tiles):
    """Tiles of all outputs by `cols` columns, `cols` = kernel positions of a channel. Implements `Pattern`.

    Raises:
        UsageError: a channel has no column.
    """

    cols: int = 1
    rows: int = field(default=ALL_ROWS, init=False, repr=False)
    name: ClassVar[str] = "channel"
    sparsity: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.cols < 1:
            raise UsageError(f"a channel cannot have {self.cols} columns", fix="A kernel has at least one position")

    def on(self, kernel: int) -> Channel:
        """Channels of `kernel` columns."""
        return Channel(kernel)
