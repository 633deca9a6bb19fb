"""Quantization: codes have the axes of what they stand for, and scales and zero points follow the axis they belong to.

A code that is masked is 0, which does not stand for zero unless the zero point is 0 too. That matters where codes are
summed up: with another zero point, a removed index would take something from the sum, so it stays. What quantizes a
masked tensor makes zero points of its zeros, and needs no mask of its own. A range that is measured always spans zero,
so it does not move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Incompatible, Pin, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast
from spa_compiler.analysis.rules.inputs import axis_of, given, pin_stored_sum, put_outputs, stored
from spa_compiler.analysis.rules.window import pin_part

_OFFSET = "summed over codes whose zero point is not 0"


def linear_map(node: gs.Node, facts: Facts) -> str | None:
    """QuantizeLinear and DequantizeLinear: one scale, one per index of `axis`, or one per block along it."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None or any(facts.of(tensor) is None for tensor in node.inputs[1:] if tensor.name):
        return UNKNOWN_RANK
    axis, scale, zero = axis_of(node, len(axes), 1), node.inputs[1], given(node, 2)
    if _wide(facts, scale):
        if len(facts.axes[scale.name]) > 1:
            _blocks(node, facts, scale, axis)
        elif axis < len(axes):
            facts.couple(node, scale, 0, axes[axis])
        else:
            return "a scale on an axis that is not there"
        if zero is not None:
            for place, own in enumerate(facts.axes[scale.name]):
                facts.couple(node, zero, place, own)
    facts.put(node.outputs[0], axes)
    if node.op == "QuantizeLinear" and not stored(x):
        facts.silent.add(node.outputs[0].name)
    return None


def _blocks(node: gs.Node, facts: Facts, scale: Any, axis: int) -> None:
    """The scale has the rank of x and one index per block of `axis`; a block goes as a whole."""
    x, axes = node.inputs[0], facts.axes[node.inputs[0].name]
    for place, (own, whole) in enumerate(zip(facts.axes[scale.name], axes, strict=True)):
        if place != axis:
            facts.couple(node, scale, place, whole)
            continue
        count, total = facts.algebra.size(own), facts.algebra.size(whole)
        size = int(node.attrs.get("block_size", 0)) or 1
        if count is None or total is None or count * size != total:
            for tensor in (x, scale):
                facts.pin(node.op, tensor, axis, "blocks of one scale that do not fill the axis")
            continue
        try:
            blocks, inside = facts.algebra.factor(whole, [count, size])
        except Incompatible as error:
            facts.pins.append(Pin(x.name, axis, node.op, f"blocks of one scale: {error}", (whole, own)))
            continue
        facts.algebra.name(blocks, "block of one scale")
        facts.couple(node, scale, axis, blocks)
        if size > 1:
            pin_part(node, facts, x, axis, inside, "inside of a block of one scale")


def dynamic_quantize(node: gs.Node, facts: Facts) -> str | None:
    """The range is that of all of x and of zero, so zeros do not change it. Scale and zero point are scalars. Of stored
    values no zeros are read but all of them, so they stay.
    """
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    facts.put(node.outputs[0], axes)
    if stored(node.inputs[0]):
        facts.pin_tensor(node.op, node.inputs[0], "the range of stored values")
    else:
        facts.silent.add(node.outputs[0].name)
    for output in node.outputs[1:]:
        if output.name:
            facts.put(output, ())
    return None


def matmul_integer(node: gs.Node, facts: Facts) -> str | None:
    """A [.., m, k] and B [.., k, n] as in MatMul; zero points may have an index per row of A and per column of B."""
    return _product(node, facts, (0, 1), rows=(2,), columns=(3,), zeros=(2, 3))


def qlinear_matmul(node: gs.Node, facts: Facts) -> str | None:
    """As MatMulInteger; the scales are like the zero points, and those of Y are like those of A."""
    return _product(node, facts, (0, 3), rows=(1, 2, 6, 7), columns=(4, 5), zeros=(2, 5))


def matmul_integer_to_float(node: gs.Node, facts: Facts) -> str | None:
    """A, B, scale of A, scale of B, their zero points, bias."""
    return _product(node, facts, (0, 1), rows=(2, 4), columns=(3, 5, 6), zeros=(4, 5))


def dynamic_quantize_matmul(node: gs.Node, facts: Facts) -> str | None:
    """A (quantized on the fly, see `dynamic_quantize`), B, scale and zero point of B, bias."""
    return _product(node, facts, (0, 1), rows=(), columns=(2, 3, 4))


def _product(
    node: gs.Node,
    facts: Facts,
    operands: tuple[int, int],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    zeros: tuple[int, ...] = (),
) -> str | None:
    """A matrix product, with parameters per row and per column: scalars, vectors, or [.., m, 1] and [.., 1, n].

    Args:
        zeros: the inputs that are the zero points of the operands, where these are codes.
    """
    a, b = (node.inputs[place] for place in operands)
    if any(facts.of(tensor) is None for tensor in node.inputs if tensor.name):
        return UNKNOWN_RANK
    left, right = facts.axes[a.name], facts.axes[b.name]
    if not left or not right:
        return "a product with a scalar"
    inner = max(len(right) - 2, 0)
    facts.couple(node, b, inner, left[-1])
    pin_stored_sum(node, facts, (a, b), inner)
    if zeros and not _zeros_vanish(node, facts, dict(zip(operands, zeros, strict=True))):
        facts.pin(node.op, b, inner, _OFFSET)
    batch = [(a, range(len(left) - 2)), (b, range(len(right) - 2))]
    result = broadcast(node, facts, batch) if max(len(left), len(right)) > 2 else []
    row, column = [left[-2]] if len(left) > 1 else [], [right[-1]] if len(right) > 1 else []
    whole = [*result, *row, *column]
    for places, side in ((rows, row), (columns, column)):
        for place in places:
            if (parameter := given(node, place)) is not None:
                _along(node, facts, parameter, side, whole)
    facts.put(node.outputs[0], whole)
    facts.work(node, [*result, *row, right[inner], *column], 1)
    return None


