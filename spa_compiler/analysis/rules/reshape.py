"""Axes regrouped: Reshape, Flatten, Squeeze, Unsqueeze, Transpose.

Reshape walks both lists of sizes from the left and closes a block wherever their products agree. Inside of a block the
input's axes are merged and dealt out anew; where a new boundary falls into a Dim, the Dim is split, everywhere:

    [B, S, D] -> [B, S, H, d]        D becomes (H, d), and so do the rows of the projection that makes it
    [N, C, H, W] -> [N, C*H*W]       one channel is a run of H*W columns

A Reshape, Transpose, Reshape that permutes one axis (a channel shuffle) does not split it: its indices are tied one to
one, and a cut puts a Gather there, so that single channels can go. Where the axis turns out to be merged, so that
single indices cannot go, the analysis runs again and splits it after all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Incompatible, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given
from spa_compiler.analysis.terms import Indices

SIZES = "sizes"


def reshape(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring."""
    x, y = node.inputs[0], node.outputs[0]
    axes = facts.of(x)
    if axes is None or y.shape is None or any(size is None for size in y.shape):
        return "reshapes to sizes that cannot be told"
    if len(node.inputs) > 1:
        if facts.entries(node.inputs[1]) is None:
            return "reshapes to sizes that cannot be told"
        facts.pin_tensor(node.op, node.inputs[1], SIZES, window=True)
    known = [facts.algebra.size(axis) for axis in axes]
    if None in known:
        return "reshapes an axis of unknown size"
    sizes = [size for size in known if size is not None]
    if y.name not in facts.split and (shuffle := _shuffle(node, sizes)):
        _permute(node, facts, axes, shuffle)
        return None
    regroup(node, facts, axes, sizes, [int(size) for size in y.shape])
    if len(node.inputs) > 1:
        if facts.value(node.inputs[1]) is None:
            facts.pin_uneven(node.op, y, range(len(y.shape)))
        facts.patch(node, lambda own, cut: cut.patch_sizes(own, 1))
    return None


def flatten(node: gs.Node, facts: Facts) -> str | None:
    """[N, C, H, W] -> [N, (C, H, W)]."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    at = int(node.attrs.get("axis", 1))
    at += len(axes) if at < 0 else 0
    empty = facts.algebra.fresh(1)
    facts.put(node.outputs[0], [facts.algebra.merge(part) if part else empty for part in (axes[:at], axes[at:])])
    return None


def squeeze(node: gs.Node, facts: Facts) -> str | None:
    """Axes of size 1 go."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    dropped = _listed(node, facts, len(axes))
    if dropped is None:
        y = node.outputs[0]
        dropped = {place for place, axis in enumerate(axes) if facts.algebra.size(axis) == 1}
        if y.shape is None or len(y.shape) != len(axes) - len(dropped):
            return "squeezes axes that cannot be told"
        facts.patch(node, lambda own, cut: _write_axes(own, cut, axes, sorted(dropped)))
    facts.put(node.outputs[0], [axis for place, axis in enumerate(axes) if place not in dropped])
    return None


def _write_axes(node: gs.Node, cut: Cut, axes: Sequence[Axis], dropped: Sequence[int]) -> None:
    """Says which axes go, as one that shrinks to a single index would go with them."""
    if all(cut.keep_on(axis) is None for axis in axes):
        return
    if cut.graph.opset < 13:
        node.attrs["axes"] = list(dropped)
    else:
        cut.set_input(node, 1, np.asarray(dropped, np.int64))


def unsqueeze(node: gs.Node, facts: Facts) -> str | None:
    """New axes of size 1."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    listed = _values(node, facts)
    if listed is None:
        return "unsqueezes axes that cannot be told"
    rank = len(axes) + len(listed)
    new = {axis % rank for axis in listed}
    rest = iter(axes)
    one = facts.algebra.fresh(1)
    facts.put(node.outputs[0], [one if place in new else next(rest) for place in range(rank)])
    return None


def transpose(node: gs.Node, facts: Facts) -> str | None:
    """Axes in the order of `perm`, reversed without it."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    perm = node.attrs.get("perm") or range(len(axes))[::-1]
    facts.put(node.outputs[0], [axes[place] for place in perm])
    return None


