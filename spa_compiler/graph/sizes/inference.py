"""onnx's own inference, for one node with what is known of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx
import onnx.checker
import onnx.defs
import onnx.shape_inference
from onnx import TensorProto, TypeProto, helper

from spa_compiler.graph.sizes.known import NOTHING, Known, Misfit, Op

_REFUSALS = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
    TypeError,
)


def infer(op: Op, given: Sequence[Known], name: str | None = None) -> list[Known]:
    """What onnx says of the node's outputs, as if its inputs were like `given`; [] if onnx does not know the operator.

    Args:
        name: the operator of the default domain, in its newest version, that stands for the node's own.

    Raises:
        Misfit: it refuses them.
    """
    if name is None:
        schema = _schema(op.name, op.opsets.get(op.domain, op.opset), op.domain)
    else:
        schema = _schema(name, onnx.defs.onnx_opset_version(), "")
    if schema is None:
        return []
    node = op.proto
    if name is not None:
        given = given[: schema.max_input]
        node = onnx.NodeProto(op_type=name, input=op.inputs[: len(given)], output=op.outputs[: schema.max_output])
        node.attribute.extend(attribute for attribute in op.proto.attribute if attribute.name in schema.attributes)
    types: dict[str, TypeProto] = {}
    data: dict[str, TensorProto] = {}
    for tensor, known in zip(node.input, given, strict=True):
        if tensor:
            types[tensor] = known.type
            if known.data is not None:
                data[tensor] = known.data
    imports = [helper.make_opsetid(domain, version) for domain, version in op.opsets.items()]
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports, ir_version=10)
    except _REFUSALS as error:
        raise Misfit(str(error)) from error
    return [_from_type(found[output]) if output in found else NOTHING for output in op.outputs]


@cache
def _schema(name: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(name, version, domain)
    except onnx.defs.SchemaError:
        return None


def _from_type(proto: TypeProto) -> Known:
    if not proto.HasField("tensor_type"):
        return Known(other=proto) if proto.WhichOneof("value") else NOTHING
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return Known(tensor.elem_type)
    return Known(tensor.elem_type, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim))