def _zeros_vanish(node: gs.Node, facts: Facts, zeros: Mapping[int, int]) -> bool:
    """Whether a product with masked codes is nothing: an operand that is masked (constants are not) has zero point 0.

    Args:
        zeros: operand -> its zero point.
    """
    for place, zero in zeros.items():
        operand, point = node.inputs[place], given(node, zero)
        if operand.name in facts.silent:
            return True
        value = None if point is None else facts.value(point)
        if not stored(operand) and (point is None or (value is not None and not value.any())):
            return True
    return False


def qgemm(node: gs.Node, facts: Facts) -> str | None:
    """A' [m, k], its scale and zero point, B' [k, n], its scales and zero points, bias [n], those of Y."""
    if any(facts.of(tensor) is None for tensor in node.inputs if tensor.name):
        return UNKNOWN_RANK
    a, b = node.inputs[0], node.inputs[3]
    row, inner = _ordered(facts.axes[a.name], node.attrs.get("transA", 0))
    inner_b, column = _ordered(facts.axes[b.name], node.attrs.get("transB", 0))
    along = 1 if node.attrs.get("transB", 0) else 0
    facts.couple(node, b, along, inner)
    pin_stored_sum(node, facts, (a, b), along)
    if not _zeros_vanish(node, facts, {0: 2, 3: 5}):
        facts.pin(node.op, b, along, _OFFSET)
    for place in (4, 5, 6):
        if (parameter := given(node, place)) is not None:
            _along(node, facts, parameter, [column], [row, column])
    facts.put(node.outputs[0], [row, column])
    facts.work(node, [row, inner_b, column], 1)
    return None


def _ordered(axes: Sequence[Axis], transposed: int) -> Sequence[Axis]:
    return axes[::-1] if transposed else axes


def _along(node: gs.Node, facts: Facts, parameter: Any, side: Sequence[Axis], whole: Sequence[Axis]) -> None:
    """A vector lies along its side of the product, a tensor of higher rank along all axes of the result."""
    own = facts.axes[parameter.name]
    targets = side if len(own) == 1 else whole[max(len(whole) - len(own), 0) :]
    for place, (axis, other) in enumerate(zip(own, targets, strict=False)):
        if facts.algebra.size(axis) != 1:
            facts.couple(node, parameter, place, other)


def elementwise(node: gs.Node, facts: Facts, operands: tuple[int, ...]) -> str | None:
    """Element by element on codes; scales and zero points are scalars."""
    if any(facts.of(tensor) is None for tensor in node.inputs if tensor.name):
        return UNKNOWN_RANK
    for place, tensor in enumerate(node.inputs):
        if tensor.name and place not in operands and _wide(facts, tensor):
            return "a scale or zero point that is no scalar"
    chosen = [node.inputs[place] for place in operands]
    put_outputs(node, facts, broadcast(node, facts, [(t, range(len(facts.axes[t.name]))) for t in chosen]))
    return None


def qlinear_binary(node: gs.Node, facts: Facts) -> str | None:
    """A, scale and zero point of A, B, those of B, those of C."""
    return elementwise(node, facts, (0, 3))


def qlinear_unary(node: gs.Node, facts: Facts) -> str | None:
    """X, its scale and zero point, those of Y."""
    return elementwise(node, facts, (0,))


def qlinear_concat(node: gs.Node, facts: Facts) -> str | None:
    """Scale and zero point of Y, then each X with its own."""
    parts = node.inputs[2::3]
    if any(facts.of(tensor) is None for tensor in parts):
        return UNKNOWN_RANK
    axes = facts.axes[parts[0].name]
    axis = axis_of(node, len(axes), 0)
    for tensor in parts[1:]:
        for place, own in enumerate(axes):
            if place != axis:
                facts.couple(node, tensor, place, own)
    joined = facts.algebra.concat([facts.axes[tensor.name][axis] for tensor in parts])
    facts.put(node.outputs[0], [*axes[:axis], joined, *axes[axis + 1 :]])
    return None


def _wide(facts: Facts, tensor: Any) -> bool:
    return any(facts.algebra.size(axis) != 1 for axis in facts.axes[tensor.name])


RULES: dict[str, Rule] = {
    "DequantizeLinear": linear_map,
    "DynamicQuantizeLinear": dynamic_quantize,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": qlinear_matmul,
    "QuantizeLinear": linear_map,
}
MICROSOFT: dict[str, Rule] = {
    "DequantizeLinear": linear_map,
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "QGemm": qgemm,
    "QLinearAdd": qlinear_binary,
    "QLinearConcat": qlinear_concat,
    "QLinearLeakyRelu": qlinear_unary,
    "QLinearMul": qlinear_binary,
    "QLinearSigmoid": qlinear_unary,
    "QuantizeLinear": linear_map,
}
