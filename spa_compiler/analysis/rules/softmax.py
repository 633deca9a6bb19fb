"""Softmax and its kin.

A removed index would have to count as minus infinity, while the masked model has a zero there, so the axes that are
normalized over stay; heads, positions and whatever else there is pass.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import axis_of

REASON = "removing from a softmax is not zero"

_ONE_AXIS_SINCE = 13


def softmax(node: gs.Node, facts: Facts) -> str | None:
    """Over one axis; before opset 13 over all axes from that on, flattened, with another default."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    facts.put(node.outputs[0], axes)
    is_flat = facts.opset < _ONE_AXIS_SINCE
    first = axis_of(node, len(axes), 1 if is_flat else -1)
    for axis in range(first, len(axes)) if is_flat else (first,):
        facts.pin(node.op, x, axis, REASON)
    return None


RULES: dict[str, Rule] = dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), softmax)
