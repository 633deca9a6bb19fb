"""Builds ONNX models node by node, as exporters write them: a method per layer, random weights of a fit size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims: TypeAlias = Sequence["int | str"]


class Net:
    """One model in the making; tensors are their names."""

    def __init__(self, name: str, opset: int = 17) -> None:
        self.name, self.opset = name, opset
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.domains: set[str] = set()
        self._rng = np.random.default_rng(abs(hash_of(name)))
        self._count = 0

    # ------------------------------------------------------------ tensors

    def input(self, name: str, *dims: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(dims)))
        return name

    def ids(self, name: str, *dims: int | str) -> str:
        return self.input(name, *dims, dtype=TensorProto.INT64)

    def const(self, values: Any, dtype: Any = np.float32, hint: str = "c") -> str:
        name = self._fresh(hint)
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(list(values), np.int64, "i")

    def number(self, value: int) -> str:
        return self.const(value, np.int64, "i")

    def weight(self, *dims: int, fan: int | None = None, mean: float = 0.0, std: float | None = None) -> str:
        """Normal values; by default such that a layer with `fan` inputs keeps the size of what it gets."""
        spread = std if std is not None else 1.0 / math.sqrt(fan or (math.prod(dims[1:]) or 1))
        return self.const(self._rng.normal(mean, spread, dims), hint="w")

    def bias(self, size: int) -> str:
        return self.weight(size, std=0.3)

    def gain(self, *dims: int) -> str:
        return self.const(self._rng.uniform(0.5, 1.5, dims), hint="g")

    def _fresh(self, hint: str) -> str:
        self._count += 1
        return f"{hint}{self._count}"

    # ------------------------------------------------------------ nodes

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.ops(kind, *inputs, count=1, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, count: int, domain: str = "", **attributes: Any) -> list[str]:
        names = [self._fresh(kind.lower()) for _ in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        if domain:
            self.domains.add(domain)
        return names

    def named(self, kind: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> list[str]:
        """A node with outputs of given names; "" leaves one out."""
        self.nodes.append(helper.make_node(kind, list(inputs), list(names), **attributes))
        return list(names)

    def model(self, *results: str) -> onnx.ModelProto:
        """Gives the results out, as y or y0, y1, ..."""
        outputs = []
        for place, result in enumerate(results):
            name = "y" if len(results) == 1 else f"y{place}"
            self.nodes.append(helper.make_node("Identity", [result], [name]))
            outputs.append(onnx.ValueInfoProto(name=name))
        graph = helper.make_graph(self.nodes, self.name, self.inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in self.domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8 if self.opset < 21 else 10)
        inferred = onnx.shape_inference.infer_shapes(model)
        for output, found in zip(model.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(found)
            if output.type.tensor_type.elem_type == 0:
                output.type.tensor_type.elem_type = TensorProto.FLOAT
        ranked = all(output.type.tensor_type.HasField("shape") for output in model.graph.output)
        if ranked:  # behind operators that inference does not know, no shape is stated, and the checker wants one
            onnx.checker.check_model(model, full_check=True)
        return model

    # ------------------------------------------------------------ elementwise and shapes

    def add(self, *terms: str) -> str:
        total = terms[0]
        for term in terms[1:]:
            total = self.op("Add", total, term)
        return total

    def mul(self, left: str, right: str) -> str:
        return self.op("Mul", left, right)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def sigmoid(self, x: str) -> str:
        return self.op("Sigmoid", x)

    def silu(self, x: str) -> str:
        return self.mul(x, self.sigmoid(x))

    def gelu(self, x: str) -> str:
        """As torch exports it."""
        erf = self.op("Erf", self.op("Div", x, self.const(math.sqrt(2))))
        return self.mul(self.mul(x, self.add(erf, self.const(1.0))), self.const(0.5))

    def relu6(self, x: str) -> str:
        return self.op("Clip", x, self.const(0.0), self.const(6.0))

    def hardswish(self, x: str) -> str:
        """x * clip(x + 3, 0, 6) / 6"""
        return self.op("Div", self.mul(x, self.relu6(self.add(x, self.const(3.0)))), self.const(6.0))

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def concat(self, *parts: str, axis: int = 1) -> str:
        return self.op("Concat", *parts, axis=axis)

    def split(self, x: str, *sizes: int, axis: int = 1) -> list[str]:
        return self.ops("Split", x, self.ints(*sizes), count=len(sizes), axis=axis)

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis), self.ints(step))

    def gather(self, x: str, indices: str, axis: int = 0) -> str:
        return self.op("Gather", x, indices, axis=axis)

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def squeeze(self, x: str, *axes: int) -> str:
        return self.op("Squeeze", x, self.ints(*axes))

    def size_of(self, x: str, axis: int) -> str:
        """[size of an axis], computed in the graph."""
        return self.unsqueeze(self.gather(self.op("Shape", x), self.number(axis)), 0)

    def reshape_to(self, x: str, *sizes: int | str) -> str:
        """Reshape to numbers and computed sizes (tensors of one element)."""
        parts = [size if isinstance(size, str) else self.ints(size) for size in sizes]
        return self.op("Reshape", x, self.concat(*parts, axis=0))

    # ------------------------------------------------------------ layers

    def conv(
        self, x: str, before: int, after: int, k: int = 3, *, stride: int = 1, group: int = 1, bias: bool = True,
        rank: int = 2, dilation: int = 1, pad: int | None = None,
    ) -> str:  # fmt: skip
        weight = self.weight(after, before // group, *[k] * rank)
        pad = dilation * (k - 1) // 2 if pad is None else pad
        attributes: dict[str, Any] = {"kernel_shape": [k] * rank, "strides": [stride] * rank, "pads": [pad] * 2 * rank}
        attributes["dilations"] = [dilation] * rank
        inputs = [x, weight, *([self.bias(after)] if bias else [])]
        return self.op("Conv", *inputs, group=group, **attributes)

    def deconv(self, x: str, before: int, after: int, k: int = 2, *, stride: int = 2, group: int = 1) -> str:
        weight = self.weight(before, after // group, k, k, fan=before // group)
        pad = (k - stride) // 2
        return self.op(
            "ConvTranspose", x, weight, self.bias(after),
            group=group, kernel_shape=[k, k], strides=[stride, stride], pads=[pad] * 4,
        )  # fmt: skip

    def bn(self, x: str, size: int) -> str:
        variance = self.gain(size)
        return self.op(
            "BatchNormalization", x, self.gain(size), self.bias(size), self.bias(size), variance, epsilon=1e-5
        )

    def conv_bn(self, x: str, before: int, after: int, k: int = 3, **options: Any) -> str:
        return self.bn(self.conv(x, before, after, k, bias=False, **options), after)

    def maxpool(self, x: str, k: int = 2, stride: int = 2) -> str:
        pad = (k - 1) // 2 if stride == 1 else 0
        return self.op("MaxPool", x, kernel_shape=[k, k], strides=[stride, stride], pads=[pad] * 4)

    def avgpool(self, x: str, k: int = 2, stride: int = 2) -> str:
        pad = (k - 1) // 2 if stride == 1 else 0
        return self.op(
            "AveragePool", x, kernel_shape=[k, k], strides=[stride, stride], pads=[pad] * 4, count_include_pad=1
        )

    def head(self, x: str, before: int, after: int = 5) -> str:
        """Global average, flatten, Gemm."""
        return self.gemm(self.op("Flatten", self.op("GlobalAveragePool", x), axis=1), before, after)

    def gemm(self, x: str, before: int, after: int) -> str:
        return self.op("Gemm", x, self.weight(after, before), self.bias(after), transB=1)

    def linear(self, x: str, before: int, after: int, bias: bool = True) -> str:
        """MatMul and Add, as torch exports layers on more than two axes."""
        y = self.op("MatMul", x, self.weight(before, after, fan=before))
        return self.op("Add", self.bias(after), y) if bias else y

    def mlp(self, x: str, size: int, hidden: int) -> str:
        return self.linear(self.gelu(self.linear(x, size, hidden)), hidden, size)

    def mean(self, x: str, *axes: int, keep: bool = True) -> str:
        if self.opset >= 18:
            return self.op("ReduceMean", x, self.ints(*axes), keepdims=int(keep))
        return self.op("ReduceMean", x, axes=list(axes), keepdims=int(keep))

    def layer_norm(self, x: str, size: int) -> str:
        """Decomposed, as exports before opset 17 have it."""
        centred = self.op("Sub", x, self.mean(x, -1))
        spread = self.mean(self.op("Pow", centred, self.const(2.0)), -1)
        root = self.op("Sqrt", self.add(spread, self.const(1e-5)))
        return self.add(self.mul(self.op("Div", centred, root), self.gain(size)), self.bias(size))

    def fused_layer_norm(self, x: str, size: int) -> str:
        return self.op("LayerNormalization", x, self.gain(size), self.bias(size), axis=-1, epsilon=1e-5)

    def rms_norm(self, x: str, size: int) -> str:
        square = self.mean(self.op("Pow", x, self.const(2.0)), -1)
        root = self.op("Sqrt", self.add(square, self.const(1e-6)))
        return self.mul(self.gain(size), self.mul(x, self.op("Reciprocal", root)))

    def group_norm(self, x: str, size: int, groups: int, height: int, width: int) -> str:
        """As torch exports it: Reshape, InstanceNormalization, Reshape, Mul, Add."""
        flat = self.reshape(x, 0, groups, -1)
        ones, zeros = self.const(np.ones(groups)), self.const(np.zeros(groups))
        normal = self.op("InstanceNormalization", flat, ones, zeros, epsilon=1e-5)
        back = self.reshape(normal, -1, size, height, width)
        return self.add(self.mul(back, self.gain(size, 1, 1)), self.weight(size, 1, 1, std=0.3))

    def softmax(self, x: str, axis: int = -1) -> str:
        return self.op("Softmax", x, axis=axis)

    def heads_first(self, x: str, heads: int, width: int, length: int = -1) -> str:
        """[B, S, H d] -> [B, H, S, d]"""
        return self.transpose(self.reshape(x, 0, length, heads, width), 0, 2, 1, 3)

    def attend(self, q: str, k: str, v: str, width: int, extra: str = "") -> str:
        """[B, H, S, d] -> the same; `extra` is added to the scores."""
        scores = self.op("MatMul", q, self.transpose(k, 0, 1, 3, 2))
        scores = self.op("Div", scores, self.const(math.sqrt(width)))
        if extra:
            scores = self.add(scores, extra)
        return self.op("MatMul", self.softmax(scores), v)

    def heads_last(self, x: str, size: int, length: int = -1) -> str:
        """[B, H, S, d] -> [B, S, H d]"""
        return self.reshape(self.transpose(x, 0, 2, 1, 3), 0, length, size)

    def attention(self, x: str, size: int, heads: int, width: int, extra: str = "") -> str:
        """Separate projections and the output projection."""
        q, k, v = (self.heads_first(self.linear(x, size, heads * width), heads, width) for _ in range(3))
        return self.linear(self.heads_last(self.attend(q, k, v, width, extra), heads * width), heads * width, size)

    def embed(self, ids: str, vocabulary: int, size: int) -> str:
        return self.gather(self.weight(vocabulary, size, std=1.0), ids)


def hash_of(text: str) -> int:
    """The same in every run."""
    return sum((place + 1) * byte for place, byte in enumerate(text.encode()))
