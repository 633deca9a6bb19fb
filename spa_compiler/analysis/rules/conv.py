"""Convolution, grouped and depthwise ones too.

    X [N, (G, A), ..], W [(G, B), A, kernel..], bias [(G, B)] -> Y [N, (G, B), ..]

`G` counts the groups, `A` and `B` the inputs and outputs of each. With one group these are independent. Otherwise
removing an index of `G` takes a whole group (and `group` shrinks); of `A` or `B` one slot of every group.
Depthwise is `A` = 1: an index of `G` is an input channel with all of its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Dim, Facts, Patch, Rule, Work
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK

WINDOW = "convolution window"


def conv(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring."""
    x, weight = node.inputs[:2]
    inputs, filters = facts.of(x), facts.of(weight)
    if inputs is None or filters is None:
        return UNKNOWN_RANK
    groups = int(node.attrs.get("group", 1))
    if groups > 1:
        if reason := _couple_groups(node, facts, groups):
            return reason
    else:
        facts.couple(node, weight, 1, inputs[1])
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = node.inputs[2]
        if facts.of(bias) is None:
            return UNKNOWN_RANK
        facts.couple(node, bias, 0, filters[0])
    y = node.outputs[0]
    spatial = y.shape[2:] if y.shape is not None else [None] * (len(inputs) - 2)
    sizes = [size if isinstance(size, int) else None for size in spatial]
    facts.put(y, [inputs[0], filters[0], *(facts.algebra.fresh(size) for size in sizes)])
    for tensor in (x, weight, y):
        for axis in range(2, len(facts.axes[tensor.name])):
            facts.pin(node.op, tensor, axis, WINDOW, window=True)
    kernel = [facts.algebra.size(axis) for axis in filters[2:]]
    batch = facts.algebra.size(inputs[0]) or 1
    facts.works.append(Work(y.name, filters[:2], _times([batch, *sizes, *kernel])))
    return None


def _couple_groups(node: gs.Node, facts: Facts, groups: int) -> str | None:
    x, weight = node.inputs[:2]
    filters = facts.axes[weight.name]
    outputs, inner = (facts.algebra.size(axis) for axis in filters[:2])
    if outputs is None or inner is None:
        return "a grouped convolution of unknown size"
    group = Dim(groups, "conv group" if inner > 1 else "")
    slot_in, slot_out = Dim(inner, "slot of each conv group"), Dim(outputs // groups, "slot of each conv group")
    facts.couple(node, weight, 1, Axis.of(slot_in))
    facts.couple(node, weight, 0, Axis.of(group, slot_out), f"{groups} groups")
    facts.couple(node, x, 1, Axis.of(group, slot_in), f"{groups} groups")
    facts.patches.append(Patch(node.outputs[0].name, "group", Axis.of(group)))
    return None


def _times(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else math.prod(size for size in known if size is not None)


RULES: dict[str, Rule] = {"Conv": conv}
