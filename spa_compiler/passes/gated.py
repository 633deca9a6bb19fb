"""Gated feed-forward blocks: which sites are gates or up projections, and which one reads their product."""

from __future__ import annotations

from collections.abc import Sequence

from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes.channelwise import sites_behind


def gates(ops: Sequence[WeightedOp]) -> dict[int, int]:
    """For each gate or up projection the down projection that reads act(gate) * up, by their places in `ops`."""
    places = {id(op.node): place for place, op in enumerate(ops)}
    found: dict[int, int] = {}
    for down, op in enumerate(ops):
        source = op.node.inputs[0]
        if len(source.inputs) != 1 or source.inputs[0].op != "Mul" or source.inputs[0].domain:
            continue
        sides = [sites_behind(tensor, places) for tensor in source.inputs[0].inputs]
        if all(len(side) == 1 for side in sides) and sides[0] != sides[1]:
            pair = [place for side in sides for place in side]
            if all(ops[place].n == op.k for place in pair):
                found.update((place, down) for place in pair)
    return found
