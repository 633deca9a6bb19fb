"""onnxslim on the skeleton: large weights taken out as inputs and put back by name afterwards.

So it needs memory for the graph only, whatever the model's size, and cannot fuse weights, which our own rewrites do
exactly and with tests. What it does to the names and symbols of inputs and outputs is undone.
"""

from __future__ import annotations

import contextlib
import io
import logging

import onnx
import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model, constants
from spa_compiler.graph.save import skeleton
from spa_compiler.graph.surgeon import import_graph

_WEIGHT_FUSIONS = [
    "FusionConvAdd",
    "FusionConvBN",
    "FusionConvMul",
    "FusionConvTransposeAdd",
    "FusionConvTransposeBN",
    "FusionConvTransposeMul",
    "FusionGemm",
    "FusionGemmAdd",
    "FusionGemmMul",
]
"""Patterns that rewrite weights: ours to do (batchnorm.py), and some take every weight for a constant and fail."""

_COUPLING = ["weight_tying"]
"""It makes one tensor of those that happen to be equal (two biases of zeros), which would couple their channels."""


def slim(model: Model) -> gs.Graph:
    """A simplified graph for the model, weights attached; the model's own graph is not changed.

    Raises:
        Exception: whatever onnxslim raises on graphs that it cannot handle; callers go on without it.
    """
    bare = skeleton(model)
    inputs = {value.name for value in model.signature.inputs}
    held = {tensor.name: tensor for tensor in constants(model.graph)}
    stubs = {value.name for value in bare.graph.input} - inputs
    slimmed = _quietly(bare)
    graph = slimmed.graph
    del graph.input[:]
    graph.input.extend(model.metadata.inputs)
    made = {name for node in graph.node for name in node.output} | inputs | {t.name for t in graph.initializer}
    lost = [value.name for value in model.metadata.outputs if value.name not in made | stubs]
    if lost:
        raise ValueError(f"the outputs {lost} are gone")
    del graph.output[:]
    graph.output.extend(model.metadata.outputs)
    for name in sorted(stubs):
        tensor = held[name]
        stub = next(value for value in bare.graph.input if value.name == name)
        graph.initializer.add(
            name=name, data_type=stub.type.tensor_type.elem_type, dims=[int(size) for size in tensor.shape]
        )
    del graph.value_info[:]
    values = {name: held[name]._values for name in stubs}
    result = import_graph(slimmed, values, None)
    result.name = model.graph.name
    result.doc_string = model.graph.doc_string
    result.producer_name, result.producer_version = model.graph.producer_name, model.graph.producer_version
    return result


def _quietly(bare: onnx.ModelProto) -> onnx.ModelProto:
    """onnxslim without what it and its helpers write to stdout; the given proto is copied first."""
    private = onnx.ModelProto()
    private.CopyFrom(bare)
    with contextlib.redirect_stdout(io.StringIO()):
        import onnxslim

        logging.getLogger("onnxslim").setLevel(logging.CRITICAL)
        slimmed = onnxslim.slim(private, skip_fusion_patterns=_WEIGHT_FUSIONS, skip_optimizations=_COUPLING)
    if not isinstance(slimmed, onnx.ModelProto):
        raise TypeError("onnxslim returned no model")
    return slimmed
