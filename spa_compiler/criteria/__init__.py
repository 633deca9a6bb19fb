"""How much a weight matters, one score per file; float64, not negative.

Scores of elements, `weight [n, k] -> importance [n, k]`:
- `magnitude`: from the weight alone;
- `wanda`: with the norms of the inputs; `dass`: with those of the outputs, for gated feed-forward blocks;
- `symbolic`: an expression over the weight and its statistics, which the user writes.

Scores of the indices of one axis, `weight, axis -> importance [size of the axis]`, are sums (`l1`, `l2`): a unit with
slabs in several weights matters as much as they do together. `chance` draws.
"""

from __future__ import annotations

from spa_compiler.criteria.chance import chance
from spa_compiler.criteria.dass import dass
from spa_compiler.criteria.l1 import l1
from spa_compiler.criteria.l2 import l2
from spa_compiler.criteria.magnitude import magnitude
from spa_compiler.criteria.wanda import wanda

__all__ = ["chance", "dass", "l1", "l2", "magnitude", "wanda"]
