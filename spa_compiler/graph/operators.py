"""Operators with a constant weight, all seen alike: `[outputs, inputs]`, whatever the layout in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph import weights

Rows = np.ndarray[Any, np.dtype[Any]]
"""A weight as `[n, k]` = [outputs, inputs]."""

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))

_PASS_ON = frozenset(
    {
        "Abs",
        "Add",
        "ArgMax",
        "ArgMin",
        "AveragePool",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "DepthToSpace",
        "Div",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "Gelu",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "LogSoftmax",
        "MaxPool",
        "Mish",
        "Mul",
        "Neg",
        "PRelu",
        "Pow",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Upsample",
        "Where",
    }
)
"""Operators that neither normalize nor mix in a residual: what is behind them is what came in, reshaped or squashed."""

_NORM_REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceSumSquare"})


@dataclass(frozen=True)
class WeightedOp:
    """A MatMul, Gemm or Conv whose weight is constant, or a ConvTranspose that placement takes for one of them.

    `n` outputs, `k` inputs per output (Conv: C / group * kernel size); `kernel` is `()` for MatMul and Gemm.
    """

    node: gs.Node
    kind: Literal["MatMul", "Gemm", "Conv", "ConvTranspose"]
    weight: gs.Constant
    n: int
    k: int
    group: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The node's name, or its first output's where it has none."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def transposed(self) -> bool:
        """Whether the file stores the weight as [inputs, outputs]."""
        return self.kind == "MatMul" or (self.kind == "Gemm" and not self.node.attrs.get("transB", 0))

    def rows(self) -> Rows:
        """The weight as `[n, k]` in its own dtype: a view or a copy, never to be written to."""
        return self.rows_of(weights.array_of(self.weight))

    def rows_of(self, values: Rows) -> Rows:
        """An array in the weight's layout as `[n, k]`."""
        return values.T if self.transposed else values.reshape(self.n, self.k)

    def laid_out(self, rows: Rows) -> Rows:
        """`rows [n, k]` in the weight's layout and dtype, a new array."""
        values = rows.T if self.transposed else rows.reshape(self.weight.shape)
        return np.array(values, dtype=self.weight.dtype, order="C")

    def replace(self, rows: Rows) -> None:
        """Puts `rows` `[n, k]` in the weight's place, as a new array in the file's own layout and dtype.

        A weight that other nodes use too is left to them: this node gets a Constant of its own.
        """
        if rows.shape != (self.n, self.k):
            raise ValueError(f"{self.name}: {rows.shape} rows for a weight of {(self.n, self.k)}")
        values = self.laid_out(rows)
        if len(self.weight.outputs) > 1:
            own = gs.Constant(f"{self.weight.name}_{self.node.outputs[0].name}", values)
            self.node.inputs[1] = own
            object.__setattr__(self, "weight", own)
        else:
            self.weight.values = values

    @property
    def bias(self) -> Rows | None:
        """`[n]`: Gemm's C or Conv's B where it is constant, else None."""
        if self.kind == "MatMul" or len(self.node.inputs) < 3:
            return None
        tensor = self.node.inputs[2]
        if not isinstance(tensor, gs.Constant):
            return None
        values = weights.array_of(tensor)
        if values.size == self.n and values.ndim in (1, 2) and values.shape[-1] == self.n:
            return values.reshape(self.n)
        return np.full(self.n, values.reshape(())) if values.size == 1 else None

    @property
    def pointwise(self) -> bool:
        """Whether it is a plain matrix product: MatMul, Gemm, or Conv 1x1 with stride 1, no padding, one group."""
        if self.kind != "Conv":
            return True
        attrs = self.node.attrs
        return (
            self.group == 1
            and all(size == 1 for size in self.kernel)
            and all(step == 1 for step in attrs.get("strides", ()))
            and not any(attrs.get("pads", ()))
        )

    @property
    def depthwise(self) -> bool:
        """Whether each output channel of a Conv sees one input channel."""
        return self.kind == "Conv" and self.group > 1 and int(self.weight.shape[1]) == 1

    @property
    def kernel_size(self) -> int:
        """Positions of the kernel: 1 for MatMul and Gemm."""
        return math.prod(self.kernel)

    @property
    def is_first_conv(self) -> bool:
        """Whether it is a Conv with no weighted operator between it and the graph's inputs."""
        if self.kind != "Conv":
            return False
        seen: set[int] = set()
        queue = [self.node.inputs[0]]
        while queue:
            for node in queue.pop().inputs:
                if id(node) in seen:
                    continue
                seen.add(id(node))
                if describe(node) is not None:
                    return False
                queue.extend(node.inputs)
        return True