def _values(node: gs.Node, facts: Facts) -> list[int] | None:
    """`axes`, an attribute until opset 12 and an input since."""
    if (listed := given(node, 1)) is not None:
        facts.pin_tensor(node.op, listed, SIZES, window=True)
        value = facts.value(listed)
        return None if value is None else [int(axis) for axis in value.reshape(-1)]
    axes = node.attrs.get("axes")
    return None if axes is None else [int(axis) for axis in axes]


def _listed(node: gs.Node, facts: Facts, rank: int) -> set[int] | None:
    values = _values(node, facts)
    return None if values is None else {axis % rank for axis in values}


def regroup(node: gs.Node, facts: Facts, axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]) -> None:
    """States the axes of output 0: those of input 0, dealt out to other sizes; blocks that do not fit are pinned."""
    x, y = node.inputs[0], node.outputs[0]
    out: list[Axis] = []
    pins: list[tuple[range, range, str]] = []
    for taken, made in blocks(old, new):
        try:
            if len(taken) == len(made) == 1:
                out.append(axes[taken[0]])
            else:
                merged = facts.algebra.merge([axes[place] for place in taken] or [facts.algebra.fresh(1)])
                out += facts.algebra.factor(merged, [new[place] for place in made])
            _check_second(facts, [(x, axes, place) for place in taken] + [(y, out, place) for place in made])
        except Incompatible as error:
            out[made.start :] = [facts.algebra.fresh(new[place]) for place in made]
            pins.append((taken, made, str(error)))
    facts.put(y, out)
    for taken, made, reason in pins:
        for place in taken:
            facts.pin(node.op, x, place, reason)
        for place in made:
            facts.pin(node.op, y, place, reason)


