"""Data movement: axes are permuted and merged, nothing is computed."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK


def constant(node: gs.Node, facts: Facts) -> str | None:
    """A constant inside of the graph is a parameter like an initializer."""
    return UNKNOWN_RANK if facts.of(node.outputs[0]) is None else None


def flatten(node: gs.Node, facts: Facts) -> str | None:
    """[N, C, H, W] -> [N, (C, H, W)]: a channel becomes a run of H * W columns."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    at = int(node.attrs.get("axis", 1))
    at += len(axes) if at < 0 else 0
    left, right = facts.algebra.merge(axes[:at]), facts.algebra.merge(axes[at:])
    if left is None or right is None:
        return "merges a concatenated axis with another one"
    facts.put(node.outputs[0], (left, right))
    return None


def transpose(node: gs.Node, facts: Facts) -> str | None:
    """Axes in the order of `perm`, reversed without it."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    perm = node.attrs.get("perm") or range(len(axes))[::-1]
    facts.put(node.outputs[0], [axes[place] for place in perm])
    return None


RULES: dict[str, Rule] = {"Constant": constant, "Flatten": flatten, "Transpose": transpose}
