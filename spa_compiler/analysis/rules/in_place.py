"""Exact statistics with the zeros where they were.

As in `padding`, but the zeros go back to the places of what was removed. A sum over tens of thousands of elements
rounds differently when their order changes, by more than what ONNX Runtime's own optimizations do to it; with every
element in its old place the operator computes the very numbers of the masked model.

What goes from the axis are whole blocks (a channel's H * W positions), so blocks are what is moved:

    x [.., k * b] -> Reshape [.., k, b] -> Pad one block of zeros -> Gather [.., n, b] -> Reshape [.., n * b]
      -> operator -> Reshape [.., n, b] -> Gather [.., k, b] -> Reshape [.., k * b]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis
from spa_compiler.analysis.rules.inputs import stored
from spa_compiler.analysis.rules.padding import PAD_INPUTS_SINCE, Kept, Padded, shrunk

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut


@dataclass(frozen=True)
class InPlace:
    """The patch: for the last axis of input 0 and output 0 where it is the only one to shrink, else `otherwise`."""

    axes: Mapping[int, Axis]
    rank: int
    otherwise: Padded

    def __call__(self, node: gs.Node, cut: Cut) -> None:
        """Puts the operators around the node."""
        kept = shrunk(cut, self.axes)
        last = self.rank - 1
        is_simple = set(kept) == {last} and not self.otherwise.moving and not stored(node.inputs[0])
        if not is_simple or cut.graph.opset < PAD_INPUTS_SINCE:
            self.otherwise(node, cut)
            return
        _restore(node, cut, last, kept[last])


def _restore(node: gs.Node, cut: Cut, axis: int, kept: Kept) -> None:
    block = _block(kept)
    count, keep = kept.before // block, kept.keep[::block] // block
    left = len(keep)
    places = np.full(count, left, np.int64)  # index `left` is the block of zeros
    places[keep] = np.arange(left)
    open_, closed = [0] * axis + [left, block], [0] * axis + [-1]
    rank = axis + 2
    cut.before(node, 0, "Reshape", [np.asarray(open_, np.int64)])
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + axis] = 1
    cut.before(node, 0, "Pad", [pads])
    cut.before(node, 0, "Gather", [places], {"axis": axis})
    cut.before(node, 0, "Reshape", [np.asarray(closed, np.int64)])
    open_[axis] = count
    cut.after(node, 0, "Reshape", [np.asarray(closed, np.int64)])
    cut.after(node, 0, "Gather", [keep.astype(np.int64)], {"axis": axis})
    cut.after(node, 0, "Reshape", [np.asarray(open_, np.int64)])


def _block(kept: Kept) -> int:
    """The largest block of which whole ones stay or go."""
    stays = np.zeros(kept.before, np.bool_)
    stays[kept.keep] = True
    edges = np.flatnonzero(np.diff(stays)) + 1
    return math.gcd(kept.before, *edges.tolist())
