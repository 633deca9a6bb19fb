"""What many rules ask of a node: inputs that may be left out, and axes counted from the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts


def given(node: gs.Node, place: int) -> Any | None:
    """Input `place`, None if it is left out."""
    return node.inputs[place] if len(node.inputs) > place and node.inputs[place].name else None


def axis_of(node: gs.Node, rank: int, default: int, name: str = "axis") -> int:
    """An attribute that numbers an axis, counted from 0."""
    axis = int(node.attrs.get(name, default))
    return axis + rank if axis < 0 else axis


def pin_window(node: gs.Node, facts: Facts, tensor: Any, reason: str) -> None:
    """Pins every axis of a tensor of indices or sizes, where there is one."""
    if tensor is not None and facts.of(tensor) is not None:
        facts.pin_tensor(node.op, tensor, reason, window=True)


def put_outputs(node: gs.Node, facts: Facts, axes: Sequence[Axis]) -> None:
    """All outputs have the same axes."""
    for output in node.outputs:
        if output.name:
            facts.put(output, axes)
