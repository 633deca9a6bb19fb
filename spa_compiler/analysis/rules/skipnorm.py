"""Normalizations of com.microsoft, which ONNX Runtime's optimizer makes of several operators.

    SkipLayerNormalization, SkipSimplifiedLayerNormalization   X [B, S, D], skip [.., S, D], scale, shift, bias [D]
    EmbedLayerNormalization       ids [B, S], tables [V, D], [P, D], [T, D], scale, shift [D] -> Y [B, S, D]
    GroupNorm, SkipGroupNorm      X [N, .., (G, S)] or [N, (G, S), ..], scale, shift [(G, S)]

As in `norm`; the sum that comes before is part of the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Pin, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast
from spa_compiler.analysis.rules.inputs import given, made, pin_window, stored
from spa_compiler.analysis.rules.norm import (
    STORED,
    couple_groups,
    couple_trailing,
    layer_norm,
    mean_square_patch,
    put_statistics,
    rms_norm,
)
from spa_compiler.analysis.rules.padding import Padded, axes_of, pin_varying

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

EPSILON = 1e-12
"""What these operators take where the attribute is left out."""

_SUM = 3
"""The output that has the sum of all that comes in."""


def skip_layer_norm(node: gs.Node, facts: Facts) -> str | None:
    """(X, skip, scale, shift, bias) -> (Y, mean, inverse deviation, X + skip + bias)."""
    axes = _sum(node, facts, [2, 3, 4])
    if axes is None:
        return UNKNOWN_RANK
    x, skip = node.inputs[:2]
    last = len(axes) - 1
    pin_varying(node, facts, node.outputs[0], [last])
    places = {place: (*(None,) * (len(facts.axes[t.name]) - 1), last) for place, t in enumerate(node.inputs) if t.name}
    data = {0: x, 1: skip, **({4: node.inputs[4]} if given(node, 4) is not None else {})}
    whole = tuple(range(len(axes)))
    facts.patch(node, Padded(axes_of(facts, node.outputs[0], [last]), places, {0: whole, _SUM: whole}, data))
    return None


def skip_rms_norm(node: gs.Node, facts: Facts) -> str | None:
    """(X, skip, scale, bias) -> (Y, nothing, inverse root, X + skip + bias)."""
    axes = _sum(node, facts, [2, 3])
    if axes is None:
        return UNKNOWN_RANK
    last = len(axes) - 1
    pin_varying(node, facts, node.outputs[0], [last])
    for tensor in node.inputs[:2]:
        if stored(tensor):
            facts.pin(node.op, tensor, len(facts.axes[tensor.name]) - 1, STORED)
    bias = given(node, 3)
    offset = bias if bias is not None and stored(bias) else None
    over = axes_of(facts, node.outputs[0], [last])
    facts.patch(node, mean_square_patch(node, over, 2, 2, epsilon=EPSILON, offset=offset))
    return None


def embed_layer_norm(node: gs.Node, facts: Facts) -> str | None:
    """The sum of the embeddings lies inside of the operator, where no unit of it can be masked, so D stays."""
    tables = [place for place in (2, 3, 4) if given(node, place) is not None]
    if (
        any(facts.of(tensor) is None for tensor in node.inputs if tensor.name)
        or len(facts.axes[node.inputs[0].name]) != 2
    ):
        return UNKNOWN_RANK
    for place in (0, 1, 7, 8):
        pin_window(node, facts, given(node, place), "ids and positions")
    width = facts.axes[node.inputs[2].name][1]
    for place in tables:
        facts.pin(node.op, node.inputs[place], 0, "looked up by ids")
        facts.couple(node, node.inputs[place], 1, width)
        facts.pin(node.op, node.inputs[place], 1, "statistics of stored embeddings")
    for place in (5, 6):
        facts.couple(node, node.inputs[place], 0, width)
    ids = facts.axes[node.inputs[0].name]
    for place, axes in enumerate(([*ids, width], ids[:1], [*ids, width])):
        if (output := made(node, place)) is not None:
            facts.put(output, axes)
    return None


def group_norm(node: gs.Node, facts: Facts) -> str | None:
    """(X, scale, shift) -> Y, or (X, scale, shift, skip, bias) -> (Y, X + skip + bias); whole groups can go."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None or any(facts.of(tensor) is None for tensor in node.inputs if tensor.name):
        return UNKNOWN_RANK
    channel = len(axes) - 1 if node.attrs.get("channels_last", 1) else 1
    groups = int(node.attrs["groups"])
    split = couple_groups(node, facts, channel, groups)
    if split is None:
        return "groups of an unknown number of channels"
    group, slot = split
    facts.pins.append(Pin(x.name, channel, node.op, "statistics over the slots of a group", (slot,)))
    for axis in range(1, len(axes)):
        if axis != channel:
            facts.pin(node.op, x, axis, "statistics over positions", window=True)
    for place in (1, 2, 4):
        tensor = given(node, place)
        if tensor is not None:
            facts.couple(node, tensor, 0, axes[channel])
    skip = given(node, 3)
    if skip is not None:
        own = facts.axes[skip.name]
        facts.couple(node, skip, 0, axes[0])
        facts.couple(node, skip, channel if len(own) == len(axes) else 1, axes[channel])
    for output in node.outputs:
        if output.name:
            facts.put(output, axes)

    def patch(node: gs.Node, cut: Cut) -> None:
        node.attrs["groups"] = cut.size_on(group)[1]

    facts.patch(node, patch)
    return None


def _sum(node: gs.Node, facts: Facts, vectors: Sequence[int]) -> tuple[Axis, ...] | None:
    """States the axes of X + skip, of the [D] inputs and of all outputs; None if a rank is unknown."""
    x, skip = node.inputs[:2]
    if facts.of(x) is None or facts.of(skip) is None:
        return None
    ranks = [(tensor, range(len(facts.axes[tensor.name]))) for tensor in (x, skip)]
    axes = tuple(broadcast(node, facts, ranks))
    given_vectors = [place for place in vectors if given(node, place) is not None]
    if couple_trailing(node, facts, axes, given_vectors) is None:
        return None
    put_statistics(node, facts, axes, len(axes) - 1, (1, 2))
    for place in (0, _SUM):
        if (output := made(node, place)) is not None:
            facts.put(output, axes)
    return axes


MICROSOFT: dict[str, Rule] = {
    "EmbedLayerNormalization": embed_layer_norm,
    "GroupNorm": group_norm,
    "LayerNormalization": layer_norm,
    "SimplifiedLayerNormalization": rms_norm,
    "SkipGroupNorm": group_norm,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_rms_norm,
}
