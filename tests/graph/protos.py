"""Models that are awkward to write as text."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def large_mlp(rows: int = 64, columns: int = 32) -> onnx.ModelProto:
    """A MatMul whose weight, 0, 1, 2, ..., is large enough to be kept out of skeletons."""
    weight = numpy_helper.from_array(np.arange(rows * columns, dtype=np.float32).reshape(rows, columns), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
