"""What each operator says about the axes it touches: a flat table from operator type to a small function.

Adding an operator is one entry in the table of its family's file and one test. What has no entry pins its axes.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Rule
from spa_compiler.analysis.rules import (
    attention,
    conv,
    einsum,
    elementwise,
    generate,
    indexing,
    linear,
    microsoft,
    movement,
    norm,
    opaque,
    pieces,
    pool,
    quant,
    recurrent,
    reduce,
    reshape,
    skipnorm,
    softmax,
    spatial,
)

_FAMILIES = (
    attention,
    conv,
    einsum,
    elementwise,
    generate,
    indexing,
    linear,
    movement,
    norm,
    opaque,
    pieces,
    pool,
    quant,
    recurrent,
    reduce,
    reshape,
    softmax,
    spatial,
)

RULES: dict[str, Rule] = {name: rule for family in _FAMILIES for name, rule in family.RULES.items()}
"""Operators of the default domain by type; ONNX Runtime's own operators that exporters put there are among them."""

MICROSOFT: dict[str, Rule] = {
    name: rule
    for family in (*_FAMILIES, microsoft, skipnorm)
    for name, rule in getattr(family, "MICROSOFT", {}).items()
}
"""Operators of com.microsoft by type."""


def find(node: gs.Node) -> Rule | None:
    """The rule for a node, None if there is none."""
    if node.domain in (None, "", "ai.onnx"):
        return RULES.get(node.op)
    return MICROSOFT.get(node.op) if node.domain == "com.microsoft" else None
