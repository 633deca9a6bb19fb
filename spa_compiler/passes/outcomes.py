"""What layer-wise solving came to: checked before, written into the model after, and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.errors import ModelError
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes.layerwise import Outcome
from spa_compiler.passes.pass_ import SiteChange

DENSE = "dense"
"""The pattern of a weight that was refitted and has no zeros."""


def check_finite(op: WeightedOp) -> None:
    """Raises ModelError where a weight has a NaN or an infinity."""
    rows = op.rows()
    if not np.isfinite(rows).all():
        i, j = np.argwhere(~np.isfinite(rows))[0]
        raise ModelError(
            f"weight {op.weight.name!r} of {op.kind} has {rows[i, j]} at output {i}, input {j}",
            where=f"node {op.name!r}",
            fix="Export the model again from a checkpoint without NaN and infinities",
        )


def apply(
    ops: Sequence[WeightedOp], outcomes: Sequence[Outcome], pattern_of: Sequence[str], method: str
) -> list[SiteChange]:
    """Writes the outcomes into the model, and says what each came to."""
    writer = _Writer()
    changes = []
    for op, outcome, pattern in zip(ops, outcomes, pattern_of, strict=True):
        name, before = op.weight.name, density(op.rows())
        writer.replace(op, outcome.result.rows)
        if outcome.bias is not None and outcome.values is not None:
            outcome.bias.replace(outcome.values)
        changes.append(
            SiteChange(
                node=op.name,
                op=op.kind,
                weight=name,
                pattern=pattern,
                n=op.n,
                k=op.k,
                density_before=before,
                density_after=density(op.rows()),
                error=outcome.result.error,
                method=method,
                seconds=outcome.seconds,
            )
        )
    return changes


class _Writer:
    """Puts new rows in place, so that nodes which shared a weight and still have equal ones go on sharing it."""

    def __init__(self) -> None:
        # By identity of the source weight; the weight itself is held so that its id is not given to another.
        self._written: dict[int, tuple[Any, list[Any]]] = {}

    def replace(self, op: WeightedOp, rows: NDArray[Any]) -> None:
        """Writes `rows [n, k]` as the weight of `op`."""
        source = op.weight
        shared = len(source.outputs) > 1 or id(source) in self._written
        op.replace(rows)
        if not shared:
            return
        _, written = self._written.setdefault(id(source), (source, []))
        for other in written:
            if np.array_equal(other.values, op.weight.values):
                op.node.inputs[1] = other
                return
        written.append(op.weight)


def scarce(ops: Sequence[WeightedOp], outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """A warning where layers were solved from fewer positions than they have inputs."""
    few = [(op, out.positions) for op, out in zip(ops, outcomes, strict=True) if 0 < out.positions < op.k]
    if not few:
        return ()
    op, positions = min(few, key=lambda pair: pair[1] / pair[0].k)
    return (
        f"{len(few)} of {len(ops)} layers saw fewer positions than they have inputs ({op.name!r}: {positions} for "
        f"{op.k}): less of what they lose is made up for; give {-(-2 * op.k // positions)} times as many samples",
    )


def density(rows: NDArray[Any]) -> float:
    """Share of nonzeros, 0 to 1."""
    return int(np.count_nonzero(rows)) / rows.size
