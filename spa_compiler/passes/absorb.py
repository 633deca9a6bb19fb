"""A constant channel goes into the bias of what reads it.

    y = x W + b,  x[i] = c[i]    becomes    y = x' W' + (b + sum c[i] W[i, :])        x', W' without the i

For Gemm, MatMul (with the Add behind it, or a new one) and convolutions without padding; a padded one sees the constant
in its interior alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.passes.constant_channels import input_axis

_BIAS = 2
"""Input of Conv and Gemm."""


def takes(node: gs.Node, constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether constants can be absorbed by this node: always exactly, for any value."""
    if input_axis(node, constants) is None:
        return False
    fixed_bias = len(node.inputs) <= _BIAS or not node.inputs[_BIAS].name or node.inputs[_BIAS].name in constants
    if node.op == "Conv":
        padded = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        return fixed_bias and not padded
    if node.op == "Gemm":
        return fixed_bias and bool(node.attrs.get("beta", 1.0))
    return bool(node.op == "MatMul")


def absorb(graph: gs.Graph, node: gs.Node, values: NDArray[np.float64], constants: Mapping[str, NDArray[Any]]) -> None:
    """Adds to the node's bias what the indices with a value contribute.

    Args:
        values: `[size of the axis summed over]`, 0 where nothing is to be absorbed.
    """
    place = input_axis(node, constants)
    if place is None:
        raise ValueError(f"{node.op} has no bias to put constants into")
    weight = np.asarray(constants[node.inputs[1].name], np.float64)
    share = np.tensordot(values, weight, axes=(0, place[0]))  # [outputs, kernel...], or [outputs]
    dtype = constants[node.inputs[1].name].dtype
    if node.op == "MatMul":
        _add_behind(graph, node, share, dtype, constants)
        return
    share = share.reshape(share.shape[0], -1).sum(axis=1)
    if node.op == "Gemm":
        share = share * (node.attrs.get("alpha", 1.0) / node.attrs.get("beta", 1.0))
    if len(node.inputs) > _BIAS and node.inputs[_BIAS].name:
        share = np.asarray(constants[node.inputs[_BIAS].name], np.float64) + share
    bias = gs.Constant(_free(graph, f"{node.outputs[0].name}_bias"), share.astype(dtype))
    node.inputs = [*node.inputs[:_BIAS], bias]


def _add_behind(
    graph: gs.Graph, node: gs.Node, share: NDArray[np.float64], dtype: Any, constants: Mapping[str, NDArray[Any]]
) -> None:
    """Into the constant of the only Add that reads the product, else into a new Add."""
    out = node.outputs[0]
    readers = list(out.outputs)
    if len(readers) == 1 and readers[0].op == "Add" and not any(out is tensor for tensor in graph.outputs):
        number = next((n for n, t in enumerate(readers[0].inputs) if t.name in constants), None)
        if number is not None:
            old = np.asarray(constants[readers[0].inputs[number].name], np.float64)
            name = _free(graph, f"{out.name}_bias")
            readers[0].inputs[number] = gs.Constant(name, (old + share).astype(dtype))
            return
    product = gs.Variable(_free(graph, f"{out.name}_product"), dtype=out.dtype, shape=out.shape)
    bias = gs.Constant(_free(graph, f"{out.name}_bias"), share.astype(dtype))
    node.outputs[0] = product
    add = gs.Node("Add", name=_free(graph, f"{node.name}_bias"), inputs=[product, bias], outputs=[out])
    graph.nodes.insert(graph.nodes.index(node) + 1, add)


def _free(graph: gs.Graph, name: str) -> str:
    taken = {*graph.tensors(), *(node.name for node in graph.nodes)}
    while name in taken:
        name += "_"
    return name
