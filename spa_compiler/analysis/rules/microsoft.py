"""ONNX Runtime's own operators (domain com.microsoft), which its optimizer and exporters put in place of patterns.

Attention is in `microsoft_attention`; normalizations, convolutions and quantized operators are with their families.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Facts, Pin, Rule
from spa_compiler.analysis.rules.attention import lay, sizes
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast
from spa_compiler.analysis.rules.elementwise import nary, unary
from spa_compiler.analysis.rules.indexing import trilu
from spa_compiler.analysis.rules.inputs import given, pin_matrix, put_outputs
from spa_compiler.analysis.rules.linear import gemm, product
from spa_compiler.analysis.rules.microsoft_attention import INSIDE
from spa_compiler.analysis.rules.opaque import pinned


def fused_matmul(node: gs.Node, facts: Facts) -> str | None:
    """MatMul of operands that may be transposed: the last two axes, or axis 0 to behind the batch (`transBatch`)."""
    return product(node, facts, lambda place, rank: _matrix_order(node, rank, "AB"[place]))


def _matrix_order(node: gs.Node, rank: int, side: str) -> list[int]:
    """The axes of an operand as batch, rows, columns; a vector is never transposed."""
    order = list(range(rank))
    if rank > 1:
        if node.attrs.get(f"transBatch{side}", 0):
            order = [*order[1:-1], 0, order[-1]]
        if node.attrs.get(f"trans{side}", 0):
            order[-2:] = order[:-3:-1]
    return order


def fused_matmul_activation(node: gs.Node, facts: Facts) -> str | None:
    """FusedMatMul and an activation."""
    return _activated(node) or fused_matmul(node, facts)


def fused_gemm(node: gs.Node, facts: Facts) -> str | None:
    """Gemm and an activation."""
    return _activated(node) or gemm(node, facts)


def _activated(node: gs.Node) -> str | None:
    name = node.attrs.get("activation", "")
    return None if name in _POINTWISE else f"{name} of a product"  # Softmax would see the whole axis


_POINTWISE = frozenset({"Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh"})


def bias_split_gelu(node: gs.Node, facts: Facts) -> str | None:
    """X [.., (2, C)] + bias: the left half times the Gelu of the right one -> [.., C]."""
    x, added = node.inputs[:2]
    axes = facts.of(x)
    if axes is None or facts.of(added) is None:
        return UNKNOWN_RANK
    two, half = facts.algebra.fresh(2), facts.algebra.fresh((sizes(facts, x)[-1] or 0) // 2 or None)
    whole = facts.algebra.merge([two, half])
    lay(node, facts, x, {len(axes) - 1: whole})
    lay(node, facts, added, {0: whole})
    facts.pins.append(Pin(x.name, len(axes) - 1, node.op, "the two halves of a gate", (two,), window=True))
    facts.put(node.outputs[0], (*axes[:-1], half))
    return None


def linear_attention_gate(node: gs.Node, facts: Facts) -> str | None:
    """a [B, T, H], its bias [H] and scale [H], b [B, T, H] -> decay, beta: element by element."""
    first = facts.of(node.inputs[0])
    if first is None or any(facts.of(tensor) is None for tensor in node.inputs if tensor.name):
        return UNKNOWN_RANK
    operands = [(tensor, range(len(facts.axes[tensor.name]))) for tensor in node.inputs if tensor.name]
    put_outputs(node, facts, broadcast(node, facts, operands))
    return None


def mixture_of_experts(node: gs.Node, facts: Facts) -> str | None:
    """X [.., D], router [N, E], weights [E, (F, I), D], bias, [E, D, I], bias [E, D], [E, I, D], bias -> [.., D]."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None or any(facts.of(tensor) is None for tensor in node.inputs if tensor.name):
        return UNKNOWN_RANK
    outer = axes[-1]
    for place, number in ((2, 2), (4, 1), (5, 1), (6, 2)):
        lay(node, facts, given(node, place), {number: outer})
    for place in range(1, 8):
        tensor = given(node, place)
        if tensor is None:
            continue
        for axis in range(len(facts.axes[tensor.name])):
            if (place, axis) not in {(2, 2), (4, 1), (5, 1), (6, 2)}:
                chosen = axis == (1 if place == 1 else 0)
                facts.pin(node.op, tensor, axis, "chosen by the router" if chosen else INSIDE, window=place == 1)
    facts.put(node.outputs[0], axes)
    return None


def inverse(node: gs.Node, facts: Facts) -> str | None:
    """Of matrices on the last two axes, which stay."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    pin_matrix(node, facts, x, "rows and columns of a matrix")
    facts.put(node.outputs[0], axes)
    return None


PACKED = "weights are packed in blocks of bits"

_REFUSED: Sequence[tuple[str, str]] = (
    (PACKED, "GatherBlockQuantized MatMulBnb4 MatMulFpQ4 MatMulNBits MatMulNBitsMlp MatMulNBitsQkv QMoE"),
    (PACKED, "MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight"),
    ("codes with scales of their own", "GemmFloat8 MatMulInteger16 QAttention QOrderedMatMul"),
    ("sequences are packed without padding", "PackedAttention PackedMultiHeadAttention PagedAttention"),
    ("a cache in an order of its own", "DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention"),
    ("attention with a layout of its own", "DynamicSparseAttention LongformerAttention SparseAttention"),
    ("sections of the rotary tables", "MRotaryEmbedding"),
)

MICROSOFT: dict[str, Rule] = {
    **{name: pinned(reason) for reason, names in _REFUSED for name in names.split()},
    **dict.fromkeys(("BiasAdd", "BiasGelu", "FastGelu", "GatedAdd"), nary),
    **dict.fromkeys(("Gelu", "QuickGelu", "ScaledSiLU"), unary),
    "BiasSplitGelu": bias_split_gelu,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "FusedMatMulActivation": fused_matmul_activation,
    "Inverse": inverse,
    "LinearAttentionGate": linear_attention_gate,
    "MoE": mixture_of_experts,
    "TransposeMatMul": fused_matmul,
    "Trilu": trilu,
}
