"""Axes put together from parts and taken apart again: Concat, Split, Pad.

Concat   [A], [B] -> [A + B]
Split    [A + B] -> [A], [B]           a Dim that a boundary falls into is defined as a sum, everywhere
Pad      [A] -> [before + A + after]   the padding's indices are free, too: their content is known
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Incompatible, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import axis_of, given, pin_window
from spa_compiler.analysis.rules.padding import PAD_INPUTS_SINCE
from spa_compiler.analysis.rules.reshape import SIZES

VARIES = "positions on an axis whose size varies"


def concat(node: gs.Node, facts: Facts) -> str | None:
    """The axis is the sum of the inputs', all other axes are joined."""
    inputs = [facts.of(tensor) for tensor in node.inputs]
    if any(axes is None for axes in inputs):
        return UNKNOWN_RANK
    axes = [own for own in inputs if own is not None]
    at = axis_of(node, len(axes[0]), 1)
    first = axes[0]
    for tensor in node.inputs[1:]:
        for place, other in enumerate(first):
            if place != at:
                facts.couple(node, tensor, place, other)
    out = list(first)
    out[at] = facts.algebra.concat([own[at] for own in axes])
    facts.put(node.outputs[0], out)
    return None


def split(node: gs.Node, facts: Facts) -> str | None:
    """Consecutive pieces; a cut writes their sizes out."""
    x = node.inputs[0]
    axes = facts.of(x)
    pin_window(node, facts, given(node, 1), SIZES)
    if axes is None or any(tensor.shape is None for tensor in node.outputs):
        return UNKNOWN_RANK
    at = axis_of(node, len(axes), 0)
    sizes = [tensor.shape[at] for tensor in node.outputs]
    if None in sizes or facts.algebra.size(axes[at]) != sum(sizes):
        return "splits into sizes that cannot be told"
    try:
        if facts.is_mixed(x, at):
            raise Incompatible(VARIES)
        parts = facts.algebra.split(axes[at], sizes)
    except Incompatible as error:
        facts.pin(node.op, x, at, str(error))
        parts = [facts.algebra.fresh(size) for size in sizes]
        reason: str | None = str(error)
    else:
        reason = None
    for tensor, part in zip(node.outputs, parts, strict=True):
        if tensor.name:
            facts.put(tensor, [part if place == at else axis for place, axis in enumerate(axes)])
            if reason:
                facts.pin(node.op, tensor, at, reason)

    def patch(own: gs.Node, cut: Cut) -> None:
        if cut.keep_on(axes[at]) is None:
            return
        kept = [cut.size_on(part)[1] for part in parts]
        own.attrs.pop("num_outputs", None)
        if cut.graph.opset < 13:
            own.attrs["split"] = kept
        else:
            cut.set_input(own, 1, np.asarray(kept, np.int64))

    facts.patch(node, patch)
    return None


def pad(node: gs.Node, facts: Facts) -> str | None:
    """Constant padding; what reflects or repeats the border keeps the axes that it pads."""
    x, y = node.inputs[0], node.outputs[0]
    axes = facts.of(x)
    for place in (1, 2, 3):
        pin_window(node, facts, given(node, place), SIZES)
    if axes is None or y.shape is None:
        return UNKNOWN_RANK
    pads = _pads(node, facts, len(axes))
    if pads is None:
        return "padded by amounts that cannot be told"
    constant = node.attrs.get("mode", "constant") == "constant"
    parts: list[tuple[Axis | None, Axis | None]] = []
    out: list[Axis] = []
    for place, (axis, (before, after)) in enumerate(zip(axes, pads, strict=True)):
        own: tuple[Axis | None, Axis | None] = (None, None)
        if (before, after) == (0, 0):
            out.append(axis)
        elif before is None or after is None or not constant or before < 0 or after < 0:
            facts.pin(node.op, x, place, f"padded ({node.attrs.get('mode', 'constant')})")
            out.append(facts.algebra.fresh(y.shape[place]))
        elif facts.algebra.size(axis) is None:
            return "pads an axis of unknown size"
        else:
            own = (_padding(facts, before), _padding(facts, after))
            out.append(facts.algebra.concat([part for part in (own[0], axis, own[1]) if part is not None]))
        parts.append(own)
    facts.put(y, out)
    for place, (axis, new) in enumerate(zip(axes, out, strict=True)):
        if new is not axis and parts[place] == (None, None):
            facts.pin(node.op, y, place, "padded", window=True)
    if any(None in pair for pair in pads):  # the amounts come from the graph, all of them
        for side in itertools.chain.from_iterable(parts):
            if side is not None:
                facts.pin_axis(node.op, y, side, "padded by amounts that are computed")

    def patch(own: gs.Node, cut: Cut) -> None:
        sides = [[pair[side] for pair in parts] for side in (0, 1)]
        if not any(side is not None and cut.keep_on(side) is not None for row in sides for side in row):
            return
        flat = [
            (pads[place][number] or 0) if side is None else cut.size_on(side)[1]
            for number, row in enumerate(sides)
            for place, side in enumerate(row)
        ]
        if cut.graph.opset < PAD_INPUTS_SINCE:
            own.attrs["pads"] = flat
            return
        cut.set_input(own, 1, np.asarray(flat, np.int64))
        if given(own, 3) is not None:
            cut.set_input(own, 3, np.arange(len(parts), dtype=np.int64))

    facts.patch(node, patch)
    return None


def _padding(facts: Facts, count: int) -> Axis | None:
    return facts.algebra.fresh(count) if count else None


def _pads(node: gs.Node, facts: Facts, rank: int) -> list[tuple[int | None, int | None]] | None:
    """(before, after) of each axis; None for an amount that is computed when the model runs."""
    if "pads" in node.attrs:
        values = np.asarray(node.attrs["pads"])
        return [(int(values[place]), int(values[place + rank])) for place in range(rank)]
    entries = facts.entries(node.inputs[1]) if given(node, 1) is not None else None
    if entries is None:
        return None
    array, fixed = entries
    listed = np.arange(rank)
    if given(node, 3) is not None:
        axes = facts.value(node.inputs[3])
        if axes is None:
            return None
        listed = np.asarray(axes) % rank
    out: list[tuple[int | None, int | None]] = [(0, 0)] * rank
    for place, axis in enumerate(listed):
        before, after = (int(array[i]) if fixed[i] else None for i in (place, place + listed.size))
        out[int(axis)] = before, after
    return out


RULES: dict[str, Rule] = {"Concat": concat, "Pad": pad, "Split": split}
