"""Normalizations.

    BatchNormalization, InstanceNormalization   X [N, C, ..], scale [C], bias [C]
    LayerNormalization, RMSNormalization        X [.., D, ..], scale [D, ..], bias [D, ..]
    SimplifiedLayerNormalization                as RMSNormalization; ONNX Runtime's own, but in the default domain
    GroupNormalization                          X [N, (G, S), ..], scale and bias [(G, S)]

Axes that statistics are not taken over pass: with C go its statistics, with an index of G a whole group.

The others may shrink too, as long as the statistics stay those of the masked model, in which removed indices are zeros:
sums over what is left, divided by the old count. A mean of squares alone is off by a factor, which gain and epsilon
take up. Around everything else stand a Pad and a Slice, see `padding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.in_place import InPlace
from spa_compiler.analysis.rules.inputs import axis_of, given, made, stored, stored_values
from spa_compiler.analysis.rules.padding import (
    Padded,
    axes_of,
    can_pad_moving,
    cut_ends,
    pad_ends,
    pin_varying,
    shape_into,
    share,
    shrunk,
)

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

EPSILON = 1e-5
"""What the operators of the default domain take where the attribute is left out."""

STORED = "statistics of stored values"


def batch_norm(node: gs.Node, facts: Facts) -> str | None:
    """Scale, bias and both statistics are [C]; before opset 9 they may be [C, ..] (spatial = 0)."""
    axes = facts.of(node.inputs[0])
    if axes is None or not _couple_channels(node, facts, axes):
        return UNKNOWN_RANK
    channel = axes[1] if len(axes) > 1 else facts.algebra.fresh(1)
    facts.put(node.outputs[0], axes)
    for output in node.outputs[1:]:
        if output.name:
            facts.put(output, [channel])
    if int(node.attrs.get("training_mode", 0)) or any(output.name for output in node.outputs[1:]):
        over = [axis for axis in range(len(axes)) if axis != 1]
        if stored(node.inputs[0]):
            _train_on_stored(node, facts, over)
        else:
            _pad_data(node, facts, over)
    return None


def instance_norm(node: gs.Node, facts: Facts) -> str | None:
    """Statistics over all axes behind C, of each example alone."""
    axes = facts.of(node.inputs[0])
    if axes is None or not _couple_channels(node, facts, axes):
        return UNKNOWN_RANK
    _over(node, facts, axes, range(2, len(axes)))
    return None


def mean_variance(node: gs.Node, facts: Facts) -> str | None:
    """Statistics over the axes that the attribute names."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    _over(node, facts, axes, [int(axis) % len(axes) for axis in node.attrs.get("axes", (0, 2, 3))])
    return None


def lp_norm(node: gs.Node, facts: Facts) -> str | None:
    """A zero adds nothing to a sum of magnitudes or of squares."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    facts.put(node.outputs[0], axes)
    if stored(node.inputs[0]):
        facts.pin(node.op, node.inputs[0], axis_of(node, len(axes), -1), STORED)
    return None


def layer_norm(node: gs.Node, facts: Facts) -> str | None:
    """Statistics over all axes from `axis` on; the outputs Mean and InvStdDev have size 1 there."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    places = [place for place in (1, 2) if given(node, place) is not None]
    along = couple_trailing(node, facts, axes, places)
    if along is None:
        return UNKNOWN_RANK
    first = axis_of(node, len(axes), -1)
    facts.put(node.outputs[0], axes)
    put_statistics(node, facts, axes, first, (1, 2))
    over = range(first, len(axes))
    pin_varying(node, facts, x, over)
    whole = tuple(range(len(axes)))
    facts.patch(node, Padded(axes_of(facts, x, over), {0: whole, **along}, {0: whole}, {0: x}))
    return None


