"""Operators that ONNX Runtime's CUDA provider runs on 16-bit floats, and which inputs and outputs of theirs are floats.

From the provider's own table of kernels (docs/OperatorKernels.md of ONNX Runtime): operator -> the first opset version
with a float16 kernel, and the first with a bfloat16 kernel. Operators that are not here stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
import onnx_graphsurgeon as gs

Half = Literal["fp16", "bf16"]

ELEMENT: dict[Half, int] = {"fp16": int(onnx.TensorProto.FLOAT16), "bf16": int(onnx.TensorProto.BFLOAT16)}
"""ONNX element types."""

_NEVER = 1 << 16
#: (first opset version with a float16 kernel, with a bfloat16 kernel, operators)
_KERNELS: tuple[tuple[int, int, str], ...] = (
    (
        *(1, 1),
        "Compress Concat ConcatFromSequence ConstantOfShape Expand Flatten Gather GatherElements Identity Max Min "
        "LayerNormalization Reshape ReverseSequence ScatterElements ScatterND SimplifiedLayerNormalization Slice Split "
        "Squeeze Sum TensorScatter Transpose Trilu Unsqueeze",
    ),
    (
        *(1, 13),
        "Abs Add Div Dropout Erf Exp GatherND Gemm IsNaN MatMul Mod Mul Neg Pow ReduceSum Relu Sigmoid Sign Softmax "
        "Sqrt Sub Tanh Tile",
    ),
    (1, 16, "Where"),
    (1, 20, "Gelu"),
    (1, 22, "AveragePool Conv HardSigmoid HardSwish"),
    (1, 23, "Attention RMSNormalization RotaryEmbedding"),
    (20, 20, "IsInf"),
    (
        *(1, _NEVER),
        "ArgMax ArgMin BatchNormalization Ceil ConvTranspose Cos DepthToSpace Einsum Elu Equal Floor GRU "
        "GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual InstanceNormalization LRN LSTM LeakyRelu Less "
        "LessOrEqual Log LogSoftmax MaxPool NonZero OneHot PRelu Pad RNN Reciprocal ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare Resize Round Selu Shrink Sin "
        "Softplus Softsign SpaceToDepth ThresholdedRelu TopK Upsample",
    ),
    (12, _NEVER, "Clip"),
    (14, _NEVER, "CumSum"),
)
_TABLE = {name: {"fp16": fp16, "bf16": bf16} for fp16, bf16, names in _KERNELS for name in names.split()}
_MICROSOFT: dict[str, tuple[bool, frozenset[int]]] = {
    # whether there is a bfloat16 kernel, too; outputs that are no floats of the input's type
    "Attention": (True, frozenset()),
    "BiasAdd": (False, frozenset()),
    "BiasGelu": (True, frozenset()),
    "BiasSplitGelu": (False, frozenset()),
    "EmbedLayerNormalization": (False, frozenset({1})),
    "FastGelu": (True, frozenset()),
    "FusedMatMul": (True, frozenset()),
    "Gelu": (True, frozenset()),
    "GroupQueryAttention": (True, frozenset()),
    "MatMulNBits": (True, frozenset()),
    "MultiHeadAttention": (True, frozenset()),
    "QuickGelu": (True, frozenset()),
    "RotaryEmbedding": (True, frozenset()),
    "SkipLayerNormalization": (True, frozenset({1, 2})),
    "SkipSimplifiedLayerNormalization": (True, frozenset({1, 2})),
}


@dataclass(frozen=True)
class Floats:
    """Inputs and outputs of a node, by place, that are 16-bit floats when it runs on such."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def floats_of(node: gs.Node, half: Half, opset: int) -> Floats | None:
    """Which inputs and outputs of a node change their type with the node's; None where no such kernel exists."""
    if node.domain == "com.microsoft":
        known = _MICROSOFT.get(node.op)
        if known is None or (half == "bf16" and not known[0]):
            return None
        every = range(len(node.outputs))
        return Floats(frozenset(range(len(node.inputs))), frozenset(i for i in every if i not in known[1]))
    if (node.domain or "ai.onnx") != "ai.onnx" or opset < _TABLE.get(node.op, {half: _NEVER})[half]:
        return None
    try:
        schema = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return None
    wanted = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[half]
    free = {
        each.type_param_str
        for each in schema.type_constraints
        if wanted in each.allowed_type_strs and "tensor(float)" in each.allowed_type_strs
    }
    taken = [_formal(schema.inputs, i).type_str for i in range(len(node.inputs))]
    given = [_formal(schema.outputs, i).type_str for i in range(len(node.outputs))]
    changing = free & set(taken) if taken and node.op != "ConstantOfShape" else free
    return Floats(
        frozenset(i for i, name in enumerate(taken) if name in changing),
        frozenset(i for i, name in enumerate(given) if name in changing),
    )


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], place: int) -> onnx.defs.OpSchema.FormalParameter:
    """What the schema says of an input or output: the last one may stand for any number."""
    return formals[min(place, len(formals) - 1)]
