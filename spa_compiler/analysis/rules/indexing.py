"""Indices that are tensors. `[.., n, ..]` is the axis that is indexed, ranked or scanned: it stays, with the positions
that the indices count over; the others pass through where each of their indices has its own indices and results.

Masked indices are zeros, which always are valid and concern masked results alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import axis_of, given, pin_matrix, pin_window, put_outputs

_DYNAMIC = "dynamic index"


def gather_elements(node: gs.Node, facts: Facts) -> str | None:
    """Data [.., n, ..], indices [.., m, ..] -> [.., m, ..]: on the other axes index c reads index c."""
    data, indices = node.inputs[:2]
    if facts.of(data) is None or facts.of(indices) is None:
        return UNKNOWN_RANK
    axis = axis_of(node, len(facts.axes[data.name]), 0)
    _side_by_side(node, facts, data, (indices,), axis)
    facts.put(node.outputs[0], facts.axes[indices.name])
    return None


def scatter_elements(node: gs.Node, facts: Facts) -> str | None:
    """Data [.., n, ..], indices and updates [.., m, ..] -> [.., n, ..]."""
    data, indices, updates = node.inputs[:3]
    if any(facts.of(tensor) is None for tensor in (data, indices, updates)):
        return UNKNOWN_RANK
    axis = axis_of(node, len(facts.axes[data.name]), 0)
    facts.couple(node, updates, axis, facts.axes[indices.name][axis])
    _side_by_side(node, facts, data, (indices, updates), axis)
    facts.put(node.outputs[0], facts.axes[data.name])
    return None


def _side_by_side(node: gs.Node, facts: Facts, data: Any, others: Sequence[Any], axis: int) -> None:
    """Pins the indexed axis and joins the others; where indices cover but the front of one, that stays."""
    for place, own in enumerate(facts.axes[data.name]):
        if place == axis:
            facts.pin(node.op, data, place, _DYNAMIC)
            facts.pin(node.op, others[0], place, _DYNAMIC, window=True)
            continue
        for tensor in others:
            if _same_size(facts, own, facts.axes[tensor.name][place]):
                facts.couple(node, tensor, place, own)
            else:
                for part in (data, tensor):
                    facts.pin(node.op, part, place, "indices for a part of the axis")


def _same_size(facts: Facts, left: Axis, right: Axis) -> bool:
    return facts.algebra.size(left) == facts.algebra.size(right)


def gather_nd(node: gs.Node, facts: Facts) -> str | None:
    """Data [batch.., n_1 .. n_k, rest..], indices [batch.., m.., k] -> [batch.., m.., rest..]."""
    data, indices = node.inputs[:2]
    axes, where = facts.of(data), facts.of(indices)
    if axes is None or where is None:
        return UNKNOWN_RANK
    depth = facts.algebra.size(where[-1])
    if depth is None:
        return "indices of unknown length"
    batch = int(node.attrs.get("batch_dims", 0))
    for place in range(batch):
        facts.couple(node, indices, place, axes[place])
    for place in range(batch, batch + depth):
        facts.pin(node.op, data, place, _DYNAMIC)
    for place in range(batch, len(where)):
        facts.pin(node.op, indices, place, _DYNAMIC, window=True)
    facts.put(node.outputs[0], (*axes[:batch], *where[batch:-1], *axes[batch + depth :]))
    return None


def scatter_nd(node: gs.Node, facts: Facts) -> str | None:
    """Data [n_1 .. n_k, rest..], indices [m.., k], updates [m.., rest..] -> as data."""
    data, indices, updates = node.inputs[:3]
    axes, where, new = facts.of(data), facts.of(indices), facts.of(updates)
    if axes is None or where is None or new is None:
        return UNKNOWN_RANK
    depth = facts.algebra.size(where[-1])
    if depth is None:
        return "indices of unknown length"
    for place in range(depth):
        facts.pin(node.op, data, place, _DYNAMIC)
    for place in range(len(where)):
        facts.pin(node.op, indices, place, _DYNAMIC, window=True)
    for place, other in enumerate((*where[:-1], *axes[depth:])):
        facts.couple(node, updates, place, other)
    facts.put(node.outputs[0], axes)
    return None


def top_k(node: gs.Node, facts: Facts) -> str | None:
    """[.., n, ..] -> values and indices [.., k, ..]."""
    found = _pinned(node, facts, -1, "ranked")
    if found is None:
        return UNKNOWN_RANK
    axes, axis = found
    pin_window(node, facts, given(node, 1), "a size")
    _replaced(node, facts, axes, axis, "ranked")
    return None


def _pinned(node: gs.Node, facts: Facts, default: int, reason: str) -> tuple[tuple[Axis, ...], int] | None:
    """The axes of the first input, and the number of the one that the attribute names, which stays; None if its rank is
    unknown.
    """
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return None
    axis = axis_of(node, len(axes), default)
    facts.pin(node.op, x, axis, reason)
    return axes, axis


def _replaced(node: gs.Node, facts: Facts, axes: Sequence[Axis], axis: int, reason: str) -> None:
    """The outputs have positions of their own on one axis."""
    shape = next((output.shape for output in node.outputs if output.name and output.shape is not None), None)
    size = shape[axis] if shape is not None and isinstance(shape[axis], int) else None
    put_outputs(node, facts, [*axes[:axis], facts.algebra.fresh(size), *axes[axis + 1 :]])
    for output in node.outputs:
        if output.name:
            facts.pin(node.op, output, axis, reason, window=True)


def arg(node: gs.Node, facts: Facts) -> str | None:
    """ArgMax and ArgMin: [.., n, ..] -> [.., 1, ..], or without that axis."""
    found = _pinned(node, facts, 0, "ranked")
    if found is None:
        return UNKNOWN_RANK
    axes, axis = found
    left = [facts.algebra.fresh(1)] if node.attrs.get("keepdims", 1) else []
    put_outputs(node, facts, [*axes[:axis], *left, *axes[axis + 1 :]])
    return None


def compress(node: gs.Node, facts: Facts) -> str | None:
    """[.., n, ..], condition [n] -> [.., m, ..]; without an axis x is flat."""
    x, condition = node.inputs[:2]
    if facts.of(x) is not None and "axis" not in node.attrs:
        return "selects single elements"
    found = _pinned(node, facts, 0, "selected by a condition")
    if found is None:
        return UNKNOWN_RANK
    axes, axis = found
    pin_window(node, facts, condition, "selected by a condition")
    _replaced(node, facts, axes, axis, "selected by a condition")
    return None


def one_hot(node: gs.Node, facts: Facts) -> str | None:
    """Indices [a..], depth -> [a.., depth], with the new axis at `axis`. It shrinks behind the operator, as the indices
    go on counting over all of it.
    """
    indices, depth = node.inputs[:2]
    axes = facts.of(indices)
    if axes is None:
        return UNKNOWN_RANK
    pin_window(node, facts, depth, "a size")
    pin_window(node, facts, given(node, 2), "values for off and on")
    axis = axis_of(node, len(axes) + 1, -1)
    shape = node.outputs[0].shape
    size = shape[axis] if shape is not None and isinstance(shape[axis], int) else None
    facts.put(node.outputs[0], [*axes[:axis], facts.algebra.fresh(size, "one-hot value"), *axes[axis:]])
    if facts.value(depth) is None:
        facts.pin(node.op, node.outputs[0], axis, "computed size", window=True)

    def patch(own: gs.Node, cut: Cut) -> None:
        if (kept := cut.keep(own.outputs[0], axis)) is not None:
            cut.after(own, 0, "Gather", [np.asarray(kept, np.int64)], {"axis": axis})

    facts.patch(node, patch)
    return None


def scan(node: gs.Node, facts: Facts) -> str | None:
    """CumSum and CumProd along the axis that the second input names."""
    x, axis = node.inputs[:2]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    known = facts.value(axis)
    if known is None:
        return "an axis that is computed"
    facts.pin(node.op, x, int(known.reshape(-1)[0]) % len(axes), "a running sum or product")
    put_outputs(node, facts, axes)
    return None


def trilu(node: gs.Node, facts: Facts) -> str | None:
    """[.., rows, columns]: a triangle of each matrix."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    pin_matrix(node, facts, x, "triangle of a matrix")
    pin_window(node, facts, given(node, 1), "a number")
    put_outputs(node, facts, axes)
    return None


def reverse_sequence(node: gs.Node, facts: Facts) -> str | None:
    """[time, batch, ..] with a length per sequence; the rest passes."""
    x, lengths = node.inputs[:2]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    facts.pin(node.op, x, axis_of(node, len(axes), 0, "time_axis"), "steps of a sequence", window=True)
    facts.pin(node.op, x, axis_of(node, len(axes), 1, "batch_axis"), "sequences with lengths", window=True)
    pin_window(node, facts, lengths, "sequences with lengths")
    put_outputs(node, facts, axes)
    return None


RULES: dict[str, Rule] = {
    "ArgMax": arg,
    "ArgMin": arg,
    "Compress": compress,
    "CumProd": scan,
    "CumSum": scan,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TopK": top_k,
    "Trilu": trilu,
}
