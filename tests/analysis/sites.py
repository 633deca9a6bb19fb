"""Groups by the layers they cut, whatever these are called: what two files of one model must agree on."""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

from spa_compiler.analysis import analyze
from spa_compiler.graph.fold import lift_constants
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, weighted_ops

Sites: TypeAlias = Counter[tuple[int, tuple[tuple[int, int, str], ...]]]


def sites_of(model: Model) -> Sites:
    """For each group its size, and `(outputs, inputs, which side)` of every layer that it cuts."""
    lift_constants(model.graph)
    layers: dict[str, list[WeightedOp]] = {}
    for op in weighted_ops(model.graph):
        layers.setdefault(op.weight.name, []).append(op)
    return Counter(
        (group.size, tuple(sorted(_site(op, m.axis) for m in group.parameters for op in layers.get(m.tensor, ()))))
        for group in analyze(model).groups
    )


def _site(op: WeightedOp, axis: int) -> tuple[int, int, str]:
    is_output = axis == 0 if op.kind == "Conv" else (axis == 1) == op.transposed
    return op.n, op.k, "out" if is_output else "in"
