"""ONNX text with weights drawn, and what the analysis says of it in forms that are easy to compare."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import onnx
import onnx.checker
import onnx.parser
from onnx import helper, numpy_helper

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.graph import runtime_ops
from spa_compiler.graph.load import load

Told: TypeAlias = str | onnx.ModelProto | Analysis
"""ONNX text of opset 21, a model, or what was said of one."""

Place: TypeAlias = tuple[str, int]
"""(tensor, axis)."""

Unit: TypeAlias = dict[Place, list[int]]


def weighted(text: str, opset: int = 21, seed: int = 0) -> onnx.ModelProto:
    """Every graph input but those named x... becomes a weight with values near 1 in size; codes are small and positive."""
    header = f'<ir_version: {11 if opset > 22 else 10}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    model = onnx.parser.parse_model(header + text)
    rng = np.random.default_rng(seed)
    for value in list(model.graph.input):
        if not value.name.startswith("x"):
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            values = np.asarray(rng.normal(size=shape, scale=0.5))
            if dtype.kind in "iu":
                values = (np.arange(values.size) % 5 + 1).reshape(shape)
            model.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), value.name))
            model.graph.input.remove(value)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    runtime_ops.hide(bare)
    onnx.checker.check_model(bare, full_check=opset >= 9)  # older constants are floats to its inference
    return model


def net(text: str, opset: int = 24) -> onnx.ModelProto:
    """`weighted`, of an opset with fused operators."""
    return weighted(text, opset)


def analysis_of(told: Told, opset: int = 21) -> Analysis:
    """The opset is that of text."""
    if isinstance(told, Analysis):
        return told
    return analyze(load(weighted(told, opset) if isinstance(told, str) else told))


def group_members(told: Told) -> list[set[Place]]:
    """The axes of each group."""
    return [{(member.tensor, member.axis) for member in group.members} for group in analysis_of(told).groups]


def group_sizes(told: Told) -> list[int]:
    """In order of size."""
    return sorted(group.size for group in analysis_of(told).groups)


def groups_of(told: Told) -> dict[str, tuple[int, set[Place]]]:
    """Number of units and members, by granularity and, where that is not enough, the first member's tensor."""
    analysis = analysis_of(told)
    out: dict[str, tuple[int, set[Place]]] = {}
    for group, members in zip(analysis.groups, group_members(analysis), strict=True):
        name = group.granularity
        out[f"{name} of {group.members[0].tensor}" if name in out else name] = (group.size, members)
    return out


def pins_of(told: Told) -> set[tuple[str, int, str, str]]:
    """(tensor, axis, operator, reason)."""
    return {(pin.tensor, pin.axis, pin.op, pin.reason) for pin in analysis_of(told).pins}


def pins_inside(told: Told) -> set[tuple[str, int, str, str]]:
    """`pins_of`, without those of positions and those that graph inputs and outputs make."""
    interface = ("graph input", "graph output")
    return {pin for pin in pins_of(told) if pin[2] not in interface and "positions" not in pin[3]}


def reasons_of(told: Told, tensor: str, axis: int) -> set[str]:
    """Why an axis is pinned."""
    return {reason for *place, _, reason in pins_of(told) if place == [tensor, axis]}


def removable(told: Told) -> set[Place]:
    """The axes of weights on which some unit can go."""
    return {(member.tensor, member.axis) for group in analysis_of(told).groups for member in group.parameters}


def units_of(told: Told, tensor: str, axis: int, index: int) -> list[Unit]:
    """Of each unit that takes this index of a weight: all that goes of the weights."""
    units = [
        {(slab.name, slab.axis): slab.indices for slab in unit.parameters}
        for group in analysis_of(told).groups
        for unit in group.units
    ]
    return [unit for unit in units if index in unit.get((tensor, axis), ())]
