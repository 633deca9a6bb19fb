"""Exact statistics over axes that shrink.

The masked model counts a removed index as a zero. So does the cut one: zeros are put behind what is left of an axis,
the operator runs on the old size, and what it makes of them is cut off again:

    x [.., kept] -> Pad -> [.., before] -> operator -> [.., before] -> Slice -> [.., kept]

Where the operator reads stored values, no mask comes between, so the removed ones themselves stand there, not zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Array, Facts
from spa_compiler.analysis.rules.inputs import made, stored, stored_values
from spa_compiler.analysis.terms import Axis, Indices

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

Places: TypeAlias = Mapping[int, Sequence[int | None]]
"""Number of an input or output -> for each of its axes the one of the data that lies along it; None: it has size 1."""

VARIES = "statistics over an axis whose size varies"

PAD_INPUTS_SINCE = 11
"""The opset from which Pad takes its amounts as inputs."""

SLICE_INPUTS_SINCE = 10
"""The same of Slice."""


@dataclass(frozen=True)
class Kept:
    """Which indices of an axis stay, ascending, out of `before`."""

    before: int
    keep: Indices

    @property
    def after(self) -> int:
        """How many stay."""
        return len(self.keep)

    @property
    def removed(self) -> Indices:
        """Which indices go."""
        return np.setdiff1d(np.arange(self.before), self.keep)


def axes_of(facts: Facts, tensor: Any, places: Iterable[int]) -> dict[int, Axis]:
    """The given axes of a tensor."""
    return {place: facts.axes[tensor.name][place] for place in places}


def shrunk(cut: Cut, axes: Mapping[int, Axis]) -> dict[int, Kept]:
    """Those of the axes that lost indices; none where statistics are to be those of what is left."""
    if cut.statistics == "kept":
        return {}
    out = {}
    for place, axis in axes.items():
        keep = cut.keep_on(axis)
        if keep is not None:
            out[place] = Kept(cut.size_on(axis)[0], keep)
    return out


def share(kept: Mapping[int, Kept]) -> float:
    """How much is left of the product of the axes."""
    return math.prod(one.after / one.before for one in kept.values())


def pin_varying(node: gs.Node, facts: Facts, tensor: Any, axes: Sequence[int], *, share_known: bool = False) -> None:
    """Pins those of the axes whose size varies.

    Args:
        share_known: it is enough to know which share of an axis goes; so it is but where a sum varies.
    """
    for axis in axes:
        is_sum = len(facts.algebra.resolve(facts.axes[tensor.name][axis])) > 1
        if facts.varies(tensor, axis) and (is_sum or not share_known):
            facts.pin(node.op, tensor, axis, VARIES)


def can_pad_moving(facts: Facts) -> bool:
    """Whether Pad may take sizes that are computed in the graph."""
    return facts.opset >= PAD_INPUTS_SINCE


@dataclass(frozen=True)
class Padded:
    """The patch.

    Args:
        axes: of the data, those that its statistics are taken over.
        inputs: where the data's axes lie in the inputs.
        outputs: and in the outputs.
        data: those inputs, by number, that are data: where they are stored they are read without a mask.
        moving: those of `axes` whose size varies from run to run; input 0 and output 0 alone have them.
    """

    axes: Mapping[int, Axis]
    inputs: Places
    outputs: Places
    data: Mapping[int, Any]
    moving: frozenset[int] = frozenset()

    def __call__(self, node: gs.Node, cut: Cut) -> None:
        """Puts the operators around the node."""
        kept = shrunk(cut, self.axes)
        if self.moving & kept.keys():
            _pad_moving(node, cut, len(self.inputs[0]), kept)
            return
        for place, along in self.inputs.items():
            here = _along(along, kept)
            if here and place in self.data and stored(self.data[place]):
                cut.set_input(node, place, _whole(self.data[place], here, cut))
            elif here:
                more = {axis: one.before - one.after for axis, one in here.items()}
                pad_ends(node, cut, place, len(along), more)
        for place, along in self.outputs.items():
            here = _along(along, kept)
            if here and made(node, place) is not None:
                cut_ends(node, cut, place, {axis: one.after for axis, one in here.items()})


def pad_ends(node: gs.Node, cut: Cut, place: int, rank: int, more: Mapping[int, int]) -> None:
    """Puts zeros behind input `place`: `more` by axis."""
    counts = [more.get(axis, 0) for axis in range(rank)]
    values = cut.value(node, place)
    if values is not None:
        cut.set_input(node, place, np.pad(values, [(0, count) for count in counts]))
    elif cut.graph.opset >= PAD_INPUTS_SINCE:
        cut.before(node, place, "Pad", [np.array([0] * rank + counts, np.int64)])
    else:
        cut.before(node, place, "Pad", [], {"pads": [0] * rank + counts})


def cut_ends(node: gs.Node, cut: Cut, place: int, left: Mapping[int, int]) -> None:
    """Leaves the first `left` indices, by axis, of output `place`."""
    starts, ends, axes = [0] * len(left), list(left.values()), list(left)
    if cut.graph.opset >= SLICE_INPUTS_SINCE:
        cut.after(node, place, "Slice", [np.array(values, np.int64) for values in (starts, ends, axes)])
    else:
        cut.after(node, place, "Slice", [], {"starts": starts, "ends": ends, "axes": axes})


def shape_into(node: gs.Node, cut: Cut, place: int, tensor: Any) -> Any:
    """Has input `place` of a node that was put in be the shape of a tensor; returns that."""
    node.inputs[place] = tensor
    (shape,) = cut.before(node, place, "Shape", []).outputs
    shape.dtype = np.dtype(np.int64)
    return shape


def _along(along: Sequence[int | None], kept: Mapping[int, Kept]) -> dict[int, Kept]:
    return {own: kept[axis] for own, axis in enumerate(along) if axis is not None and axis in kept}


def _whole(tensor: Any, kept: Mapping[int, Kept], cut: Cut) -> Array:
    """The stored values as they were along the given axes, those that stay first."""
    values = stored_values(tensor)
    for axis in range(values.ndim):
        keep = cut.keep(tensor, axis)
        if axis in kept:
            keep = np.concatenate([kept[axis].keep, kept[axis].removed])
        if keep is not None:
            values = values.take(keep, axis)
    return values


def _pad_moving(node: gs.Node, cut: Cut, rank: int, kept: Mapping[int, Kept]) -> None:
    """As `Padded`, with sizes computed in the graph: what is left of an axis is a fixed share of it."""
    lost = [kept[axis].before - kept[axis].after if axis in kept else 0 for axis in range(rank)]
    left = [kept[axis].after if axis in kept else 1 for axis in range(rank)]
    x = node.inputs[0]
    pad = cut.before(node, 0, "Pad", [np.zeros(2 * rank, np.int64)])
    shape = shape_into(pad, cut, 1, x)
    cut.before(pad, 1, "Tile", [np.array([2], np.int64)])
    cut.before(pad, 1, "Mul", [np.array([0] * rank + lost, np.int64)])
    cut.before(pad, 1, "Div", [np.array([1] * rank + left, np.int64)])
    cut.after(node, 0, "Slice", [np.zeros(rank, np.int64), np.zeros(rank, np.int64)]).inputs[2] = shape