def _check_second(facts: Facts, places: Sequence[tuple[Any, Sequence[Axis], int]]) -> None:
    """Sizes that fit together in the first binding may do so by chance: in the second one they have to, too.

    Args:
        places: of one block, tensors, their axes and which of them.
    """
    if not any(facts.varies(tensor, place) for tensor, _, place in places):
        return
    sized = [
        (axes[place], size)
        for tensor, axes, place in places
        if (size := (facts.settled.second.get(tensor.name) or (None,) * len(axes))[place]) is not None
    ]
    for axis, size in sized:
        facts.algebra.note_second(axis, size)
    for axis, size in sized:
        if facts.algebra.second(axis) not in (size, None):
            raise Incompatible("sizes that fit for some inputs alone")


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Both lists of sizes, of one product, cut wherever their running products agree."""
    out = []
    start, i, j, left, right = (0, 0), 0, 0, 1, 1
    while i < len(old) or j < len(new):
        if (left <= right and i < len(old)) or j == len(new):
            left *= old[i]
            i += 1
        else:
            right *= new[j]
            j += 1
        if left == right and i > start[0] and j > start[1]:
            out.append((range(start[0], i), range(start[1], j)))
            start = i, j
            left = right = 1
    if start != (i, j):
        if not out:
            return [(range(i), range(j))]
        last = out.pop()
        out.append((range(last[0].start, i), range(last[1].start, j)))  # axes of size 1 at the end
    return out


@dataclass(frozen=True)
class _Shuffle:
    axis: int
    order: Indices  # output index k takes input index order[k]
    transpose: gs.Node
    last: gs.Node


def _shuffle(node: gs.Node, sizes: Sequence[int]) -> _Shuffle | None:
    """The permutation of one axis that this Reshape starts, if it starts one."""
    y = node.outputs[0]
    turn = _only_user(y, "Transpose")
    last = None if turn is None else (_only_user(turn.outputs[0], "Reshape") or _only_user(turn.outputs[0], "Flatten"))
    if turn is None or last is None or last.outputs[0].shape is None or list(last.outputs[0].shape) != list(sizes):
        return None
    shape, extra = [int(size) for size in y.shape], len(y.shape) - len(sizes)
    perm = [int(place) for place in turn.attrs.get("perm") or range(len(shape))[::-1]]
    for axis in range(len(sizes)) if extra > 0 else ():
        stop = axis + extra + 1
        inner = perm[axis:stop]
        if (
            shape[:axis] == list(sizes[:axis])
            and shape[stop:] == list(sizes[axis + 1 :])
            and sorted(inner) == list(range(axis, stop))
            and inner != sorted(inner)
            and perm[:axis] == list(range(axis))
            and perm[stop:] == list(range(stop, len(shape)))
        ):
            indices = np.arange(sizes[axis], dtype=np.int64).reshape(shape[axis:stop])
            order = indices.transpose([place - axis for place in inner]).reshape(-1)
            return _Shuffle(axis, order, turn, last)
    return None


def _only_user(tensor: gs.Tensor, op: str) -> gs.Node | None:
    users = tensor.outputs
    return users[0] if len(users) == 1 and users[0].op == op and not users[0].domain else None


def _permute(node: gs.Node, facts: Facts, axes: Sequence[Axis], shuffle: _Shuffle) -> None:
    """States the axes of the permuted result now; on the way there the permuted axis is nothing that could shrink."""
    result = list(axes)
    result[shuffle.axis] = facts.algebra.fresh(shuffle.order.size)
    whole = np.arange(shuffle.order.size)
    facts.algebra.tie(axes[shuffle.axis], shuffle.order, result[shuffle.axis], whole, node.outputs[0].name)
    facts.put(shuffle.last.outputs[0], result)
    source, target, axis = node.inputs[0].name, shuffle.last.outputs[0].name, shuffle.axis
    inside = range(axis, axis + len(node.outputs[0].shape) - len(axes) + 1)
    for tensor in (node.outputs[0], shuffle.transpose.outputs[0]):
        factors = [facts.algebra.fresh(tensor.shape[place]) for place in inside]
        facts.put(tensor, [*axes[:axis], *factors, *axes[axis + 1 :]])
        for place in inside:
            facts.pin(node.op, tensor, place, "inside of a permutation", window=True)

    def gather(own: gs.Node, cut: Cut) -> None:
        kept, made = cut.keep(source, axis), cut.keep(target, axis)
        turn = own.outputs[0].outputs[0]
        last = turn.outputs[0].outputs[0]
        if kept is None or made is None:
            for reshape_ in (own, last):
                if reshape_.op == "Reshape":
                    cut.patch_sizes(reshape_, 1)
            return
        indices = np.searchsorted(kept, shuffle.order[made])
        result = last.outputs[0]
        last.outputs.clear()
        turn.outputs.clear()
        single = gs.Node("Gather", cut.free_name(f"{result.name}_shuffle"), {"axis": axis})
        single.inputs = [own.inputs[0], cut.constant(indices, f"{result.name}_order")]
        single.outputs = [result]
        own.outputs.clear()
        for gone in (turn, last):
            gone.inputs.clear()
            cut.replace(gone, [])
        own.inputs.clear()
        cut.replace(own, [single])

    facts.patch(node, gather)


def _stated(rule: Rule) -> Rule:
    """Leaves a node alone whose output has been stated already, by the permutation that it is part of."""

    def wrapped(node: gs.Node, facts: Facts) -> str | None:
        if node.outputs[0].name not in facts.axes:
            return rule(node, facts)
        for tensor in itertools.islice(node.inputs, 1, None):
            facts.pin_tensor(node.op, tensor, SIZES, window=True)
        return None

    return wrapped


RULES: dict[str, Rule] = {
    "Flatten": _stated(flatten),
    "Reshape": _stated(reshape),
    "Squeeze": squeeze,
    "Transpose": _stated(transpose),
    "Unsqueeze": unsqueeze,
}
