"""Shapes of tensors: symbolic, as onnx infers them, and concrete, for given feeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.model import Dim, Model, scopes
from spa_compiler.graph.save import skeleton
from spa_compiler.graph.session import Feeds, open_model, run


def infer(model: Model) -> None:
    """Fills `shape` and `dtype` of the graph's tensors where onnx's inference knows them, symbols kept.

    What was stated before is forgotten first, as passes leave old shapes behind; only tensors around operators of other
    domains, which inference knows nothing of, keep theirs.
    """
    for scope in scopes(model.graph):
        declared = {id(tensor) for tensor in [*scope.inputs, *scope.outputs]}
        for node in scope.nodes:
            for tensor in node.outputs:
                if id(tensor) not in declared and isinstance(tensor, gs.Variable) and not node.domain:
                    tensor.shape = None
    inferred = _infer(skeleton(model))
    known = {value.name: value for value in [*inferred.graph.value_info, *inferred.graph.output]}
    fixed_io = {tensor.name for tensor in [*model.graph.inputs, *model.graph.outputs]}
    for name, tensor in model.graph.tensors().items():
        value = known.get(name)
        if value is None or name in fixed_io or not isinstance(tensor, gs.Variable):
            continue
        if not value.type.HasField("tensor_type"):
            continue
        kind = value.type.tensor_type
        if kind.elem_type:
            tensor.dtype = _dtype(kind.elem_type)
        tensor.shape = None if not kind.HasField("shape") else [_dim(dim) for dim in kind.shape.dim]


def bind(proto: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> None:
    """Gives graph inputs concrete shapes, in place; equal symbols elsewhere follow through inference."""
    for value in proto.graph.input:
        if value.name in shapes:
            tensor = value.type.tensor_type
            tensor.ClearField("shape")
            tensor.shape.SetInParent()
            for size in shapes[value.name]:
                tensor.shape.dim.add(dim_value=size)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]


Shapes = dict[str, tuple[int, ...]]


def fixed(model: Model, feeds: Feeds) -> Shapes:
    """The concrete shape of every tensor of the outermost graph, for these feeds.

    onnx's inference with bound inputs gives most; the rest comes from one run.

    Raises:
        UsageError: a feed is missing or no input of that name exists.
        ModelError: the model does not run on these feeds.
    """
    return fixed_at(model, [feeds])[0]


def fixed_at(model: Model, every: Sequence[Feeds]) -> list[Shapes]:
    """The same for several feeds: the model is loaded once, if at all."""
    found = [_inferred(model, feeds) for feeds in every]
    made = [name for name, t in model.graph.tensors().items() if isinstance(t, gs.Variable) and t.inputs]
    unknown = [name for name in made if any(name not in shapes for shapes in found)]
    if unknown:
        for shapes, values in zip(found, _observe(model, every, unknown), strict=True):
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    shapes.setdefault(name, tuple(value.shape))
    return found


def _inferred(model: Model, feeds: Feeds) -> Shapes:
    missing = [value.name for value in model.signature.inputs if value.name not in feeds]
    if missing:
        raise UsageError(f"no value for the inputs {missing}", where=model.source.name)
    tensors = model.graph.tensors()
    shapes: Shapes = {name: tuple(array.shape) for name, array in feeds.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, gs.Constant)}
    proto = skeleton(model)
    bind(proto, {name: tuple(array.shape) for name, array in feeds.items()})
    inferred = _infer(proto)
    for value in [*inferred.graph.value_info, *inferred.graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes.setdefault(value.name, tuple(dim.dim_value for dim in kind.shape.dim))
    return shapes


def _observe(model: Model, every: Sequence[Feeds], names: list[str]) -> list[Feeds]:
    try:
        session = open_model(model, optimize="none", outputs=names, prepack=False)
        return [run(session, feeds) for feeds in every]
    except Exception as error:
        if error.__class__.__module__.startswith("spa_compiler"):
            raise
        raise ModelError(
            f"ONNX Runtime cannot run it: {str(error).splitlines()[0]}", where=model.source.name
        ) from error


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """onnx's inference with data propagation, or without where that fails, or the proto as it is."""
    for data_prop in (True, False):
        try:
            return onnx.shape_inference.infer_shapes(proto, data_prop=data_prop)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            continue
    return proto


def _dim(dim: Any) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.dim_param else None


def _dtype(elem_type: int) -> Any:
    from onnx_graphsurgeon.importers.onnx_importer import get_numpy_type

    numpy_type = get_numpy_type(elem_type)
    return elem_type if numpy_type is None else numpy_type
