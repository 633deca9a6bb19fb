"""Where the boxes of a drawing go: layers by longest path, order by barycentres, places by least squares.

A tensor that passes several layers on its way has a *bend* in each of them, one for all of its readers, so that it is
drawn as one line that branches. Bends take part in ordering and placing like very narrow boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

GAP_X, GAP_Y = 16.0, 36.0
_BEND_WIDTH = 4.0
_SWEEPS = 8
_STRAIGHT = 8.0
"""How much more a line that passes through a layer resists a kink than one that ends there."""
_HOME = 0.05
"""Pull of the middle on every box, or a deep graph would drift to the side on which its residual lines are."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Net:
    """A tensor: the box that makes it, and the boxes that read it, each once."""

    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Top left corners of the boxes; for each net its pieces, from the top down; and the size of it all.

    A piece with one x is the straight way through a layer, others cross the gap between two layers.
    """

    corners: tuple[Point, ...]
    lines: tuple[tuple[tuple[Point, Point], ...], ...]
    width: float
    height: float


def place(sizes: Sequence[tuple[float, float]], nets: Sequence[Net]) -> Layout:
    """Places boxes of the given widths and heights.

    Args:
        nets: they must make no cycle.
    """
    if not sizes:
        return Layout((), tuple(() for _ in nets), 0.0, 0.0)
    layer = _layers(len(sizes), nets)
    bends = _Bends(layer, nets)
    widths = [width for width, _ in sizes] + [_BEND_WIDTH] * (len(bends.layer) - len(sizes))
    rows = _ordered(bends)
    centres = _centred(rows, bends, widths, len(sizes))
    left = min(centre - width / 2 for centre, width in zip(centres, widths, strict=True))
    centres = [centre - left for centre in centres]
    tops, bottoms, y = [], [], 0.0
    for row in rows:
        tops.append(y)
        bottoms.append(y + max((sizes[item][1] for item in row if item < len(sizes)), default=0.0))
        y = bottoms[-1] + GAP_Y
    corners = [(centres[box] - width / 2, tops[layer[box]]) for box, (width, _) in enumerate(sizes)]
    lines = []
    for steps in bends.steps:
        pieces = [
            ((centres[item], tops[bends.layer[item]]), (centres[item], bottoms[bends.layer[item]]))
            for item in dict.fromkeys(end for step in steps for end in step)
            if item >= len(sizes)
        ]
        for start, end in steps:
            low = bottoms[bends.layer[start]] if start >= len(sizes) else corners[start][1] + sizes[start][1]
            pieces.append(((centres[start], low), (centres[end], tops[bends.layer[end]])))
        lines.append(tuple(pieces))
    width = max(centre + width / 2 for centre, width in zip(centres, widths, strict=True))
    return Layout(tuple(corners), tuple(lines), width, bottoms[-1])


def _layers(count: int, nets: Sequence[Net]) -> list[int]:
    """Longest path from the top; a box that reads nothing moves down to right above its first reader."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from((net.source, target) for net in nets for target in net.targets)
    out = [0] * count
    for number, generation in enumerate(nx.topological_generations(graph)):
        for box in generation:
            out[box] = number
    for box in range(count):
        if not graph.in_degree(box) and graph.out_degree(box):
            out[box] = min(out[reader] for reader in graph.successors(box)) - 1
    lowest = min(out)
    return [number - lowest for number in out]


class _Bends:
    """Boxes and bends: the layer of each, its neighbours one layer up and down, and the steps of each net."""

    def __init__(self, layer: Sequence[int], nets: Iterable[Net]) -> None:
        self.layer = list(layer)
        self.steps: list[list[tuple[int, int]]] = []
        for net in nets:
            last = max((layer[target] for target in net.targets), default=0)
            way = [net.source]
            for number in range(layer[net.source] + 1, last):
                way.append(len(self.layer))
                self.layer.append(number)
            ends = [(way[layer[target] - 1 - layer[net.source]], target) for target in net.targets]
            self.steps.append([*pairwise(way), *ends])
        self.up: list[list[int]] = [[] for _ in self.layer]
        self.down: list[list[int]] = [[] for _ in self.layer]
        for start, end in (step for steps in self.steps for step in steps):
            self.down[start].append(end)
            self.up[end].append(start)


def _ordered(bends: _Bends) -> list[list[int]]:
    """The layers, each from left to right: swept down and up, every item goes to the mean place of its neighbours."""
    rows: list[list[int]] = [[] for _ in range(max(bends.layer) + 1)]
    for item in _depth_first(bends):
        rows[bends.layer[item]].append(item)
    place = [0.0] * len(bends.layer)
    for sweep in range(_SWEEPS):
        near = bends.down if sweep % 2 else bends.up
        for row in reversed(rows) if sweep % 2 else rows:
            mean = {item: sum(place[other] for other in near[item]) / (len(near[item]) or 1) for item in row}
            mean.update({item: place[item] for item in row if not near[item]})
            if sweep:
                row.sort(key=mean.__getitem__)
            for number, item in enumerate(row):
                place[item] = (number + 0.5) / len(row)  # layers of different lengths compare by their shares
    return rows


def _depth_first(bends: _Bends) -> list[int]:
    """All items, branch by branch, so that what hangs together starts out side by side."""
    seen: set[int] = set()
    out = []
    for root in sorted(range(len(bends.layer)), key=bends.layer.__getitem__):
        stack = [root]
        while stack:
            item = stack.pop()
            if item not in seen:
                seen.add(item)
                out.append(item)
                stack.extend(reversed(bends.down[item]))
    return out


def _centred(rows: Sequence[Sequence[int]], bends: _Bends, widths: Sequence[float], boxes: int) -> list[float]:
    """The x of every centre: as near to the neighbours' mean as the order and the gaps allow, layer by layer."""
    centres = [0.0] * len(widths)
    for row in rows:
        x = (GAP_X - sum(widths[item] + GAP_X for item in row)) / 2
        for item in row:
            centres[item] = x + widths[item] / 2
            x += widths[item] + GAP_X

    def pull(item: int, other: int) -> float:
        return _STRAIGHT if item >= boxes and other >= boxes else 1.0

    for sweep in range(_SWEEPS + 1):
        for row in reversed(rows) if sweep % 2 else rows:
            wanted, weights = [], []
            for item in row:
                near = bends.down[item] if sweep % 2 else bends.up[item]
                near = near or [*bends.up[item], *bends.down[item]]
                pulls = [pull(item, other) for other in near]
                weights.append(sum(pulls) + (_HOME if item < boxes else 0.0))
                wanted.append(sum(p * centres[other] for p, other in zip(pulls, near, strict=True)) / weights[-1])
            gaps = [(widths[left] + widths[right]) / 2 + GAP_X for left, right in pairwise(row)]
            for item, x in zip(row, _apart(wanted, weights, gaps), strict=True):
                centres[item] = x
    return centres


def _apart(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The places nearest to those wanted (weighted squares) that keep the order and the gaps: isotonic regression."""
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for want, weight, offset in zip(wanted, weights, offsets, strict=False):
        block = (want - offset, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, heavy, count = blocks.pop()
            both = heavy + block[1]
            block = ((mean * heavy + block[0] * block[1]) / both, both, count + block[2])
        blocks.append(block)
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]
