"""Numpy broadcasting of several operands, as facts: the part that element-wise operators, MatMul and Gemm share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts

UNKNOWN_RANK = "a tensor of unknown rank"


def broadcast(node: gs.Node, facts: Facts, operands: Sequence[tuple[Any, Sequence[int]]]) -> list[Axis]:
    """Right-aligns the operands and joins the axes that meet, but those of size 1.

    An axis of unknown size may be 1 or not when the model runs, so what it meets is pinned.

    Args:
        operands: tensors, each with the numbers of those of its axes that take part.

    Returns:
        The axes of the result.
    """
    rank = max(len(axes) for _, axes in operands)
    return [
        _meet(node, facts, [(tensor, axes[place]) for tensor, axes in operands if len(axes) >= -place])
        for place in range(-rank, 0)
    ]


def _meet(node: gs.Node, facts: Facts, places: Sequence[tuple[Any, int]]) -> Axis:
    sized = [(facts.axes[tensor.name][axis], tensor, axis) for tensor, axis in places]
    wide = [place for place in sized if facts.algebra.size(place[0]) != 1]
    if not wide:
        return sized[0][0]
    result = next((place for place in wide if facts.algebra.size(place[0]) is not None), wide[0])[0]
    for axis, tensor, index in wide:
        if axis is not result:
            facts.couple(node, tensor, index, result)
    return result