def weighted_ops(graph: gs.Graph) -> list[WeightedOp]:
    """Every weighted operator of the outermost graph, in the order of its nodes, which is topological."""
    return [op for op in map(describe, graph.nodes) if op is not None]


def describe(node: gs.Node) -> WeightedOp | None:
    """The node as a weighted operator, or None if it is none.

    MatMul needs a constant right operand of rank 2; Gemm a constant B, an untransposed A, alpha and beta of 1; Conv a
    constant W. Weights are float16, 32 or 64.
    """
    if node.domain or node.op not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or weight.dtype not in _FLOATS or 0 in weight.shape:
        return None
    shape = tuple(int(size) for size in weight.shape)
    attrs = node.attrs
    if node.op == "MatMul":
        return WeightedOp(node, "MatMul", weight, shape[1], shape[0]) if len(shape) == 2 else None
    if node.op == "Gemm":
        plain = attrs.get("alpha", 1.0) == 1.0 and attrs.get("beta", 1.0) == 1.0 and not attrs.get("transA", 0)
        if not plain or len(shape) != 2:
            return None
        n, k = shape if attrs.get("transB", 0) else (shape[1], shape[0])
        return WeightedOp(node, "Gemm", weight, n, k)
    if len(shape) < 3 or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        return None
    k = int(np.prod(shape[1:]))
    return WeightedOp(node, "Conv", weight, shape[0], k, int(attrs.get("group", 1)), shape[2:])


def reaches_output_bare(op: WeightedOp, graph: gs.Graph) -> bool:
    """Whether the layer's result reaches a graph output with no normalization and no residual Add on the way.

    Such a layer (a classifier, a regression head) has nothing behind it that would even out what sparsity does to it.
    Keys and values of attention are none, though a model with a cache gives them out as well.
    """
    outputs = {tensor.name for tensor in graph.outputs}
    seen: set[str] = set()
    queue = [op.node.outputs[0]]
    reached = False
    while queue:
        tensor = queue.pop()
        if not tensor.name or tensor.name in seen:
            continue
        seen.add(tensor.name)
        reached = reached or tensor.name in outputs
        if _is_normalized(tensor):
            continue
        for node in tensor.outputs:
            if _attends(node):
                return False
            if _passes_on(node):
                queue.extend(node.outputs)
    return reached


def _passes_on(node: gs.Node) -> bool:
    if node.domain or node.op not in _PASS_ON:
        return False
    return node.op != "Add" or len(list(_variables(node))) < 2


def _attends(node: gs.Node) -> bool:
    """Whether the node multiplies two computed tensors, as attention does, or is attention as one operator."""
    if node.op in ("MatMul", "Einsum") and not node.domain:
        return len(list(_variables(node))) > 1
    return "Attention" in node.op


def _variables(node: gs.Node) -> Iterator[Any]:
    for tensor in node.inputs:
        made_by_constant = len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant"
        if isinstance(tensor, gs.Variable) and tensor.name and not made_by_constant:
            yield tensor


def _is_normalized(tensor: Any) -> bool:
    """Whether the consumers spell a normalization in small operators: x - mean(x), x / |x|, x * rsqrt(mean(x^2))."""
    ops = {node.op for node in tensor.outputs}
    if ops & _NORM_REDUCTIONS or ("ReduceMean" in ops and "Sub" in ops):
        return True
    squares = [n for n in tensor.outputs if n.op == "Pow" or (n.op == "Mul" and all(i is tensor for i in n.inputs))]
    return any(user.op in ("ReduceMean", "ReduceSum") for square in squares for user in square.outputs[0].outputs)
