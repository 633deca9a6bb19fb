"""Boxes do not overlap, lines run from box to box and downwards, and large graphs take seconds at most."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from spa_compiler.analysis.layout import GAP_X, Layout, Net, place


def random_graph(seed: int, count: int) -> tuple[list[tuple[float, float]], list[Net]]:
    rng = np.random.default_rng(seed)
    sizes = [(float(rng.integers(20, 200)), float(rng.integers(20, 60))) for _ in range(count)]
    nets = []
    for source in range(count - 1):
        reach = min(count, source + int(rng.choice([3, 8, count])))
        targets = rng.integers(source + 1, reach, size=int(rng.integers(0, 4))) if reach > source + 1 else []
        nets.append(Net(source, tuple(dict.fromkeys(int(target) for target in targets))))
    return sizes, nets


def check(layout: Layout, sizes: list[tuple[float, float]], nets: list[Net]) -> None:
    boxes = list(zip(layout.corners, sizes, strict=True))
    for (x, y), (width, height) in boxes:
        assert x >= -1e-6
        assert x + width <= layout.width + 1e-6
        assert y >= 0
        assert y + height <= layout.height
    for ((x, y), (width, height)), ((x2, y2), (width2, height2)) in combinations(boxes, 2):
        apart = x + width <= x2 + 1e-6 or x2 + width2 <= x + 1e-6 or y + height <= y2 or y2 + height2 <= y
        assert apart
        if y == y2:
            assert max(x2 - x - width, x - x2 - width2) >= GAP_X - 1e-6
    for net, pieces in zip(nets, layout.lines, strict=True):
        (x, y), (width, height) = boxes[net.source]
        reached = {(x + width / 2, y + height)}
        for start, end in sorted(pieces, key=lambda piece: (piece[0][1], piece[1][1])):
            assert start[1] <= end[1]
            assert start in reached
            reached.add(end)
        for target in net.targets:
            (x, y), (width, _) = boxes[target]
            assert (x + width / 2, y) in reached


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed: int) -> None:
    sizes, nets = random_graph(seed, 40)
    check(place(sizes, nets), sizes, nets)


def test_a_chain_is_a_straight_line() -> None:
    layout = place([(30, 20), (90, 20), (10, 20)], [Net(0, (1,)), Net(1, (2,)), Net(2, ())])
    centres = {x + width / 2 for (x, _), width in zip(layout.corners, (30, 90, 10), strict=True)}
    assert centres == {45.0}
    assert [y for _, y in layout.corners] == sorted({y for _, y in layout.corners})


def test_a_line_that_passes_layers_is_drawn_beside_the_boxes_and_once() -> None:
    sizes = [(60.0, 20.0)] * 4
    nets = [Net(0, (1, 3, 2)), Net(1, (2,)), Net(2, (3,)), Net(3, ())]
    layout = place(sizes, nets)
    check(layout, sizes, nets)
    bends = [piece for piece in layout.lines[0] if piece[0][0] == piece[1][0] and piece[1][1] - piece[0][1] == 20]
    assert len(bends) == 2
    for (x, top), _ in bends:
        left = next(left for left, y in layout.corners if y == top)
        assert not left - 1 < x < left + 61


def test_what_reads_nothing_stands_above_its_reader() -> None:
    layout = place([(10, 10)] * 4, [Net(0, (1,)), Net(1, (2,)), Net(3, (2,)), Net(2, ())])
    assert layout.corners[3][1] == layout.corners[1][1]


def test_no_boxes() -> None:
    assert place([], []) == Layout((), (), 0.0, 0.0)


def test_2000_boxes_take_seconds() -> None:
    sizes, nets = random_graph(0, 2000)
    start = time.process_time()
    near = [Net(net.source, tuple(t for t in net.targets if t < net.source + 60)) for net in nets]
    place(sizes, near)
    assert time.process_time() - start < 15
