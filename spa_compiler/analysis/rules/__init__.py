"""What each operator says about the axes it touches: a flat table from operator type to a small function.

Adding an operator is one entry in the table of its family's file and one test. What has no entry pins its axes.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Rule
from spa_compiler.analysis.rules import conv, elementwise, linear, shape

RULES: dict[str, Rule] = {**conv.RULES, **elementwise.RULES, **linear.RULES, **shape.RULES}
"""Operators of the default domain by type."""


def find(node: gs.Node) -> Rule | None:
    """The rule for a node, None if there is none."""
    return None if node.domain else RULES.get(node.op)
