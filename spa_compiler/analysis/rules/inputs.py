"""What many rules ask of a node: inputs and outputs that may be left out, stored ones, axes counted from the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Array, Axis, Facts
from spa_compiler.graph.fold import constant_values
from spa_compiler.graph.weights import array_of


def given(node: gs.Node, place: int) -> Any | None:
    """Input `place`, None if it is left out."""
    return node.inputs[place] if len(node.inputs) > place and node.inputs[place].name else None


def made(node: gs.Node, place: int) -> Any | None:
    """Output `place`, None if it is left out."""
    return node.outputs[place] if len(node.outputs) > place and node.outputs[place].name else None


def stored(tensor: Any) -> bool:
    """Whether the tensor's values are stored in the file."""
    return isinstance(tensor, gs.Constant) or bool(tensor.inputs and tensor.inputs[0].op == "Constant")


def stored_values(tensor: Any) -> Array:
    """The values of a stored tensor; of one of the analysed graph, those of the model as it was."""
    if isinstance(tensor, gs.Constant):
        return array_of(tensor)
    return array_of(gs.Constant(tensor.name, constant_values(tensor.inputs[0])))


def pin_stored_sum(node: gs.Node, facts: Facts, factors: Sequence[Any], axis: int) -> None:
    """Pins an axis of the last factor that is summed over where all factors are stored: no mask reaches what goes."""
    if all(stored(tensor) for tensor in factors):
        facts.pin(node.op, factors[-1], axis, "summed over stored values")


def axis_of(node: gs.Node, rank: int, default: int, name: str = "axis") -> int:
    """An attribute that numbers an axis, counted from 0."""
    axis = int(node.attrs.get(name, default))
    return axis + rank if axis < 0 else axis


def pin_matrix(node: gs.Node, facts: Facts, tensor: Any, reason: str) -> None:
    """Pins the last two axes of a tensor, the rows and columns of its matrices."""
    rank = len(facts.axes[tensor.name])
    for axis in range(rank - 2, rank):
        facts.pin(node.op, tensor, axis, reason)


def pin_window(node: gs.Node, facts: Facts, tensor: Any, reason: str) -> None:
    """Pins every axis of a tensor of indices or sizes, where there is one."""
    if tensor is not None and facts.of(tensor) is not None:
        facts.pin_tensor(node.op, tensor, reason, window=True)


def put_outputs(node: gs.Node, facts: Facts, axes: Sequence[Axis]) -> None:
    """All outputs have the same axes."""
    for output in node.outputs:
        if output.name:
            facts.put(output, axes)