def rms_norm(node: gs.Node, facts: Facts) -> str | None:
    """Mean of squares over all axes from `axis` on; a second output is its inverse root."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None or couple_trailing(node, facts, axes, [1]) is None:
        return UNKNOWN_RANK
    first = axis_of(node, len(axes), -1)
    facts.put(node.outputs[0], axes)
    put_statistics(node, facts, axes, first, (1,))
    over = range(first, len(axes))
    pin_varying(node, facts, x, over, share_known=True)
    if stored(x):
        for axis in over:
            facts.pin(node.op, x, axis, STORED)
    facts.patch(node, mean_square_patch(node, axes_of(facts, x, over), 1, 1))
    return None


def group_norm(node: gs.Node, facts: Facts) -> str | None:
    """Statistics over the slots S of a group and all axes behind."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    groups = int(node.attrs["num_groups"])
    split = couple_groups(node, facts, 1, groups)
    if split is None:
        return "groups of an unknown number of channels"
    if not _couple_channels(node, facts, axes):
        return UNKNOWN_RANK
    facts.put(node.outputs[0], axes)
    for axis in range(2, len(axes)):
        facts.pin(node.op, x, axis, "statistics over positions", window=True)
    if stored(x):
        facts.pin(node.op, x, 1, STORED)
    facts.patch(node, _group_patch(*split))
    return None


def couple_groups(node: gs.Node, facts: Facts, axis: int, groups: int) -> tuple[Axis, Axis] | None:
    """Splits an axis of the first input into groups and the slots of each; None if its size is not known."""
    channels = facts.algebra.size(facts.axes[node.inputs[0].name][axis])
    if channels is None or channels % groups:
        return None
    slots = channels // groups
    group = facts.algebra.fresh(groups, "norm group" if slots > 1 else "")
    slot = facts.algebra.fresh(slots, "slot of each norm group" if groups > 1 else "")
    facts.couple(node, node.inputs[0], axis, facts.algebra.merge([group, slot]), f"{groups} groups")
    return group, slot


def couple_trailing(
    node: gs.Node, facts: Facts, axes: Sequence[Axis], places: Sequence[int]
) -> dict[int, tuple[int | None, ...]] | None:
    """Joins the axes of inputs with the last ones of the data; None if the rank of one is unknown.

    Returns:
        For each input, which axes of the data its own lie along; None where they have size 1.
    """
    out = {}
    for place in places:
        own = facts.of(node.inputs[place])
        if own is None or len(own) > len(axes):
            return None
        ahead = len(axes) - len(own)
        out[place] = tuple(ahead + axis if facts.algebra.size(own[axis]) != 1 else None for axis in range(len(own)))
        for axis, target in enumerate(out[place]):
            if target is not None:
                facts.couple(node, node.inputs[place], axis, axes[target])
    return out


def put_statistics(node: gs.Node, facts: Facts, axes: Sequence[Axis], first: int, places: Sequence[int]) -> None:
    """Outputs that have size 1 from axis `first` on."""
    for place in places:
        if (output := made(node, place)) is not None:
            facts.put(output, [*axes[:first], *(facts.algebra.fresh(1) for _ in axes[first:])])


def mean_square_patch(
    node: gs.Node,
    axes: Mapping[int, Axis],
    scale: int,
    statistic: int,
    *,
    epsilon: float = EPSILON,
    offset: Any | None = None,
) -> Callable[[gs.Node, Cut], None]:
    """For a norm by the mean of squares. Over `kept` of `before` indices the mean is too large by before / kept:

        x / sqrt(kept / before * mean + e) = sqrt(before / kept) * x / sqrt(mean + before / kept * e)

    Args:
        node: in the analysed graph.
        scale: the input that is the gain.
        statistic: the output that is the inverse root, where there is one.
        epsilon: what the operator takes where the attribute is left out.
        offset: a stored [D] that the operator adds to the data itself, so that no mask reaches it.
    """
    gain_type = node.inputs[scale].dtype or np.float32
    statistic_type = (node.outputs[statistic].dtype if len(node.outputs) > statistic else None) or np.float32

    def patch(node: gs.Node, cut: Cut) -> None:
        kept = shrunk(cut, axes)
        if not kept:
            return
        left = share(kept)
        hidden = 0.0
        if offset is not None:
            (one,) = kept.values()
            hidden = float(np.square(stored_values(offset)[one.removed].astype(np.float64)).sum()) / one.before
        node.attrs["epsilon"] = (float(node.attrs.get("epsilon", epsilon)) + hidden) / left
        factor = 1 / math.sqrt(left)
        values = cut.value(node, scale)
        if values is not None:
            cut.set_input(node, scale, (values.astype(np.float64) * factor).astype(values.dtype))
        else:
            cut.before(node, scale, "Mul", [np.array(factor, gain_type)])
        if made(node, statistic) is not None:
            cut.after(node, statistic, "Mul", [np.array(factor, statistic_type)])

    return patch


