"""What an analysis says of ONNX text of any opset, com.microsoft included, in forms that are easy to compare."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnx.parser
from onnx import helper, numpy_helper

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.graph.load import load


def weighted(text: str, opset: int = 21, seed: int = 0) -> onnx.ModelProto:
    """Every graph input but those named x... becomes a weight with values near 1 in size."""
    header = f'<ir_version: {11 if opset > 22 else 10}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    model = onnx.parser.parse_model(header + text)
    rng = np.random.default_rng(seed)
    for value in list(model.graph.input):
        if not value.name.startswith("x"):
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            values = np.asarray(rng.normal(size=shape, scale=0.5)).astype(dtype)
            model.graph.initializer.append(numpy_helper.from_array(values, value.name))
            model.graph.input.remove(value)
    onnx.checker.check_model(model)
    return model


def analysis_of(text: str, opset: int = 21) -> Analysis:
    return analyze(load(weighted(text, opset)))


def group_members(text: str, opset: int = 21) -> list[set[tuple[str, int]]]:
    """The axes of each group, as (tensor, axis)."""
    return [{(member.tensor, member.axis) for member in group.members} for group in analysis_of(text, opset).groups]


def group_sizes(text: str, opset: int = 21) -> list[int]:
    return sorted(group.size for group in analysis_of(text, opset).groups)


def pins_of(text: str, opset: int = 21) -> set[tuple[str, int, str, str]]:
    """(tensor, axis, operator, reason)."""
    return {(pin.tensor, pin.axis, pin.op, pin.reason) for pin in analysis_of(text, opset).pins}
