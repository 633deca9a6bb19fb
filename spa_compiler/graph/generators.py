"""Tensors that are made of nothing but a number: each reader gets its own.

    z = ConstantOfShape(s)        LSTM(.., z), LSTM(.., z)   ->   z = .., z' = ..     LSTM(.., z), LSTM(.., z')

Common subexpressions are worth finding in general, and onnxslim finds them; of zeros it makes the start state of every
recurrent layer one tensor, and then these layers would have to keep the same hidden units.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

_SINGLE = 1


def unshare_generators(graph: gs.Graph) -> int:
    """Copies ConstantOfShape, and Expand of a single number, for every reader but the first, in place.

    Returns:
        How many copies were made.
    """
    outputs = {tensor.name for tensor in graph.outputs}
    taken = {*graph.tensors()}
    made = 0
    for node in list(graph.nodes):
        if not _is_generator(node) or node.outputs[0].name in outputs:
            continue
        at = next(place for place, other in enumerate(graph.nodes) if other is node)
        readers = {id(user): user for user in node.outputs[0].outputs}
        for user in list(readers.values())[1:]:
            copy = _copy(node, taken)
            for place, tensor in enumerate(user.inputs):
                if tensor is node.outputs[0]:
                    user.inputs[place] = copy.outputs[0]
            graph.nodes.insert(at + 1, copy)
            made += 1
    return made


def _is_generator(node: gs.Node) -> bool:
    if node.domain or len(node.outputs) != 1 or len(node.outputs[0].outputs) < 2:
        return False
    if node.op == "ConstantOfShape":
        return True
    source = node.inputs[0] if node.op == "Expand" else None
    return isinstance(source, gs.Constant) and int(np.prod(source.shape)) == _SINGLE


def _copy(node: gs.Node, taken: set[str]) -> gs.Node:
    original = node.outputs[0]
    number = 1
    while f"{original.name}_{number}" in taken:
        number += 1
    name = f"{original.name}_{number}"
    taken.add(name)
    output = gs.Variable(name, dtype=original.dtype, shape=original.shape)
    return gs.Node(node.op, name, dict(node.attrs), list(node.inputs), [output])
