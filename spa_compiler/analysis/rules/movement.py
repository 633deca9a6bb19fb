"""Copies and sizes: Constant, Expand, Tile, Shape, Size.

Expand  [H, 1] -> [H, r]    r is a Dim of its own: one copy fewer is as good
Tile    [n] -> [(r, n)]     the same
Shape, Size                 go on saying what they say of the whole model: their values may be used as numbers
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.numbering import Mask
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import pin_window, stored
from spa_compiler.analysis.rules.reshape import SIZES
from spa_compiler.graph.fold import constant_values


def constant(node: gs.Node, facts: Facts) -> str | None:
    """A constant inside of the graph is a parameter like an initializer, where a cut can make it one."""
    if facts.of(node.outputs[0]) is None:
        return UNKNOWN_RANK
    return "a sparse tensor or text" if constant_values(node) is None else None


def expand(node: gs.Node, facts: Facts) -> str | None:
    """Axes of size 1 that become larger are new, the others pass."""
    x, y = node.inputs[0], node.outputs[0]
    axes = facts.of(x)
    pin_window(node, facts, node.inputs[1], SIZES)
    if axes is None or y.shape is None or facts.entries(node.inputs[1]) is None:
        return "expands to sizes that cannot be told"
    out: list[Axis] = []
    for back in range(len(y.shape), 0, -1):
        own = axes[-back] if back <= len(axes) else None
        size = y.shape[-back]
        if own is not None and facts.algebra.size(own) == size:
            out.append(own)
        else:
            out.append(facts.algebra.fresh(size))
    facts.put(y, out)
    for place, axis in enumerate(out):
        if facts.varies(y, place) and axis not in axes:
            facts.pin(node.op, y, place, "computed size", window=True)
    facts.pin_uneven(node.op, y, range(len(out)))
    facts.patch(node, lambda own, cut: cut.patch_sizes(own, 1))
    return None


def tile(node: gs.Node, facts: Facts) -> str | None:
    """[n] -> [(r, n)]."""
    x, y = node.inputs[0], node.outputs[0]
    axes = facts.of(x)
    pin_window(node, facts, node.inputs[1], SIZES)
    entries = facts.entries(node.inputs[1]) if len(node.inputs) == 2 else None
    if axes is None or entries is None:
        return "repeats that cannot be told"
    repeats, fixed = entries
    copies = [facts.algebra.fresh(int(repeat)) for repeat in repeats]
    facts.put(
        y,
        [
            axis if repeat == 1 else facts.algebra.merge([copy, axis])
            for copy, axis, repeat in zip(copies, axes, repeats, strict=True)
        ],
    )
    for place, known in enumerate(fixed):
        if not known:
            facts.pin(node.op, y, place, "computed size", window=True)

    def patch(own: gs.Node, cut: Cut) -> None:
        kept = [cut.size_on(copy)[1] if fixed[place] else None for place, copy in enumerate(copies)]
        values = cut.value(own, 1)
        if values is not None and any(k is not None and k != v for k, v in zip(kept, values, strict=True)):
            new = [v if k is None else k for k, v in zip(kept, values, strict=True)]
            cut.set_input(own, 1, np.asarray(new, np.int64))

    if not stored(node.inputs[1]):
        for copy in copies:
            if facts.algebra.size(copy) != 1:
                facts.pin_axis(node.op, y, copy, "computed size")
    facts.patch(node, patch)
    return None


def shape(node: gs.Node, facts: Facts) -> str | None:
    """The sizes of the whole model."""
    x, y = node.inputs[0], node.outputs[0]
    axes = facts.of(x)
    if facts.of(y) is None:
        return UNKNOWN_RANK
    facts.pin_tensor(node.op, y, SIZES, window=True)
    if axes is None:
        return None
    start, stop, _ = slice(node.attrs.get("start", 0), node.attrs.get("end")).indices(len(axes))
    facts.pin_uneven(node.op, x, range(start, stop))

    def patch(own: gs.Node, cut: Cut) -> None:
        ratio = np.ones((2, stop - start), np.int64)
        for place, axis in enumerate(axes[start:stop]):
            if cut.keep_on(axis) is not None:
                before, after = cut.size_on(axis)
                common = math.gcd(before, after)
                ratio[:, place] = before // common, after // common
        if (ratio != 1).any() and not _unread(own, ratio[0] != ratio[1], cut.graph):
            cut.after(own, 0, "Div", [ratio[1]])
            cut.after(own, 0, "Mul", [ratio[0]])

    facts.patch(node, patch)
    return None


def size(node: gs.Node, facts: Facts) -> str | None:
    """The number of elements in the whole model."""
    axes = facts.of(node.inputs[0])
    if facts.of(node.outputs[0]) is None or axes is None:
        return UNKNOWN_RANK
    facts.pin_uneven(node.op, node.inputs[0], range(len(axes)))

    def patch(own: gs.Node, cut: Cut) -> None:
        before = after = 1
        for axis in axes:
            if cut.keep_on(axis) is not None:
                sizes = cut.size_on(axis)
                before, after = before * sizes[0], after * sizes[1]
        if before != after:
            common = math.gcd(before, after)
            cut.after(own, 0, "Div", [np.asarray(after // common)])
            cut.after(own, 0, "Mul", [np.asarray(before // common)])

    facts.patch(node, patch)
    return None


def _unread(node: gs.Node, changed: Mask, graph: gs.Graph) -> bool:
    """Whether everything that reads the sizes takes other entries than those that changed."""
    if any(tensor is node.outputs[0] for tensor in graph.outputs):
        return False
    for user in node.outputs[0].outputs:
        index = user.inputs[1] if user.op == "Gather" and len(user.inputs) == 2 else None
        if not isinstance(index, gs.Constant) or user.inputs[0] is not node.outputs[0]:
            return False
        if changed[np.asarray(index.values).reshape(-1)].any():
            return False
    return True


RULES: dict[str, Rule] = {"Constant": constant, "Expand": expand, "Shape": shape, "Size": size, "Tile": tile}
