"""Constant folding of weights: what is computed from constants alone is computed once, by ONNX Runtime itself.

    MatMul(x, Transpose(W))  ->  MatMul(x, W')

onnxslim does this for small tensors; large ones are not in the skeleton that it sees. A connected piece of constant
computation is folded only if it does not make the model larger (a Transpose of an embedding that is also looked up
stays). Quantization is left alone: folding DequantizeLinear would undo it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import networkx as nx
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from spa_compiler.graph.model import scopes
from spa_compiler.graph.session import open_session
from spa_compiler.graph.weights import LARGE_BYTES, array_of, nbytes, onnx_type

_LOG = logging.getLogger(__name__)
_NEVER = frozenset(
    {
        "Constant",
        "DequantizeLinear",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "Bernoulli",
        "Multinomial",
        "If",
        "Loop",
    }
    | {"Scan", "Dropout", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "SequenceConstruct"}
    | {"ConstantOfShape", "Optional", "SplitToSequence", "SequenceEmpty", "StringNormalizer", "TfIdfVectorizer"}
)


def lift_constants(graph: gs.Graph) -> int:
    """`Constant` nodes of the outermost graph with numbers in them become initializers of the same name, in place."""
    outputs = {tensor.name for tensor in graph.outputs}
    lifted: set[int] = set()
    for node in graph.nodes:
        if node.op != "Constant" or node.domain or len(node.outputs) != 1 or node.outputs[0].name in outputs:
            continue
        values = constant_values(node)
        if values is None:
            continue
        variable = node.outputs[0]
        constant = gs.Constant(variable.name, np.zeros(0) if not isinstance(values, np.ndarray) else values)
        constant._values = values
        _substitute(variable, constant, _scopes_nodes(graph))
        node.outputs.clear()
        lifted.add(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in lifted]
    return len(lifted)


def fold_sizes(graph: gs.Graph) -> int:
    """`Shape` of a constant becomes a constant, CastLike of a known type a Cast, in place; returns how many there were.

    onnxslim does not see large constants, so it cannot tell their sizes and types.
    """
    outputs = {tensor.name for tensor in graph.outputs}
    gone: set[int] = set()
    casts = 0
    for node in graph.nodes:
        if node.domain or not node.outputs or node.outputs[0].name in outputs:
            continue
        if node.op == "Shape" and isinstance(node.inputs[0], gs.Constant):
            shape = np.asarray(node.inputs[0].shape, np.int64)
            value = shape[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
            _substitute(node.outputs[0], gs.Constant(node.outputs[0].name, value), _scopes_nodes(graph))
            node.inputs.clear()
            node.outputs.clear()
            gone.add(id(node))
        elif node.op == "CastLike" and isinstance(node.inputs[1].dtype, np.dtype):
            node.op, node.attrs = "Cast", {"to": onnx.helper.np_dtype_to_tensor_dtype(node.inputs[1].dtype)}
            del node.inputs[1]
            casts += 1
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    return len(gone) + casts


def fold_weights(graph: gs.Graph) -> int:
    """Folds constant computation on large tensors, in place; returns how many nodes went."""
    foldable = _foldable(graph)
    pieces: nx.Graph[int] = nx.Graph()
    by_id = {id(node): node for node in foldable}
    for node in foldable:
        pieces.add_node(id(node))
        for tensor in node.inputs:
            for maker in tensor.inputs:
                if id(maker) in by_id:
                    pieces.add_edge(id(node), id(maker))
    gone: set[int] = set()
    for piece in nx.connected_components(pieces):
        nodes = [node for node in foldable if id(node) in piece]
        if _fold_piece(graph, nodes):
            gone |= piece
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    return len(gone)


def _foldable(graph: gs.Graph) -> list[gs.Node]:
    """Nodes whose inputs are all constant, directly or through other such nodes."""
    outputs = {tensor.name for tensor in graph.outputs}
    known: set[str] = set()
    found = []
    for node in graph.nodes:
        if node.domain or node.op in _NEVER or not node.inputs or any(t.name in outputs for t in node.outputs):
            continue
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            continue
        named = [tensor for tensor in node.inputs if tensor.name]
        if named and all(_is_plain_constant(tensor) or tensor.name in known for tensor in named):
            known.update(tensor.name for tensor in node.outputs)
            found.append(node)
    return found


def _is_plain_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and isinstance(tensor.dtype, np.dtype) and tensor.dtype.isbuiltin == 1


def _fold_piece(graph: gs.Graph, nodes: list[gs.Node]) -> bool:
    inside = {id(node) for node in nodes}
    feeds = {t.name: t for node in nodes for t in node.inputs if isinstance(t, gs.Constant)}
    if not any(nbytes(tensor) > LARGE_BYTES for tensor in feeds.values()):
        return False
    results = [t for n in nodes for t in n.outputs if t.name and any(id(user) not in inside for user in t.outputs)]
    freed = sum(nbytes(t) for t in feeds.values() if all(id(user) in inside for user in t.outputs))
    try:
        values = _evaluate(graph, nodes, list(feeds.values()), [tensor.name for tensor in results])
    except Exception as error:  # noqa: BLE001 - whatever cannot be folded stays as it is
        _LOG.debug("not folded: %s: %s", nodes[0].name, error)
        return False
    if sum(array.nbytes for array in values) > freed + LARGE_BYTES:
        return False
    for tensor, array in zip(results, values, strict=True):
        _substitute(tensor, gs.Constant(tensor.name, array), _scopes_nodes(graph))
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()
    return True


def _evaluate(
    graph: gs.Graph, nodes: list[gs.Node], inputs: list[gs.Constant], outputs: list[str]
) -> list[np.ndarray[Any, Any]]:
    proto = onnx.helper.make_graph(
        [OnnxExporter.export_node(node) for node in nodes],
        "constant",
        [onnx.helper.make_tensor_value_info(t.name, onnx_type(t), list(t.shape)) for t in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = onnx.helper.make_model(
        proto, opset_imports=[onnx.helper.make_opsetid("", graph.opset)], ir_version=min(onnx.IR_VERSION, 10)
    )
    session = open_session(model.SerializeToString(), optimize="none")
    values = session.run(outputs, {tensor.name: array_of(tensor) for tensor in inputs})
    return [np.asarray(value) for value in values]


def constant_values(node: gs.Node) -> Any:
    """What a Constant node holds, as lazy values or an array; None where that is no dense tensor of numbers."""
    attrs = node.attrs
    value = attrs.get("value")
    if isinstance(value, gs.Constant):
        return value._values
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32)):
        if name in attrs:
            return np.asarray(attrs[name], dtype=dtype)
    for name in ("value_int", "value_ints"):
        if name in attrs:
            return np.asarray(attrs[name], dtype=np.int64)
    return None


def _substitute(old: gs.Tensor, new: gs.Constant, nodes: Iterable[gs.Node]) -> None:
    """Every use of `old`, in branches too, becomes a use of `new`."""
    users = {id(user) for user in old.outputs}
    for node in nodes:
        if id(node) not in users:
            continue
        for position, tensor in enumerate(list(node.inputs)):
            if tensor is old:
                node.inputs[position] = new
    old.outputs.clear()


def _scopes_nodes(graph: gs.Graph) -> Iterable[gs.Node]:
    return [node for scope in scopes(graph) for node in scope.nodes]
