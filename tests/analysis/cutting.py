"""ONNX text with random weights, and what goes with units according to the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

from spa_compiler.analysis import schema
from tests.onnx_text import HEADER

Removal = dict[tuple[str, int], set[int]]
"""(tensor, axis) -> the indices that go."""


def with_weights(text: str, seed: int = 0, header: str = HEADER) -> onnx.ModelProto:
    """ONNX text in which every graph input but those named x... becomes a weight with values near 1 in size."""
    model = onnx.parser.parse_model(header + text)
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


def removal(document: schema.Document, units: Mapping[int, Sequence[int]]) -> tuple[Removal, Removal]:
    """What goes from parameters and from activations, for units by group id, as an outsider reads it."""
    parameters: Removal = {}
    activations: Removal = {}
    for group in document.groups:
        for number in units.get(group.id, []):
            unit = group.units[number]
            for slabs, target in ((unit.parameters, parameters), (unit.activations, activations)):
                for slab in slabs:
                    target.setdefault((slab.name, slab.axis), set()).update(slab.indices)
    return parameters, activations
