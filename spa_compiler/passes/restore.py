"""`--restore-unused`: layers that zeros make no faster get the weights back that they had before the passes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spa_compiler.graph.bias import bias_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops


def restore(model: Model, before: Model, used: Collection[str]) -> list[str]:
    """Puts the weights of `before`, and their biases, back into `model`, except for the operators in `used`.

    Operators are known by their names. One that has another shape now, since channels were cut or it was factorized,
    is left as it is.

    Returns:
        The names of the operators that got their weights back.
    """
    originals = {op.name: op for op in weighted_ops(before.graph)}
    restored = []
    for op in weighted_ops(model.graph):
        old = originals.get(op.name)
        if op.name in used or old is None or (old.kind, old.n, old.k) != (op.kind, op.n, op.k):
            continue
        if np.array_equal(old.rows(), op.rows()):
            continue
        op.replace(old.rows())
        bias, old_bias = bias_of(op, model.graph), bias_of(old, before.graph)
        if bias is not None and old_bias is not None and bias.n == old_bias.n:
            bias.replace(old_bias.values)
        restored.append(op.name)
    return restored
