"""Matrix products. The contracted axis is joined (a removed index adds zero to the sum), the others pass through."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast


def gemm(node: gs.Node, facts: Facts) -> str | None:
    """A' [M, K], B' [K, N], C broadcast to [M, N] -> Y [M, N]."""
    a, b = node.inputs[:2]
    left, right = facts.of(a), facts.of(b)
    if left is None or right is None:
        return UNKNOWN_RANK
    rows, inner = (1, 0) if node.attrs.get("transA", 0) else (0, 1)
    inner_b, columns = (1, 0) if node.attrs.get("transB", 0) else (0, 1)
    facts.couple(node, b, inner_b, left[inner])
    result = [left[rows], right[columns]]
    if len(node.inputs) > 2 and node.inputs[2].name:
        c = node.inputs[2]
        bias = facts.of(c)
        if bias is None:
            return UNKNOWN_RANK
        for axis, target in zip(reversed(range(len(bias))), reversed(result), strict=False):
            if facts.algebra.size(bias[axis]) != 1:
                facts.couple(node, c, axis, target)
    facts.put(node.outputs[0], result)
    _count(node, facts, [left[rows]], (right[inner_b], right[columns]))
    return None


def matmul(node: gs.Node, facts: Facts) -> str | None:
    """A [.., m, k], B [.., k, n] -> Y [.., m, n]; operands of rank 1 lose their m or n, leading axes broadcast."""
    a, b = node.inputs[:2]
    left, right = facts.of(a), facts.of(b)
    if left is None or right is None:
        return UNKNOWN_RANK
    if not left or not right:
        return "a product with a scalar"
    inner_b = max(len(right) - 2, 0)
    facts.couple(node, b, inner_b, left[-1])
    batch = [(a, range(len(left) - 2)), (b, range(len(right) - 2))]
    result = broadcast(node, facts, batch) if max(len(left), len(right)) > 2 else []
    _label(node, facts, result, (left[-1], right[-1]))
    result += [left[-2]] if len(left) > 1 else []
    columns = [right[-1]] if len(right) > 1 else []
    _count(node, facts, result, (right[inner_b], *columns))
    facts.put(node.outputs[0], [*result, *columns])
    return None


def _count(node: gs.Node, facts: Facts, rows: Sequence[Axis], weight: tuple[Axis, ...]) -> None:
    """MACs: over rows and the two axes of the right operand; a leading axis that the file leaves open is the batch."""
    known = list(rows)
    if known and (facts.algebra.size(known[0]) is None or facts.varies(node.outputs[0], 0)):
        known = known[1:]
    sized = all(facts.algebra.size(axis) is not None for axis in (*known, *weight))
    facts.work(node, (*known, *weight) if sized else weight, 1 if sized else None)


def _label(node: gs.Node, facts: Facts, batch: Sequence[Axis], inside: Sequence[Axis]) -> None:
    """In a product of two computed tensors, what is between the batch and the matrices are heads."""
    if any(isinstance(tensor, gs.Constant) for tensor in node.inputs[:2]):
        return
    for axis in batch[1:]:
        facts.algebra.name(axis, "head")
    for axis in inside if len(batch) > 1 else ():
        facts.algebra.name(axis, "head dimension")


RULES: dict[str, Rule] = {"Gemm": gemm, "MatMul": matmul}
