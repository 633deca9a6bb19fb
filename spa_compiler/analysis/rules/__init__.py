"""What each operator says about the axes it touches: a flat table from operator type to a small function.

Adding an operator is one entry in the table of its family's file and one test. What has no entry pins its axes.
"""

from __future__ import annotations

from importlib import import_module

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Rule

_FAMILIES = [
    import_module(f"{__name__}.{name}")
    for name in (
        "attention",
        "conv",
        "einsum",
        "elementwise",
        "generate",
        "indexing",
        "linear",
        "microsoft",
        "microsoft_attention",
        "movement",
        "norm",
        "opaque",
        "pieces",
        "pool",
        "quant",
        "recurrent",
        "reduce",
        "reshape",
        "selection",
        "skipnorm",
        "softmax",
        "spatial",
    )
]


def _table(name: str) -> dict[str, Rule]:
    return {op: rule for family in _FAMILIES for op, rule in getattr(family, name, {}).items()}


RULES = _table("RULES")
"""Operators of the default domain by type; ONNX Runtime's own operators that exporters put there are among them."""

MICROSOFT = _table("MICROSOFT")
"""Operators of com.microsoft by type."""


def find(node: gs.Node) -> Rule | None:
    """The rule for a node, None if there is none."""
    if node.domain in (None, "", "ai.onnx"):
        return RULES.get(node.op)
    return MICROSOFT.get(node.op) if node.domain == "com.microsoft" else None
