"""How much a weight matters, one score per file: `weight [n, k] -> importance [n, k]`, float64, not negative."""

from __future__ import annotations

from spa_compiler.criteria.magnitude import magnitude

__all__ = ["magnitude"]
