"""Reductions. Axes that stay pass; what a reduced axis may lose hangs on what a zero does.

    X [N, C, L] -> Y [N, 1, L], or [N, L] without keepdims

A zero adds nothing to a sum. It counts in a mean, so the mean of what is left is scaled by kept / before. A maximum
with zeros among its elements is not below zero, so that is put behind it, and likewise with a minimum. A zero takes
part in a product or a sum of exponentials, so those axes stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Array, Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given, pin_window, stored, stored_values
from spa_compiler.analysis.rules.padding import axes_of, pin_varying, share, shrunk

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

_ZERO_COUNTS = {
    "ReduceLogSumExp": "a zero would take part in a sum of exponentials",
    "ReduceProd": "a zero would take part in a product",
}

_WITH_ZERO = {"ReduceMax": "Max", "ReduceMin": "Min"}
_BROADCASTS_SINCE = 8
"""The opset from which Max and Min take a scalar beside a tensor."""

_OF_STORED: Mapping[str, Callable[..., Array]] = {
    "ReduceL1": lambda x, **over: np.abs(x).sum(**over),
    "ReduceL2": lambda x, **over: np.sqrt(np.square(x).sum(**over)),
    "ReduceLogSum": lambda x, **over: np.log(np.sum(x, **over)),
    "ReduceMax": np.max,
    "ReduceMean": np.mean,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
    "ReduceSumSquare": lambda x, **over: np.square(x).sum(**over),
}


def reduction(node: gs.Node, facts: Facts) -> str | None:
    """`axes` is an attribute or an input, depending on the opset and the operator."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    over = _reduced(node, facts, len(axes))
    if over is None:
        return "reduces axes that are known only when the model runs"
    keepdims = bool(node.attrs.get("keepdims", 1))
    left: list[Axis | None] = [None if number in over else axis for number, axis in enumerate(axes)]
    one = facts.algebra.fresh(1)
    facts.put(node.outputs[0], [axis or one for axis in left if axis is not None or keepdims])
    if stored(x):
        _reduce_stored(node, facts, over, keepdims)
    elif node.op == "ReduceMean":
        _scale_mean(node, facts, over)
    elif node.op in _WITH_ZERO:
        _bound(node, facts, over)
    elif node.op in _ZERO_COUNTS:
        for axis in over:
            facts.pin(node.op, x, axis, _ZERO_COUNTS[node.op])
    return None


def _reduced(node: gs.Node, facts: Facts, rank: int) -> frozenset[int] | None:
    listed = node.attrs.get("axes")
    tensor = given(node, 1)
    if tensor is not None:
        pin_window(node, facts, tensor, "axes to reduce")
        listed = facts.value(tensor)
        if listed is None:
            return None
    if listed is None or len(listed) == 0:
        return frozenset(() if node.attrs.get("noop_with_empty_axes", 0) else range(rank))
    return frozenset(int(axis) % rank for axis in listed)


def _scale_mean(node: gs.Node, facts: Facts, over: frozenset[int]) -> None:
    x = node.inputs[0]
    dtype = _float_type(x)
    if dtype is None:
        for axis in over:
            facts.pin(node.op, x, axis, "a mean of other numbers than floats")
        return
    pin_varying(node, facts, x, sorted(over), share_known=True)
    axes = axes_of(facts, x, sorted(over))

    def patch(node: gs.Node, cut: Cut) -> None:
        kept = shrunk(cut, axes)
        if kept:
            cut.after(node, 0, "Mul", [np.array(share(kept), dtype)])

    facts.patch(node, patch)


def _bound(node: gs.Node, facts: Facts, over: frozenset[int]) -> None:
    """max(x, 0, .., 0) = max(max(x), 0)."""
    x = node.inputs[0]
    dtype = _float_type(x)
    if dtype is None or facts.opset < _BROADCASTS_SINCE:
        for axis in over:
            facts.pin(node.op, x, axis, "a zero would take part in an extreme")
        return
    axes = axes_of(facts, x, sorted(over))

    def patch(node: gs.Node, cut: Cut) -> None:
        if shrunk(cut, axes):
            cut.after(node, 0, _WITH_ZERO[node.op], [np.zeros((), dtype)])

    facts.patch(node, patch)


def _reduce_stored(node: gs.Node, facts: Facts, over: frozenset[int], keepdims: bool) -> None:
    """No mask reaches stored values, so what is reduced is all of them: once the tensor shrinks, that is a constant."""
    x, function = node.inputs[0], _OF_STORED.get(node.op)
    if function is None or _float_type(x) is None:
        for axis in over:
            facts.pin(node.op, x, axis, "reduces stored values")
        return
    axes = axes_of(facts, x, sorted(over))

    def patch(node: gs.Node, cut: Cut) -> None:
        if not shrunk(cut, axes):
            return
        values = stored_values(x)
        dtype = values.dtype
        for axis in range(values.ndim):
            keep = None if axis in over else cut.keep(x, axis)
            values = values if keep is None else values.take(keep, axis)
        reduced = function(values.astype(np.float64), axis=tuple(over), keepdims=keepdims).astype(dtype)
        node.op, node.attrs, node.inputs = "Identity", {}, [cut.constant(reduced, node.outputs[0].name)]

    facts.patch(node, patch)


def _float_type(tensor: Any) -> np.dtype[Any] | None:
    """The tensor's type if numpy knows it as one of floats."""
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return None
    dtype = np.dtype(tensor.dtype)
    return dtype if dtype.kind == "f" else None


RULES: dict[str, Rule] = dict.fromkeys([*_OF_STORED, "ReduceLogSumExp"], reduction)