def _couple_channels(node: gs.Node, facts: Facts, axes: Sequence[Axis]) -> bool:
    """Joins the parameters' axes with those of the data from C on; False if the rank of one is unknown."""
    for tensor in node.inputs[1:]:
        own = facts.of(tensor)
        if own is None:
            return False
        for axis, target in zip(range(len(own)), axes[1:], strict=False):
            facts.couple(node, tensor, axis, target)
    return True


def _over(node: gs.Node, facts: Facts, axes: Sequence[Axis], over: Sequence[int]) -> None:
    """The output has the axes of the data, and the statistics over these of them stay."""
    facts.put(node.outputs[0], axes)
    _pad_data(node, facts, over)


def _pad_data(node: gs.Node, facts: Facts, over: Sequence[int]) -> None:
    """Has statistics over these axes of the first input stay when they shrink."""
    x = node.inputs[0]
    pin_varying(node, facts, x, over, share_known=can_pad_moving(facts))
    whole = tuple(range(len(facts.axes[x.name])))
    moving = frozenset(axis for axis in over if facts.varies(x, axis))
    axes = axes_of(facts, x, over)
    facts.patch(node, InPlace(axes, len(whole), Padded(axes, {0: whole}, {0: whole}, {0: x}, moving)))


def _train_on_stored(node: gs.Node, facts: Facts, over: Sequence[int]) -> None:
    """Statistics of a weight, as weight standardization takes them, become numbers when the weight shrinks."""
    x, mean = node.inputs[0], node.inputs[3]
    if any(output.outputs for output in node.outputs[1:]):
        for axis in over:
            facts.pin(node.op, x, axis, STORED)
        return
    axes = axes_of(facts, x, over)

    def patch(node: gs.Node, cut: Cut) -> None:
        if not shrunk(cut, axes):
            return
        values = stored_values(x)
        dtype = mean.dtype or values.dtype
        channels = cut.keep(x, 1)
        if channels is not None:
            values = values.take(channels, 1)
        values = values.astype(np.float64)
        cut.set_input(node, 3, values.mean(tuple(over)).astype(dtype))
        cut.set_input(node, 4, values.var(tuple(over)).astype(dtype))
        node.attrs.pop("training_mode", None)
        while len(node.outputs) > 1:
            node.outputs.pop()

    facts.patch(node, patch)


def _group_patch(group: Axis, slot: Axis) -> Callable[[gs.Node, Cut], None]:
    """Fewer groups are an attribute; for fewer slots, zeros stand in the axis of slots:

    X [N, (G, kept), ..] -> [N, G, kept, P] -> Pad -> [N, (G, S), P] -> norm -> [N, G, S, P] -> Slice -> as X
    """

    def patch(node: gs.Node, cut: Cut) -> None:
        (_, left), (before, after) = cut.size_on(group), cut.size_on(slot)
        node.attrs["num_groups"] = left
        if before == after:
            return
        x, more = node.inputs[0], {2: before - after}
        _reshape_before(node, cut, 0, [0, left, after, -1])
        pad_ends(node, cut, 0, 4, more)
        _reshape_before(node, cut, 0, [0, left * before, -1])
        for place in (1, 2):
            _reshape_before(node, cut, place, [1, left, after])
            pad_ends(node, cut, place, 3, more)
            _reshape_before(node, cut, place, [left * before])
        shape_into(cut.after(node, 0, "Reshape", [np.zeros(0, np.int64)]), cut, 1, x)
        cut_ends(node, cut, 0, {2: after})
        cut.after(node, 0, "Reshape", [np.array([0, left, before, -1], np.int64)])

    return patch


def _reshape_before(node: gs.Node, cut: Cut, place: int, shape: list[int]) -> None:
    values = cut.value(node, place)
    if values is None:
        cut.before(node, place, "Reshape", [np.array(shape, np.int64)])
    else:
        cut.set_input(node, place, values.reshape(shape))


RULES: dict[str, Rule] = {
    "BatchNormalization": batch_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "LpNormalization": lp_norm,
    "MeanVarianceNormalization": mean_variance,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
}
