"""A small convolutional network with random weights and two groups of channels."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def convnet(widths: tuple[int, int] = (32, 64), seed: int = 0) -> Model:
    """conv1 -> BN -> relu -> conv2 -> relu -> conv3: two groups."""
    one, two = widths
    shapes = {"w1": (one, 3, 3, 3), "w2": (two, one, 3, 3), "b2": (two,), "w3": (5, two, 1, 1)}
    shapes |= dict.fromkeys(("gain", "shift", "mean"), (one,))
    held = dict(zip(shapes, weights(*shapes.values(), seed=seed), strict=True))
    held["var"] = np.ones(one, np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["h1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["h1", "gain", "shift", "mean", "var"], ["n1"], "norm"),
        helper.make_node("Relu", ["n1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["h2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h2"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "w3"], ["y"], "conv3"),
    ]
    graph = helper.make_graph(
        nodes,
        "convnet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 8, 8])],
        [numpy_helper.from_array(values, name) for name, values in held.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    return load(proto)
