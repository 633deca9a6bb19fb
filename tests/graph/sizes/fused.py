"""One operator of ONNX Runtime's own domain between graph inputs and tensors of which nothing is stated."""

from __future__ import annotations

import numpy as np

from spa_compiler.graph.settle import apply, settle
from tests.onnx_text import model_from

Shape = tuple[int | None, ...] | None


def shapes_of(call: str, inputs: str, outputs: int = 1, opset: int = 17) -> list[Shape]:
    """Shapes of all outputs, batch and sequence bound to 2 and 13; `call` is ONNX text, as are the inputs."""
    settled = settle(model_from(*_text(call, inputs, outputs, opset)))
    return [settled.shapes.get(f"y{index}") for index in range(outputs)]


def types_of(call: str, inputs: str, outputs: int = 1, opset: int = 17) -> list[np.dtype[np.generic]]:
    """Types of all outputs."""
    model = model_from(*_text(call, inputs, outputs, opset)).copy()
    apply(model, settle(model))
    tensors = model.graph.tensors()
    return [np.dtype(tensors[f"y{index}"].dtype) for index in range(outputs)]


def _text(call: str, inputs: str, outputs: int, opset: int) -> tuple[str, str]:
    """Text and header; constants that calls may name: float s, uint8 u, int8 i, int64[1] five."""
    names = ", ".join(f"y{index}" for index in range(outputs))
    text = f"""g ({inputs}) => (float z)
      <float s = {{0.1}}, uint8 u = {{3}}, int8 i = {{0}}, int64[1] five = {{5}}> {{
      {names} = com.microsoft.{call}
      floats = Cast<to = 1>(y0)
      z = ReduceSum<keepdims = 0>(floats)
    }}"""
    return text, f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
