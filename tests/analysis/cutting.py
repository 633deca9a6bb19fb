"""Cuts units out of a model, and masks them in the model as it was: two ways that must compute the same.

Written against the JSON of `spa-analyze --json` alone, as an outsider would.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

from tests.onnx_text import HEADER

Removal = dict[tuple[str, int], set[int]]
"""(tensor, axis) -> the indices that go."""


def with_weights(text: str, seed: int = 0) -> onnx.ModelProto:
    """ONNX text in which every graph input but those named x... becomes a weight with values near 1 in size."""
    model = onnx.parser.parse_model(HEADER + text)
    rng = np.random.default_rng(seed)
    for value in list(model.graph.input):
        if value.name.startswith("x"):
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        values = rng.normal(size=shape, scale=0.5).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(values, value.name))
        model.graph.input.remove(value)
    onnx.checker.check_model(model, full_check=True)
    return model


def removal(document: Any, units: dict[int, list[int]]) -> tuple[Removal, Removal]:
    """What goes from parameters and from activations, for units by group id."""
    parameters: Removal = {}
    activations: Removal = {}
    for group in document["groups"]:
        for number in units.get(group["id"], []):
            unit = group["units"][number]
            for slabs, target in ((unit["parameters"], parameters), (unit["activations"], activations)):
                for slab in slabs:
                    target.setdefault((slab["name"], slab["axis"]), set()).update(slab["indices"])
    return parameters, activations


def cut(model: onnx.ModelProto, parameters: Removal, activations: Removal) -> onnx.ModelProto:
    """The model without the indices; `group` of a Conv follows from what is left of its input and its weight."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    sizes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    constants: dict[str, np.ndarray[Any, Any]] = {}
    holders = [*out.graph.initializer]
    for node in out.graph.node:
        if node.op_type == "Constant":
            holders.append(node.attribute[0].t)
            holders[-1].name = node.output[0]
    for tensor in holders:
        values = numpy_helper.to_array(tensor)
        for axis in range(values.ndim):
            values = np.delete(values, sorted(parameters.get((tensor.name, axis), ())), axis)
        constants[tensor.name] = values
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in out.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "group" and node.input[0] in sizes:
                channels = sizes[node.input[0]].type.tensor_type.shape.dim[1].dim_value
                channels -= len(activations.get((node.input[0], 1), ()))
                attribute.i = channels // constants[node.input[1]].shape[1]
    out.graph.ClearField("value_info")
    return out


def masked(model: onnx.ModelProto, activations: Removal, ranks: dict[str, int]) -> onnx.ModelProto:
    """The model as it was, with zeros at the indices wherever such a tensor is read."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    nodes = []
    for node in out.graph.node:
        for place, name in enumerate(node.input):
            for axis in range(ranks.get(name, 0)):
                if (name, axis) in activations:
                    size = shapes[name].type.tensor_type.shape.dim[axis].dim_value
                    keep = np.ones([size if other == axis else 1 for other in range(ranks[name])], np.bool_)
                    keep.reshape(-1)[sorted(activations[name, axis])] = False
                    mask = f"{node.output[0]}_{place}_{axis}"
                    out.graph.initializer.append(numpy_helper.from_array(keep, f"{mask}_keep"))
                    dtype = helper.tensor_dtype_to_np_dtype(shapes[name].type.tensor_type.elem_type)
                    out.graph.initializer.append(numpy_helper.from_array(np.zeros((), dtype), f"{mask}_zero"))
                    operands = [f"{mask}_keep", node.input[place], f"{mask}_zero"]
                    if dtype == np.bool_:  # ONNX Runtime has no Where on bool
                        nodes.append(helper.make_node("And", operands[:2], [mask]))
                    else:
                        nodes.append(helper.make_node("Where", operands, [mask]))
                    node.input[place] = mask
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del out.graph.node[:]
    out.graph.node.extend(copies)
    out.graph.ClearField("value_info")
    return out
