"""Shapes of ONNX Runtime's own operators (domain com.microsoft), which onnx's inference does not know.

Attention of every kind is in `attention_shapes`.
"""

from __future__ import annotations

from onnx import TensorProto

from spa_compiler.graph.sizes import attention_shapes
from spa_compiler.graph.sizes.dims import broadcast, multiplied, part, total
from spa_compiler.graph.sizes.inference import infer
from spa_compiler.graph.sizes.known import Dims, Known, Op
from spa_compiler.graph.sizes.onnx_shapes import Rule, like


def _fused_matmul(op: Op, given: list[Known]) -> list[Known]:
    sides: list[Dims] = []
    for known, flag in zip(given, ("A", "B"), strict=False):
        if known.shape is None:
            return []
        shape = known.shape
        if op.attr("transBatch" + flag, 0) and len(shape) > 2:
            shape = (*shape[1:-1], shape[0], shape[-1])
        if op.attr("trans" + flag, 0) and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        sides.append(shape)
    return [Known(given[0].elem, multiplied(*sides))]


def _matmul(elem: int | None = None) -> Rule:
    """A product of the first two inputs."""

    def rule(_: Op, given: list[Known]) -> list[Known]:
        a, b = given[:2]
        if a.shape is None or b.shape is None:
            return []
        return [Known(a.elem if elem is None else elem, multiplied(a.shape, b.shape))]

    return rule


def _quantized_gemm(op: Op, given: list[Known]) -> list[Known]:
    a, b = given[0], given[3]
    if a.shape is None or b.shape is None:
        return []
    rows = a.shape[1 if op.attr("transA", 0) else 0]
    columns = b.shape[0 if op.attr("transB", 0) else 1]
    return [Known(TensorProto.FLOAT if op.optional(given, 8) is None else a.elem, (rows, columns))]


def _columns(*attributes: str) -> Rule:
    """Rows like those of the first input, each output as wide as its attribute says; what follows is like the input."""

    def rule(op: Op, given: list[Known]) -> list[Known]:
        data = given[0]
        if data.shape is None:
            return []
        made = [Known(data.elem, (*data.shape[:-1], int(op.attrs[name]))) for name in attributes if name in op.attrs]
        return [*made, data] if len(made) == len(attributes) else []

    return rule


def _broadcast(first: int, *places: int) -> Rule:
    """All inputs at these places against each other, of the first one's type."""

    def rule(_: Op, given: list[Known]) -> list[Known]:
        result: Dims = ()
        for place in (first, *places):
            shape = given[place].shape
            if shape is None:
                return []
            result = broadcast(result, shape)
        return [Known(given[first].elem, result)]

    return rule


def _quantized_concat(op: Op, given: list[Known]) -> list[Known]:
    shapes = [known.shape for known in given[2::3] if known.shape is not None]
    if not shapes or len(shapes) < len(given[2::3]):
        return []
    axis = int(op.attr("axis", 0)) % len(shapes[0])
    size = total(shape[axis] for shape in shapes)
    return [Known(given[2].elem, (*shapes[0][:axis], size, *shapes[0][axis + 1 :]))]


def _quantized_global_pool(op: Op, given: list[Known]) -> list[Known]:
    shape = given[0].shape
    if shape is None:
        return []
    ones = (1,) * (len(shape) - 2)
    pooled = (shape[0], *ones, shape[-1]) if op.attr("channels_last", 0) else (*shape[:2], *ones)
    return [Known(given[0].elem, pooled)]


def _inferred(name: str, kernel: int | None = None, last: bool = False) -> Rule:
    """Inferred like `name`, with axes moved where channels are last.

    Kernels, at input `kernel`, come as (out, .., in) or as (out, in, ..) then.
    """

    def rule(op: Op, given: list[Known]) -> list[Known]:
        if not last and not op.attr("channels_last", 0):
            return infer(op, given, name)
        shape = given[0].shape
        if shape is None or len(shape) < 3:
            return []
        moved = [Known(given[0].elem, (shape[0], shape[-1], *shape[1:-1])), *given[1:]]
        filters = None if kernel is None else given[kernel].shape
        if kernel is not None and filters and filters[1] != part(shape[-1], int(op.attr("group", 1))):
            moved[kernel] = Known(given[kernel].elem, (filters[0], filters[-1], *filters[1:-1]))
        found = infer(op, moved, name)
        return [Known(y.elem, (y.shape[0], *y.shape[2:], y.shape[1])) if y.shape else y for y in found]

    return rule


