"""Convolutions: plain, grouped, depthwise, transposed, deformable, quantized.

    Conv           X [N, (G, A), ..], W [(G, B), A, kernel..], bias [(G, B)] -> Y [N, (G, B), ..]
    ConvTranspose  X [N, (G, A), ..], W [(G, A), B, kernel..], bias [(G, B)] -> Y [N, (G, B), ..]

`G` counts the groups, `A` and `B` the inputs and outputs of each. With one group these are independent. Otherwise
removing an index of `G` takes a whole group (and `group` shrinks); of `A` or `B` one slot of every group.
Depthwise is `A` = 1: an index of `G` is an input channel with all of its outputs.

A spatial axis on which the kernel is 1, the stride 1 and the padding 0 passes; others are pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Dim, Facts, Incompatible, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given, made, pin_stored_sum
from spa_compiler.analysis.rules.window import one_by_one, pin_part, put_mixed

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

WINDOW = "convolution window"
_SLOT = "slot of each conv group"


def conv(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring."""
    return _convolve(node, facts, node.inputs[1], given(node, 2))


def conv_transpose(node: gs.Node, facts: Facts) -> str | None:
    """The weight's first axis is that of the inputs, its second one that of the outputs."""
    return _convolve(node, facts, node.inputs[1], given(node, 2), transposed=True)


def conv_integer(node: gs.Node, facts: Facts) -> str | None:
    """Zero points: one of the input, one of the weight or one of each of its outputs."""
    _pin_offset_inputs(node, facts, given(node, 2), node.inputs[1])
    return _convolve(node, facts, node.inputs[1], given(node, 3))


def qlinear_conv(node: gs.Node, facts: Facts) -> str | None:
    """Scales and zero points of the weight are one, or one of each output; all others are one."""
    if node.attrs.get("channels_last", 0):
        return "channels are last"
    weight = node.inputs[3]
    _pin_offset_inputs(node, facts, node.inputs[2], weight)
    return _convolve(node, facts, weight, node.inputs[4], node.inputs[5], given(node, 8))


def fused_conv(node: gs.Node, facts: Facts) -> str | None:
    """Conv, plus `Z` of the result's shape, and an activation."""
    if reason := conv(node, facts):
        return reason
    added = given(node, 3)
    if added is None:
        return None
    if facts.of(added) is None:
        return UNKNOWN_RANK
    for axis, own in enumerate(facts.axes[node.outputs[0].name]):
        facts.couple(node, added, axis, own)
    return None


def dynamic_pads(node: gs.Node, facts: Facts) -> str | None:
    """ConvTranspose with its paddings as third input."""
    pads = given(node, 2)
    if pads is None:
        return _convolve(node, facts, node.inputs[1], given(node, 3), transposed=True)
    facts.pin_tensor(node.op, pads, "paddings", window=True)
    return _convolve(node, facts, node.inputs[1], given(node, 3), transposed=True, passing=False)


