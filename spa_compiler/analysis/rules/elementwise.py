"""Element by element: axes pass through, and operands that broadcast together are joined where they meet.

That holds whatever the function does to a zero, as a unit is masked where its activations are read, not where they are
made. Constants take part like all other operands: a `[C, 1, 1]` scale is sliced with the channel it scales.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK, broadcast


def unary(node: gs.Node, facts: Facts) -> str | None:
    """Outputs have the axes of the first input; any further inputs are scalars."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    if any(facts.of(other) and len(facts.axes[other.name]) and _wide(facts, other.name) for other in node.inputs[1:]):
        return "a parameter of this operator is no scalar"
    for output in node.outputs:
        if output.name:
            facts.put(output, axes)
    return None


def nary(node: gs.Node, facts: Facts) -> str | None:
    """Multidirectional broadcasting of all inputs."""
    operands = [tensor for tensor in node.inputs if tensor.name]
    if any(facts.of(tensor) is None for tensor in operands):
        return UNKNOWN_RANK
    ranks = [(tensor, range(len(facts.axes[tensor.name]))) for tensor in operands]
    facts.put(node.outputs[0], broadcast(node, facts, ranks))
    return None


def dropout(node: gs.Node, facts: Facts) -> str | None:
    """As `unary` at inference; in training mode the numbers drawn hang on the shape."""
    if len(node.inputs) > 2 and node.inputs[2].name:
        mode = facts.value(node.inputs[2])
        if mode is None or mode.any():
            return "dropout that may be in training mode"
    return unary(node, facts)


def cast_like(node: gs.Node, facts: Facts) -> str | None:
    """The second input gives its type alone."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    facts.put(node.outputs[0], axes)
    return None


def _wide(facts: Facts, name: str) -> bool:
    return any(facts.algebra.size(axis) != 1 for axis in facts.axes[name])


_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid
    Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""
_NARY = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
    Mul Or PRelu Pow Sub Sum SwiGLU Where Xor
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), unary),
    **dict.fromkeys(_NARY.split(), nary),
    "CastLike": cast_like,
    "Dropout": dropout,
}