def _quantized_average_pool(op: Op, given: list[Known]) -> list[Known]:
    """Codes pass for floats, as AveragePool takes nothing else."""
    found = _AVERAGE_POOL(op, [Known(TensorProto.FLOAT, given[0].shape)])
    return [Known(given[0].elem, known.shape) for known in found]


_AVERAGE_POOL = _inferred("AveragePool")


def _causal_conv(op: Op, given: list[Known]) -> list[Known]:
    """The state holds the last positions, those that a kernel still reaches."""
    data, kernel, past = given[0], given[1].shape, op.optional(given, 3)
    output = Known(data.elem, data.shape)
    if past is not None and past.shape is not None:
        return [output, Known(past.elem, past.shape)]
    if data.shape is None or not kernel or kernel[-1] is None or op.attr("ndim", 1) != 1:
        return [output]
    length = (kernel[-1] - 1) * int(op.attr("dilation", 1))
    lead = (int(op.attr("state_window", 0)),) if op.attr("state_window", 0) else ()
    batch, *rest = data.shape
    slot = (length, *rest[1:]) if op.attr("channels_last", 0) else (rest[0], length)
    return [output, Known(data.elem, (*lead, batch, *slot))]


def _split_gelu(_: Op, given: list[Known]) -> list[Known]:
    shape = given[0].shape
    return [Known(given[0].elem, (*shape[:-1], part(shape[-1], 2)))] if shape else []


def _embed(_: Op, given: list[Known]) -> list[Known]:
    ids, table = given[0].shape, given[2]
    if ids is None or len(ids) != 2 or not table.shape:
        return []
    embedded = Known(table.elem, (*ids, table.shape[-1]))
    return [embedded, Known(TensorProto.INT32, ids[:1]), embedded]


def _gather_codes(op: Op, given: list[Known]) -> list[Known]:
    """Gather from a table of codes, of which bytes hold several."""
    table, indices, scales = given[:3]
    if not table.shape or indices.shape is None:
        return []
    axis = int(op.attr("gather_axis", 0)) % len(table.shape)
    width = table.shape[-1]
    if width is not None and table.elem == TensorProto.UINT8:
        width *= 8 // int(op.attr("bits", 4))
    sizes = (*table.shape[:-1], width)
    return [Known(scales.elem, (*sizes[:axis], *indices.shape, *sizes[axis + 1 :]))]


_LIKE_FIRST = frozenset(
    {"BiasAdd", "BiasGelu", "BiasSoftmax", "FastGelu", "GatedAdd", "GatedRMSNorm", "Gelu", "GroupNorm", "Inverse"}
    | {"MRotaryEmbedding", "MoE", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax", "QMoE", "QuickGelu"}
    | {"RotaryEmbedding", "ScaledSiLU", "SimplifiedLayerNormalization", "Trilu"}
)

RULES: dict[str, Rule] = {
    **attention_shapes.RULES,
    **dict.fromkeys(_LIKE_FIRST, like(0)),
    **dict.fromkeys(("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul"), _fused_matmul),
    **dict.fromkeys(("MatMulBnb4", "MatMulFpQ4", "MatMulNBits", "MatMulNBitsMlp"), _columns("N")),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat"), _matmul(TensorProto.FLOAT)),
    **dict.fromkeys(("NhwcConv", "NhwcFusedConv"), _inferred("Conv", 1, last=True)),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _broadcast(0, 3)),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), like(0, 3)),
    "BiasSplitGelu": _split_gelu,
    "CausalConvWithState": _causal_conv,
    "EmbedLayerNormalization": _embed,
    "FusedConv": _inferred("Conv"),
    "FusedGemm": _inferred("Gemm"),
    "GatherBlockQuantized": _gather_codes,
    "GemmFastGelu": _matmul(),
    "MatMulInteger16": _matmul(TensorProto.INT32),
    "MatMulNBitsQkv": _columns("Nq", "Nkv", "Nkv"),
    "NhwcMaxPool": _inferred("MaxPool", last=True),
    "QGemm": _quantized_gemm,
    "QLinearAveragePool": _quantized_average_pool,
    "QLinearConcat": _quantized_concat,
    "QLinearConv": _inferred("QLinearConv", 3),
    "QLinearGlobalAveragePool": _quantized_global_pool,
    "QLinearWhere": _broadcast(1, 0, 4),
    "SkipGroupNorm": like(0, 1),
}
