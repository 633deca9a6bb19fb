"""What lies between two weights that hand channel i of one to channel i of the other: activations, scales, pooling."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from spa_compiler.graph.operators import describe

_MOST_STEPS = 64
"""Tensors on the way from one weight to the next: more is no activation any more."""

_CHANNELWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "HardSigmoid", "HardSwish"}
    | {"Swish", "Silu", "Elu", "LeakyRelu", "Softplus", "Mish", "Identity", "Cast", "Clip", "FastGelu", "QuickGelu"}
    | {"BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool"}
)
_DOMAINS = (None, "", "com.microsoft")


def sites_behind(tensor: gs.Tensor, places: Mapping[int, int]) -> set[int]:
    """The sites that a tensor is computed from, channel by channel; empty where anything else takes part.

    Args:
        places: the number of each site, by the id of its node.
    """
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
        elif node.op in _CHANNELWISE and node.domain in _DOMAINS:
            queue.extend(node.inputs)
        elif (op := describe(node)) is not None and op.depthwise:
            queue.append(node.inputs[0])
        else:
            return set()
    return sites
