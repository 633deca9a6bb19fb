"""If, Loop and Scan: what is known behind a node from what is known inside of its branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from onnx import TensorProto

from spa_compiler.graph.sizes.known import NOTHING, Known, Op, computed

Branch: TypeAlias = Callable[[str, Sequence[Known]], list[Known]]
"""The attribute's name and what its graph is given -> its outputs."""
_Body: TypeAlias = Callable[[Sequence[Known]], list[Known]]

_ITERATIONS = 64  # of a Loop that are followed one by one


def control(op: Op, given: list[Known], branch: Branch) -> list[Known]:
    """What is known of the node's outputs."""
    if op.domain:
        return []
    if op.name == "If":
        return _if(given[0], branch)
    if op.name == "Loop":
        return _loop(op, lambda inputs: branch("body", inputs), given)
    if op.name == "Scan" and op.opset > 8:
        return _scan(op, lambda inputs: branch("body", inputs), given)
    return []


def _if(condition: Known, branch: Branch) -> list[Known]:
    if condition.value is not None:
        return branch("then_branch" if condition.value.all() else "else_branch", ())
    sides = branch("then_branch", ()), branch("else_branch", ())
    return [_common(left, right) for left, right in zip(*sides, strict=False)]


def _common(left: Known, right: Known) -> Known:
    """What holds for both."""
    if left.other is not None or right.other is not None:
        return left if left.other == right.other else NOTHING
    elem = left.elem if left.elem == right.elem else 0
    if left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return Known(elem)
    return Known(elem, tuple(a if a == b else None for a, b in zip(left.shape, right.shape, strict=True)))


def _steady(
    body: _Body, before: Sequence[Known], states: Sequence[Known], slices: Sequence[Known], skip: int
) -> list[Known]:
    """The body's outputs, with the states that hold in every iteration."""
    current = [Known(state.elem, state.shape, other=state.other) for state in states]
    for _ in range(8):  # each round loses at least one size
        outputs = body([*before, *current, *slices])[skip:]
        merged = [_common(old, new) for old, new in zip(current, outputs, strict=False)]
        if all(old.shape == new.shape for old, new in zip(current, merged, strict=True)):
            return [*merged, *outputs[len(merged) :]]
        current = merged
    return [Known(state.elem) for state in states]


def _loop(op: Op, body: _Body, given: list[Known]) -> list[Known]:
    """Follows the iterations while values say whether there is a next one, else takes what holds in all of them."""
    count = None if given[0].value is None else int(given[0].value.item())
    states = given[2:]
    flag = np.asarray(True) if op.optional(given, 1) is None else given[1].value
    current, slices, step = list(states), list[Known](), 0
    while flag is not None and flag.all() and step != count and step < _ITERATIONS:
        outputs = body([computed(np.asarray(step, np.int64)), computed(flag), *current])
        flag = outputs[0].value
        fresh = outputs[1 + len(states) :]
        slices = fresh if not step else [_common(old, new) for old, new in zip(slices, fresh, strict=True)]
        current, step = outputs[1 : 1 + len(states)], step + 1
    if step and (step == count or (flag is not None and not flag.all())):
        length: int | None = step
    else:
        number, again = Known(TensorProto.INT64, ()), Known(TensorProto.BOOL, ())
        steady = _steady(body, [number, again], states, (), 1)
        current, slices, length = steady[: len(states)], steady[len(states) :], None
    return [*current, *(_stacked(piece, length, 0) for piece in slices)]


def _scan(op: Op, body: _Body, given: list[Known]) -> list[Known]:
    count = int(op.attr("num_scan_inputs"))
    states, scanned = given[: len(given) - count], given[len(given) - count :]
    axes = op.attr("scan_input_axes") or [0] * count
    pieces: list[Known] = []
    length: int | None = None
    for known, axis in zip(scanned, axes, strict=True):
        if known.shape is None:
            pieces.append(Known(known.elem))
            continue
        axis %= len(known.shape)
        length = known.shape[axis] if length is None else length
        pieces.append(Known(known.elem, known.shape[:axis] + known.shape[axis + 1 :]))
    steady = _steady(body, (), states, pieces, 0)
    outputs = steady[len(states) :]
    axes = op.attr("scan_output_axes") or [0] * len(outputs)
    return steady[: len(states)] + [_stacked(piece, length, axis) for piece, axis in zip(outputs, axes, strict=False)]


def _stacked(piece: Known, length: int | None, axis: int) -> Known:
    if piece.shape is None:
        return Known(piece.elem)
    axis %= len(piece.shape) + 1
    return Known(piece.elem, (*piece.shape[:axis], length, *piece.shape[axis:]))
