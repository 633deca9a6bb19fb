"""Gated feed-forward blocks: which sites are gates or up projections, and which one reads their product."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from spa_compiler.graph.operators import WeightedOp

_MOST_STEPS = 64
"""Nodes between a projection and the product: more is no activation any more."""


def gates(ops: Sequence[WeightedOp]) -> dict[int, int]:
    """For each gate or up projection the down projection that reads act(gate) * up, by their places in `ops`."""
    places = {id(op.node): place for place, op in enumerate(ops)}
    found: dict[int, int] = {}
    for down, op in enumerate(ops):
        source = op.node.inputs[0]
        if len(source.inputs) != 1 or source.inputs[0].op != "Mul" or source.inputs[0].domain:
            continue
        sides = [_sites_behind(tensor, places) for tensor in source.inputs[0].inputs]
        if all(len(side) == 1 for side in sides) and sides[0] != sides[1]:
            pair = [place for side in sides for place in side]
            if all(ops[place].n == op.k for place in pair):
                found.update((place, down) for place in pair)
    return found


def _sites_behind(tensor: gs.Tensor, places: dict[int, int]) -> set[int]:
    """The sites that a tensor is computed from, by element-wise nodes alone; empty where it is not."""
    queue, seen, sites = [tensor], set(), set()
    while queue:
        current = queue.pop()
        if not isinstance(current, gs.Variable) or id(current) in seen:
            continue
        seen.add(id(current))
        if len(seen) > _MOST_STEPS or not current.inputs:
            return set()
        node = current.inputs[0]
        if id(node) in places:
            sites.add(places[id(node)])
        elif node.op in _ELEMENTWISE:
            queue.extend(node.inputs)
        else:
            return set()
    return sites


_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "HardSigmoid", "HardSwish"}
    | {"Swish", "Silu", "Elu", "LeakyRelu", "Softplus", "Mish", "Identity", "Cast", "Clip", "FastGelu", "QuickGelu"}
)
