"""One block of a Llama with a cache of keys and values, in the operators that exporters write, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 13, 8
"""What the oldest engine of the race reads."""
STD = 0.02
EPSILON = 1e-5
THETA = 500_000.0
POSITIONS = 2048


@dataclass(frozen=True)
class Sizes:
    """Of a block; the defaults are those of Llama 3.2 1B."""

    hidden: int = 2048
    inner: int = 8192
    heads: int = 32
    kv_heads: int = 8

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


def llama_block(sizes: Sizes | None = None, seed: int = 0) -> onnx.ModelProto:
    """RMS norm, grouped-query attention with rotary positions, RMS norm, SwiGLU, both with their residuals.

    Inputs: `hidden` [batch, tokens, hidden], `position` [batch, tokens], `past_key` and `past_value`
    [batch, kv_heads, past, head]. Outputs: `output` like `hidden`, `key` and `value` with the new tokens behind the past
    ones. There is no mask: it is made for one token at a time, which sees all before it.
    """
    sizes = sizes or Sizes()
    graph = _Graph(seed)
    key, value = _attention(graph, sizes)
    normed = graph.rms_norm("attended", sizes.hidden)
    gate = graph.linear(normed, sizes.hidden, sizes.inner)
    gated = graph.op(
        "Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), graph.linear(normed, sizes.hidden, sizes.inner)
    )
    graph.op("Add", graph.linear(gated, sizes.inner, sizes.hidden), "attended", out="output")
    past = ["batch", sizes.kv_heads, "past", sizes.head]
    present = ["batch", sizes.kv_heads, "present", sizes.head]
    stream = ["batch", "tokens", sizes.hidden]
    made = helper.make_graph(
        graph.nodes,
        "llama_block",
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, stream),
            helper.make_tensor_value_info("position", TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info("past_key", TensorProto.FLOAT, past),
            helper.make_tensor_value_info("past_value", TensorProto.FLOAT, past),
        ],
        [
            helper.make_tensor_value_info("output", TensorProto.FLOAT, stream),
            helper.make_tensor_value_info(key, TensorProto.FLOAT, present),
            helper.make_tensor_value_info(value, TensorProto.FLOAT, present),
        ],
        graph.weights,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def _attention(g: _Graph, sizes: Sizes) -> tuple[str, str]:
    """Adds `attended` [batch, tokens, hidden]; gives the names of the keys and values, `[batch, kv_heads, past + tokens, head]`."""
    normed = g.rms_norm("hidden", sizes.hidden)
    query = g.heads(g.linear(normed, sizes.hidden, sizes.hidden), sizes.heads, sizes.head)
    key = g.heads(g.linear(normed, sizes.hidden, sizes.kv_heads * sizes.head), sizes.kv_heads, sizes.head)
    value = g.heads(g.linear(normed, sizes.hidden, sizes.kv_heads * sizes.head), sizes.kv_heads, sizes.head)
    angles = np.outer(np.arange(POSITIONS), THETA ** (-np.arange(0, sizes.head, 2) / sizes.head))
    axis = g.const([1], np.int64)
    cos, sin = (
        g.op("Unsqueeze", g.op("Gather", g.const(np.tile(table, 2)), "position"), axis)
        for table in (np.cos(angles), np.sin(angles))
    )
    query, key = (g.rotate(x, cos, sin, sizes.head) for x in (query, key))
    key = g.op("Concat", "past_key", key, out="key", axis=2)
    value = g.op("Concat", "past_value", value, out="value", axis=2)
    keys, values = (g.repeat(x, sizes) for x in (key, value))
    scores = g.op("MatMul", query, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    weights = g.op("Softmax", g.op("Div", scores, g.const(np.sqrt(sizes.head))), axis=-1)
    context = g.op("Transpose", g.op("MatMul", weights, values), perm=[0, 2, 1, 3])
    context = g.op("Reshape", context, g.const([0, 0, sizes.hidden], np.int64))
    g.op("Add", "hidden", g.linear(context, sizes.hidden, sizes.hidden), out="attended")
    return key, value


class _Graph:
    """Nodes and weights as they are added; every method gives the name of the tensor that it made."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=f"/{out}", **attributes))
        return out

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype, order="C"), name))
        return name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        weight = self.rng.standard_normal((inputs, outputs), np.float32) * np.float32(STD)
        return self.op("MatMul", x, self.const(weight))

    def rms_norm(self, x: str, width: int) -> str:
        square = self.op("Pow", x, self.const(2.0))
        mean = self.op("ReduceMean", square, axes=[-1], keepdims=1)
        rms = self.op("Sqrt", self.op("Add", mean, self.const(EPSILON)))
        return self.op("Mul", self.op("Div", x, rms), self.const(self.rng.normal(1.0, 0.1, width)))

    def heads(self, x: str, heads: int, size: int) -> str:
        return self.op("Transpose", self.op("Reshape", x, self.const([0, 0, heads, size], np.int64)), perm=[0, 2, 1, 3])

    def rotate(self, x: str, cos: str, sin: str, size: int) -> str:
        axis = self.const([3], np.int64)
        zero, half, end = (self.const([at], np.int64) for at in (0, size // 2, size))
        turned = self.op(
            "Concat",
            self.op("Neg", self.op("Slice", x, half, end, axis)),
            self.op("Slice", x, zero, half, axis),
            axis=-1,
        )
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def repeat(self, x: str, sizes: Sizes) -> str:
        each = self.op("Unsqueeze", x, self.const([2], np.int64))
        several = self.op("Expand", each, self.const([1, 1, sizes.heads // sizes.kv_heads, 1, 1], np.int64))
        return self.op("Reshape", several, self.const([0, sizes.heads, -1, sizes.head], np.int64))
