"""Matrix products. The contracted axis is joined (a removed index adds zero to the sum), the others pass through.

Of two stored operands no mask reaches either, so a removed index would take something from the sum: it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast
from spa_compiler.analysis.rules.inputs import given, pin_stored_sum


def gemm(node: gs.Node, facts: Facts) -> str | None:
    """A' [M, K], B' [K, N], C broadcast to [M, N] -> Y [M, N]."""
    a, b = node.inputs[:2]
    left, right = facts.of(a), facts.of(b)
    if left is None or right is None:
        return UNKNOWN_RANK
    rows, inner = (1, 0) if node.attrs.get("transA", 0) else (0, 1)
    inner_b, columns = (1, 0) if node.attrs.get("transB", 0) else (0, 1)
    facts.couple(node, b, inner_b, left[inner])
    pin_stored_sum(node, facts, (a, b), inner_b)
    result = [left[rows], right[columns]]
    if (c := given(node, 2)) is not None:
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
    if reason := product(node, facts, lambda place, rank: range(rank)):
        return reason
    _label(node, facts)
    return None


def product(node: gs.Node, facts: Facts, order: Callable[[int, int], Sequence[int]]) -> str | None:
    """The matrix product of the first two inputs.

    Args:
        order: (number of the operand, its rank) -> its axes as batch, rows, columns.

    Returns:
        Why nothing can be said, or None.
    """
    a, b = node.inputs[:2]
    left, right = facts.of(a), facts.of(b)
    if left is None or right is None:
        return UNKNOWN_RANK
    if not left or not right:
        return "a product with a scalar"
    left_order, right_order = order(0, len(left)), order(1, len(right))
    inner = right_order[max(len(right) - 2, 0)]
    facts.couple(node, b, inner, left[left_order[-1]])
    pin_stored_sum(node, facts, (a, b), inner)
    batch = [(a, left_order[:-2]), (b, right_order[:-2])]
    rows = broadcast(node, facts, batch) if max(len(left), len(right)) > 2 else []
    rows += [left[place] for place in left_order[-2:-1]]
    columns = [right[right_order[-1]]] if len(right) > 1 else []
    _count(node, facts, rows, (right[inner], *columns))
    facts.put(node.outputs[0], [*rows, *columns])
    return None


def _count(node: gs.Node, facts: Facts, rows: Sequence[Axis], weight: tuple[Axis, ...]) -> None:
    """MACs: over rows and the two axes of the right operand; a leading axis that the file leaves open is the batch."""
    known = list(rows)
    if known and (facts.algebra.size(known[0]) is None or facts.varies(node.outputs[0], 0)):
        known = known[1:]
    sized = all(facts.algebra.size(axis) is not None for axis in (*known, *weight))
    facts.work(node, (*known, *weight) if sized else weight, 1 if sized else None)


def _label(node: gs.Node, facts: Facts) -> None:
    """In a product of two computed tensors, what is between the batch and the matrices are heads."""
    a, b = node.inputs[:2]
    if isinstance(a, gs.Constant) or isinstance(b, gs.Constant):
        return
    left, right = facts.axes[a.name], facts.axes[b.name]
    count = max(len(left), len(right)) - 2  # what broadcasts
    for axis in facts.axes[node.outputs[0].name][1 : max(count, 0)]:
        facts.algebra.name(axis, "head")
    for axis in (left[-1], right[-1]) if count > 1 else ():
        facts.algebra.name(axis, "head dimension")


RULES: dict[str, Rule] = {"Gemm": gemm, "MatMul": matmul}
