"""Parts chosen from axes: Slice, Gather.

Slice    [A + B + C] -> [B]            with a step s that fits: [(N, s)] -> [N]; else index by index
Gather   runs of indices are pieces as in Slice, what is left is tied index by index; indices that are computed
         when the model runs pin what they select from
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Array, Axis, Facts, Incompatible, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import axis_of, given, pin_window
from spa_compiler.analysis.rules.padding import SLICE_INPUTS_SINCE
from spa_compiler.analysis.rules.pieces import VARIES
from spa_compiler.analysis.rules.reshape import SIZES, regroup
from spa_compiler.analysis.terms import Indices

_END = 2**31 - 1
_RUNS = 32  # more runs of consecutive indices than this are no pieces but a permutation
_LONE = 16  # at most one index in so many may become a piece of its own, which can no longer go


@dataclass(frozen=True)
class _Cutout:
    """What Slice takes of one axis; `indices` is None where that is known only when the model runs, `is_all` says that
    it takes all of an axis of any size.
    """

    axis: int
    indices: Indices | None
    step: int
    is_all: bool


@dataclass(frozen=True)
class _Ranges:
    """Slice's operands, as far as they are the same for every input."""

    starts: Array
    ends: Array
    axes: list[int]
    steps: Array
    fixed: Array
    dtype: np.dtype[Any]

    def cutouts(self, sizes: Sequence[int | None]) -> list[_Cutout]:
        return [self._cutout(place, axis, sizes[axis]) for place, axis in enumerate(self.axes)]

    def _cutout(self, place: int, axis: int, size: int | None) -> _Cutout:
        start, end, step = (int(part[place]) for part in (self.starts, self.ends, self.steps))
        if size is None or not self.fixed[place]:
            return _Cutout(axis, None, step, False)
        is_all = start == 0 and end >= _END and step == 1
        return _Cutout(axis, np.arange(size, dtype=np.int64)[start:end:step], step, is_all)


