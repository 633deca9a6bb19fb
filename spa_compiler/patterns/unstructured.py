"""`unstructured`: any element may be zero.

1 . . 4
. 2 . .     most freedom, least harm at a given share of zeros; a kernel loads one activation vector
3 . . 5     for every multiplication, where R x 1 blocks load one for R
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spa_compiler.patterns.pattern import Array
from spa_compiler.patterns.units import Elements


@dataclass(frozen=True)
class Unstructured(Elements):
    """Every element is its own unit, and any may go. Implements `Pattern`."""

    name: ClassVar[str] = "unstructured"
    rows: ClassVar[int] = 1
    cols: ClassVar[int] = 1
    sparsity: ClassVar[None] = None

    def fits(self, weight: Array) -> bool:
        """Always: any zero is allowed."""
        return True

    def fill(self, weight: Array) -> float:
        """Always 1.0: only nonzeros are stored."""
        return 1.0
