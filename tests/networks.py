"""Small models with given weights: ONNX text for the nodes, arrays for the initializers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.parser
from numpy.typing import NDArray
from onnx import numpy_helper

from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from tests.onnx_text import HEADER

F32 = NDArray[np.float32]

WITH_MICROSOFT = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


def network(text: str, header: str = HEADER, check: bool = True, **weights: NDArray[Any]) -> onnx.ModelProto:
    """ONNX text whose free names are `weights`; `{0.5}` in it stands for a scalar constant.

    Nodes get the names of their first outputs.
    """
    scalars: dict[str, float] = {}

    def named(match: re.Match[str]) -> str:
        return f" {scalars_name(scalars, float(match[1]))} "

    proto = onnx.parser.parse_model(header + re.sub(r"\{\s*(-?[\d.e+-]+)\s*\}", named, text))
    for node in proto.graph.node:
        node.name = node.output[0]
    values = {name: np.asarray(value, np.float32) for name, value in scalars.items()} | weights
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    if check:
        onnx.checker.check_model(proto, full_check=True)
    return proto


def scalars_name(scalars: dict[str, float], value: float) -> str:
    """A name for a scalar; equal ones share it."""
    name = f"s_{value!r}".replace(".", "p").replace("-", "m").replace("+", "")
    scalars[name] = value
    return name


def model_of(text: str, header: str = HEADER, **weights: NDArray[Any]) -> Model:
    """`network`, loaded, its shapes inferred: as placement meets a model."""
    model = load(network(text, header, **weights))
    shapes.infer(model)
    return model


def weight(rng: np.random.Generator, k: int, n: int, density: float = 1.0, rows: int = 4) -> F32:
    """[k, n], as MatMul takes it: zeros in `rows` x 1 blocks of outputs, of a magnitude that keeps outputs near 1."""
    keep = np.repeat(rng.random((k, -(-n // rows))) < density, rows, axis=1)[:, :n]
    values = rng.standard_normal((k, n)) * keep / np.sqrt(max(k * density, 1))
    return np.ascontiguousarray(values, np.float32)


def mlp(density: float, width: int = 256, depth: int = 2, seed: int = 0, rows: int = 4) -> onnx.ModelProto:
    """Dense layers of `width`, ReLU in between: x [batch, seq, width] -> y."""
    rng = np.random.default_rng(seed)
    weights: dict[str, F32] = {}
    lines, last = [], "x"
    for i in range(depth):
        weights[f"w{i}"] = weight(rng, width, width, density, rows)
        weights[f"b{i}"] = (0.1 * rng.standard_normal(width)).astype(np.float32)
        out = "y" if i == depth - 1 else f"h{i}"
        lines += [f"m{i} = MatMul({last}, w{i})", f"{'y' if out == 'y' else f'a{i}'} = Add(m{i}, b{i})"]
        if out != "y":
            lines.append(f"h{i} = Relu(a{i})")
        last = out
    body = "\n".join(lines)
    return network(f'mlp (float["batch","seq",{width}] x) => (float["batch","seq",{width}] y) {{ {body} }}', **weights)