def slice_(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring."""
    x, y = node.inputs[0], node.outputs[0]
    axes = facts.of(x)
    for place in range(1, 5):
        pin_window(node, facts, given(node, place), SIZES)
    if axes is None or y.shape is None or len(y.shape) != len(axes):
        return UNKNOWN_RANK
    ranges = _ranges(node, facts, len(axes))
    if ranges is None:
        return "sliced at run time"
    out = list(axes)
    moved: list[tuple[int, Indices]] = []
    pinned = []
    for cutout in ranges.cutouts([facts.algebra.size(axis) for axis in axes]):
        own, indices = axes[cutout.axis], cutout.indices
        if indices is None or not indices.size or (facts.is_mixed(x, cutout.axis) and not cutout.is_all):
            out[cutout.axis] = facts.algebra.fresh(y.shape[cutout.axis])
            pinned.append(cutout.axis)
        elif indices.size != facts.algebra.size(own) or cutout.step != 1:
            out[cutout.axis] = _taken(node, facts, own, cutout, indices)
            moved.append((cutout.axis, indices))
    facts.put(y, out)
    for axis in pinned:
        facts.pin(node.op, x, axis, "sliced at run time")
        facts.pin(node.op, y, axis, "sliced at run time", window=True)
    _patch_selection(node, facts, ranges, axes, out, moved)
    return None


def _taken(node: gs.Node, facts: Facts, axis: Axis, cutout: _Cutout, indices: Indices) -> Axis:
    size = facts.algebra.size(axis) or 0
    first = int(indices[0])
    if cutout.step > 1 and size % cutout.step == 0 and indices.size * cutout.step == size:
        try:
            outer, inner = facts.algebra.factor(axis, [size // cutout.step, cutout.step])
        except Incompatible:
            pass
        else:
            facts.pin_axis(node.op, node.inputs[0], inner, "selected by Slice", cutout.axis, [first])
            return outer
    return select(facts, axis, indices)


def select(facts: Facts, axis: Axis, indices: Indices) -> Axis:
    """The axis that has these indices of another one: as pieces where they are few runs, else tied one by one."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = np.split(indices, breaks)
    size = facts.algebra.size(axis) or 0
    cuts = sorted({0, size, *(int(run[0]) for run in runs), *(int(run[-1]) + 1 for run in runs)})
    sizes = [high - low for low, high in itertools.pairwise(cuts)]
    if len(runs) <= _RUNS and indices.size > 1 and sizes.count(1) * _LONE <= size:
        try:
            parts = facts.algebra.split(axis, sizes)
        except Incompatible:
            pass
        else:
            taken = [
                part
                for run in runs
                for part, (low, high) in zip(parts, itertools.pairwise(cuts), strict=True)
                if run[0] <= low and high <= run[-1] + 1
            ]
            return facts.algebra.concat(taken)
    out = facts.algebra.fresh(indices.size)
    facts.algebra.tie(axis, indices, out, np.arange(indices.size))
    return out


def _patch_selection(
    node: gs.Node,
    facts: Facts,
    ranges: _Ranges,
    before: Sequence[Axis],
    after: Sequence[Axis],
    moved: Sequence[tuple[int, Indices]],
) -> None:
    """A Slice whose axes shrank takes what is left of its indices, through a Gather where they are no range now."""

    def patch(own: gs.Node, cut: Cut) -> None:
        starts, ends, steps = ranges.starts.copy(), ranges.ends.copy(), ranges.steps.copy()
        changed = False
        for axis, indices in moved:
            kept, made = cut.keep_on(before[axis]), cut.keep_on(after[axis])
            if kept is None and made is None:
                continue
            left = indices if made is None else indices[made]
            now = left if kept is None else np.searchsorted(kept, left)
            place, changed = ranges.axes.index(axis), True
            if now.size and (np.diff(now) == 1).all():
                starts[place], ends[place], steps[place] = now[0], now[-1] + 1, 1
            else:
                starts[place], ends[place], steps[place] = 0, _END, 1
                cut.after(own, 0, "Gather", [now.astype(np.int64)], {"axis": axis})
        if changed:
            _write(own, cut, ranges, starts, ends, steps)

    facts.patch(node, patch)


def _write(node: gs.Node, cut: Cut, ranges: _Ranges, starts: Array, ends: Array, steps: Array) -> None:
    if cut.graph.opset < SLICE_INPUTS_SINCE:
        node.attrs |= {"starts": starts.tolist(), "ends": ends.tolist(), "axes": ranges.axes}
        return
    if not ranges.fixed.all():  # what is computed stays computed; such Slices have their own axes, see `slice_`
        _write_some(node, cut, ranges, starts, ends, steps)
        return
    for place, values in enumerate((starts, ends, np.asarray(ranges.axes), steps)):
        cut.set_input(node, place + 1, np.asarray(values, np.int64))


def _write_some(node: gs.Node, cut: Cut, ranges: _Ranges, starts: Array, ends: Array, steps: Array) -> None:
    """Entries that are the same for every input are written, the others go on coming from the graph."""
    for place, values in ((1, starts), (2, ends)):
        cut.before(node, place, "Mul", [np.where(ranges.fixed, 0, 1).astype(ranges.dtype)])
        cut.before(node, place, "Add", [np.where(ranges.fixed, values, 0).astype(ranges.dtype)])
    if given(node, 4) is not None:
        cut.set_input(node, 4, steps.astype(ranges.dtype))


def _ranges(node: gs.Node, facts: Facts, rank: int) -> _Ranges | None:
    if "starts" in node.attrs:
        starts, ends = (np.asarray(node.attrs[name], np.int64) for name in ("starts", "ends"))
        listed = node.attrs.get("axes") or range(starts.size)
        ones = np.ones(starts.size, np.int64)
        return _Ranges(starts, ends, [int(axis) % rank for axis in listed], ones, ones.astype(np.bool_), starts.dtype)
    found = [None if given(node, place) is None else facts.entries(node.inputs[place]) for place in range(5)]
    if any(given(node, place) is not None and found[place] is None for place in range(1, 5)):
        return None
    if found[1] is None or found[2] is None:
        return None
    count = found[1][0].size
    axes = found[3] or (np.arange(count), np.ones(count, np.bool_))
    steps = found[4] or (np.ones(count, np.int64), np.ones(count, np.bool_))
    if not axes[1].all():
        return None
    fixed = found[1][1] & found[2][1] & steps[1]
    starts, ends, strides = (np.asarray(part[0], np.int64) for part in (found[1], found[2], steps))
    return _Ranges(starts, ends, [int(axis) % rank for axis in axes[0]], strides, fixed, found[1][0].dtype)


def gather(node: gs.Node, facts: Facts) -> str | None:
    """data[.., n, ..] at indices [..]: the indices' axes stand where the axis was."""
    x, indices = node.inputs[:2]
    axes, own = facts.of(x), facts.of(indices)
    if axes is None or own is None:
        return UNKNOWN_RANK
    at = axis_of(node, len(axes), 0)
    if _is_view(node, facts):
        _view(node, facts, axes)
        return None
    value = facts.value(indices)
    size = facts.algebra.size(axes[at])
    mixed = facts.is_mixed(x, at)
    if value is None or size is None or value.ndim > 1 or mixed:
        facts.put(node.outputs[0], [*axes[:at], *own, *axes[at + 1 :]])
        why = "selected by indices that are computed" if value is None else "selected by a table"
        facts.pin(node.op, x, at, VARIES if mixed else why)
        if mixed and value is not None and value.ndim <= 1:
            facts.pin_tensor(node.op, indices, "indices", window=True)
        return None
    facts.pin_tensor(node.op, indices, "indices", window=True)
    chosen = np.asarray(value, np.int64) % size
    if chosen.ndim == 0:
        facts.put(node.outputs[0], [*axes[:at], *axes[at + 1 :]])
        facts.pin(node.op, x, at, "selected by Gather", indices=[int(chosen)])
        selected: Axis | None = None
    else:
        whole = chosen.size == size and (chosen == np.arange(size)).all()
        selected = axes[at] if whole else select(facts, axes[at], chosen)
        facts.put(node.outputs[0], [*axes[:at], selected, *axes[at + 1 :]])

    def patch(node_: gs.Node, cut: Cut) -> None:
        kept = cut.keep_on(axes[at])
        made = None if selected is None else cut.keep_on(selected)
        if kept is None and made is None:
            return
        left = chosen if made is None else chosen[made]
        now = left if kept is None else np.searchsorted(kept, left)
        cut.set_input(node_, 1, np.asarray(now, np.int64))

    facts.patch(node, patch)
    return None


def _is_view(node: gs.Node, facts: Facts) -> bool:
    """Whether it takes all elements of a vector in order, as exporters write a view of a contiguous tensor."""
    x, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if indices.name not in facts.settled.counting or len(facts.axes[x.name]) != 1 or y.shape is None:
        return False
    moving = sum(facts.varies(y, axis) for axis in range(len(y.shape)))
    return moving <= 1 and None not in y.shape and facts.algebra.size(facts.axes[x.name][0]) == math.prod(y.shape)


def _view(node: gs.Node, facts: Facts, axes: Sequence[Axis]) -> None:
    """As Reshape, and when an axis shrinks it becomes one."""
    y = node.outputs[0]
    facts.pin_tensor(node.op, node.inputs[1], "indices", window=True)
    regroup(node, facts, axes, [math.prod(y.shape)], y.shape)
    made = facts.axes[y.name]
    open_ = [facts.varies(y, axis) for axis in range(len(made))]

    def patch(own: gs.Node, cut: Cut) -> None:
        if all(cut.keep_on(axis) is None for axis in made):
            return
        target = [-1 if free else cut.size_on(axis)[1] for axis, free in zip(made, open_, strict=True)]
        own.op, own.attrs = "Reshape", {}
        cut.set_input(own, 1, np.asarray(target, np.int64))

    facts.patch(node, patch)


RULES: dict[str, Rule] = {"Gather": gather, "Slice": slice_}