def deform_conv(node: gs.Node, facts: Facts) -> str | None:
    """Conv that reads X where `offset` says; `offset` and `mask` are [N, (O, taps), ..], X is [N, (O, D), ..] too."""
    if reason := _convolve(node, facts, node.inputs[1], given(node, 3), passing=False):
        return reason
    x, y = facts.axes[node.inputs[0].name], node.outputs[0]
    channels, count = facts.algebra.size(x[1]), int(node.attrs.get("offset_group", 1))
    groups = Dim(count, "offset group")
    if count > 1:
        if channels is None:
            raise Incompatible("offset groups of a convolution of unknown size")
        inside = Dim(channels // count, "slot of each offset group")
        facts.couple(node, node.inputs[0], 1, Axis.of(groups, inside), f"{count} offset groups")
        facts.patch(node, _follow("offset_group", Axis.of(groups)))
    for tensor in (node.inputs[2], given(node, 4)):
        if tensor is None:
            continue
        own = facts.of(tensor)
        if own is None:
            return UNKNOWN_RANK
        total = facts.algebra.size(own[1])
        if total is None:
            raise Incompatible("offsets of unknown size")
        taps = Axis.of(Dim(total // count))
        facts.couple(node, tensor, 0, x[0])
        facts.couple(node, tensor, 1, facts.algebra.merge([Axis.of(groups), taps]), f"{count} offset groups")
        pin_part(node, facts, tensor, 1, taps, "offsets of a window")
        for axis in range(2, len(own)):
            facts.couple(node, tensor, axis, facts.axes[y.name][axis])
    return None


def causal_conv(node: gs.Node, facts: Facts) -> str | None:
    """Depthwise: input [B, C, L], weight [C, 1, k], bias [C], past and present state [B, C, k - 1]."""
    if node.attrs.get("channels_last", 0) or node.attrs.get("state_window", 0) or node.attrs.get("ndim", 1) != 1:
        return "a state that is not [batch, channels, positions]"
    x, weight = node.inputs[:2]
    axes = facts.of(x)
    if axes is None or facts.of(weight) is None:
        return UNKNOWN_RANK
    facts.couple(node, weight, 0, axes[1])
    facts.pin(node.op, weight, 2, WINDOW, window=True)
    put_mixed(node, facts, [axes[0], axes[1], None], WINDOW)
    if (bias := given(node, 2)) is not None and (reason := _per_output(node, facts, bias, axes[1])):
        return reason
    if (past := given(node, 3)) is not None:
        if facts.of(past) is None:
            return UNKNOWN_RANK
        facts.couple(node, past, 0, axes[0])
        facts.couple(node, past, 1, axes[1])
        facts.pin(node.op, past, 2, WINDOW, window=True)
    if (present := made(node, 1)) is not None:
        taps = facts.algebra.size(facts.axes[weight.name][2])
        length = None if taps is None else (taps - 1) * int(node.attrs.get("dilation", 1))
        facts.put(present, [axes[0], axes[1], facts.algebra.fresh(length)])
        facts.pin(node.op, present, 2, WINDOW, window=True)
    _count(node, facts, weight, node.outputs[0])
    return None


def channels_last(node: gs.Node, facts: Facts) -> str | None:
    """Made by ONNX Runtime for a single device, with weights in an order of its own."""
    return "channels are last"


def _convolve(
    node: gs.Node, facts: Facts, weight: Any, *per_output: Any, transposed: bool = False, passing: bool = True
) -> str | None:
    """What all convolutions have in common.

    Args:
        per_output: the bias and other constants of one value, or one of each output; None: not given.
        transposed: the weight is laid out as that of ConvTranspose.
        passing: spatial axes may pass.
    """
    x, y = node.inputs[0], node.outputs[0]
    inputs, filters = facts.of(x), facts.of(weight)
    if inputs is None or filters is None:
        return UNKNOWN_RANK
    outputs = _channels(node, facts, x, weight, transposed)
    pin_stored_sum(node, facts, (weight, x), 1)
    for tensor in per_output:
        if tensor is not None and (reason := _per_output(node, facts, tensor, outputs)):
            return reason
    apart = one_by_one(node, [facts.algebra.size(axis) for axis in filters[2:]])
    spatial = [axis if passing and single else None for axis, single in zip(inputs[2:], apart, strict=True)]
    put_mixed(node, facts, [inputs[0], outputs, *spatial], WINDOW)
    for axis in range(2, len(filters)):
        facts.pin(node.op, weight, axis, WINDOW, window=True)
    _count(node, facts, weight, x if transposed else y)
    return None


def _channels(node: gs.Node, facts: Facts, x: Any, weight: Any, transposed: bool) -> Axis:
    """Joins the channels of X with the weight; returns those of Y."""
    inputs, (first, second) = facts.axes[x.name][1], facts.axes[weight.name][:2]
    count = int(node.attrs.get("group", 1))
    if count == 1:
        facts.couple(node, weight, 0 if transposed else 1, inputs)
        return second if transposed else first
    sizes = facts.algebra.size(first), facts.algebra.size(second)
    if sizes[0] is None or sizes[1] is None:
        raise Incompatible("a grouped convolution of unknown size")
    outer, inner = Dim(sizes[0] // count, _SLOT), Dim(sizes[1], _SLOT)
    slot_in, slot_out = (outer, inner) if transposed else (inner, outer)
    group = Dim(count, "conv group" if slot_in.size != 1 else "")
    facts.couple(node, weight, 1, Axis.of(inner))
    facts.couple(node, weight, 0, Axis.of(group, outer), f"{count} groups")
    facts.couple(node, x, 1, Axis.of(group, slot_in), f"{count} groups")
    facts.patch(node, _follow("group", Axis.of(group)))
    return Axis.of(group, slot_out) if transposed else first


def _follow(attribute: str, axis: Axis) -> Callable[[gs.Node, Cut], None]:
    """A patch: the attribute counts the indices of the axis."""

    def apply(node: gs.Node, cut: Cut) -> None:
        kept = cut.keep_on(axis)
        if kept is not None:
            node.attrs[attribute] = len(kept)

    return apply


def _per_output(node: gs.Node, facts: Facts, tensor: Any, outputs: Axis) -> str | None:
    """Joins a vector with one value of each output; a single value belongs to all."""
    own = facts.of(tensor)
    if own is None:
        return UNKNOWN_RANK
    if own and facts.algebra.size(own[0]) != 1:
        facts.couple(node, tensor, 0, outputs)
    return None


def _pin_offset_inputs(node: gs.Node, facts: Facts, zero_point: Any | None, weight: Any) -> None:
    """A zero that is read at a removed index means `- zero point`, so the sum over inputs would lose something."""
    if zero_point is None or node.inputs[0].name in facts.silent:
        return
    value = facts.value(zero_point)
    if (value is None or value.any()) and facts.of(weight) is not None:
        facts.pin(node.op, weight, 1, "summed over inputs whose zero point is not 0")


def _count(node: gs.Node, facts: Facts, weight: Any, positions: Any) -> None:
    """MACs: the whole weight at each position; an open batch counts as one image, other open sizes as bound."""
    axes = facts.axes[positions.name]
    batch = [] if facts.algebra.size(axes[0]) is None or facts.varies(positions, 0) else [axes[0]]
    known = all(facts.algebra.size(axis) is not None for axis in axes[2:])
    facts.work(node, [*facts.axes[weight.name], *(axes[2:] if known else ()), *batch], 1 if known else None)


RULES: dict[str, Rule] = {
    "CausalConvWithState": causal_conv,
    "Conv": conv,
    "ConvInteger": conv_integer,
    "ConvTranspose": conv_transpose,
    "DeformConv": deform_conv,
    "QLinearConv": qlinear_conv,
}
MICROSOFT: dict[str, Rule] = {
    "CausalConvWithState": causal_conv,
    "ConvTransposeWithDynamicPads": dynamic_pads,
    "FusedConv": fused_conv,
    "NhwcConv": channels_last,
    "NhwcFusedConv": channels_last,
    "QLinearConv": qlinear_conv,
}
