"""What an analysis says of ONNX text, by weight: which of their axes can shrink, and what goes with one index."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.graph.load import load
from tests.analysis.rules import said


def weighted(text: str, opset: int = 21) -> onnx.ModelProto:
    """Every graph input but those named x... becomes a weight; codes are small and positive."""
    model = said.weighted(text, opset)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind in "iu":
            codes = np.asarray(np.arange(values.size) % 5 + 1, values.dtype)
            tensor.CopyFrom(numpy_helper.from_array(codes.reshape(values.shape), tensor.name))
    return model


def analysis_of(text: str, opset: int = 21) -> Analysis:
    return analyze(load(weighted(text, opset)))


def reasons_of(analysis: Analysis, tensor: str, axis: int) -> set[str]:
    """Why an axis is pinned."""
    return {pin.reason for pin in analysis.pins if (pin.tensor, pin.axis) == (tensor, axis)}


def removable(analysis: Analysis) -> set[tuple[str, int]]:
    """The axes of weights on which some unit can go."""
    return {(member.tensor, member.axis) for group in analysis.groups for member in group.parameters}


Unit = dict[tuple[str, int], list[int]]


def units_of(analysis: Analysis, tensor: str, axis: int, index: int) -> list[Unit]:
    """Of each unit that takes this index of a weight: all that goes of the weights."""
    units = [
        {(slab.name, slab.axis): slab.indices for slab in unit.parameters}
        for group in analysis.groups
        for unit in group.units
    ]
    return [unit for unit in units if index in unit.get((tensor, axis), ())]
