"""`block:RxC`: R consecutive outputs by C consecutive inputs are zero together.

block:2x1     1 . . 4
              3 . . 5     one loaded activation vector feeds R multiplications, and one column index
              . 2 . .     serves R values
              . 6 . .

block:2x2     1 2 . .
              3 4 . .     one index serves R x C values; at a given share of zeros more harm than 2x1:
              . . 5 6     the larger the block, the rarer that all of its weights are small
              . . 7 8

Blocks begin at multiples of R and C. Where these do not divide the weight, the last blocks are short, and compete by
their mean importance like the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spa_compiler.errors import UsageError
from spa_compiler.patterns.units import Tiles

MAX_SIDE = 64
"""Taller blocks have no use: a kernel keeps one accumulator per row, and a core has 32 vector registers."""


@dataclass(frozen=True)
class Block(Tiles):
    """R x C blocks, `rows` = R and `cols` = C. Implements `Pattern`.

    Raises:
        UsageError: R or C is not in 1..`MAX_SIDE`.
    """

    rows: int
    cols: int = 1
    sparsity: ClassVar[None] = None

    def __post_init__(self) -> None:
        for letter, side in (("R", self.rows), ("C", self.cols)):
            if not 1 <= side <= MAX_SIDE:
                raise UsageError(
                    f"{self.name}: a block cannot have {side} {'rows' if letter == 'R' else 'columns'}",
                    fix=f"{letter} of block:RxC is 1 to {MAX_SIDE}",
                )

    @property
    def name(self) -> str:
        """`block:RxC`."""
        return f"block:{self.rows}x{self.cols}"
