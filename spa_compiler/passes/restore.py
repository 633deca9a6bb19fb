"""`--restore-unused`: layers that zeros make no faster get the weights back that they had before the passes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph import weights
from spa_compiler.graph.bias import bias_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, weighted_ops


def restore(model: Model, before: Model, used: Collection[str]) -> list[str]:
    """Puts the weights of `before`, and their biases, back into `model`, except for the operators in `used`.

    Only what has more zeros than it had is meant: other weights that changed make up for zeros elsewhere. Operators are
    known by their names. One that has another shape now, since channels were cut or it was factorized,
    is left as it is. A weight that several operators had together is one again.

    Returns:
        The names of the operators that got their weights back.
    """
    originals = {op.name: op for op in weighted_ops(before.graph)}
    dense: dict[int, gs.Constant] = {}  # by identity of the weight in `before`: what holds it in `model`
    changed: list[tuple[WeightedOp, WeightedOp]] = []
    for op in weighted_ops(model.graph):
        old = originals.get(op.name)
        if old is None or (old.kind, old.n, old.k) != (op.kind, op.n, op.k):
            continue
        if np.array_equal(old.rows(), op.rows()):
            dense.setdefault(id(old.weight), op.weight)
        elif op.name not in used and np.count_nonzero(op.rows()) < np.count_nonzero(old.rows()):
            changed.append((op, old))
    for op, old in changed:
        held = dense.get(id(old.weight))
        if held is not None and np.array_equal(weights.array_of(held), op.laid_out(old.rows())):
            op.node.inputs[1] = held
        else:
            op.replace(old.rows())
            dense[id(old.weight)] = op.weight
        bias, old_bias = bias_of(op, model.graph), bias_of(old, before.graph)
        if bias is not None and old_bias is not None and bias.n == old_bias.n:
            bias.replace(old_bias.values)
    return [op.name for op, _ in changed]
