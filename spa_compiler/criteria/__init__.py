"""How much a weight matters, one score per file; float64, not negative.

`magnitude` scores elements (`weight [n, k] -> importance [n, k]`). `l1` and `l2` score the indices of one axis
(`weight, axis -> importance [size of the axis]`) by sums: a unit with slabs in several weights matters as much as they
do together. `chance` draws.
"""

from __future__ import annotations

from spa_compiler.criteria.chance import chance
from spa_compiler.criteria.l1 import l1
from spa_compiler.criteria.l2 import l2
from spa_compiler.criteria.magnitude import magnitude

__all__ = ["chance", "l1", "l2", "magnitude"]
