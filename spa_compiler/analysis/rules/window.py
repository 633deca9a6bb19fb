"""Windows over positions, as facts: the part that convolutions, pools and other operators on images share.

What an operator mixes is pinned. Positions that it keeps apart pass like all other axes, and so they can go where
something else removes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Axis, Facts, Pin

Size: TypeAlias = "int | None"


def one_by_one(node: gs.Node, kernel: Sequence[Size]) -> list[bool]:
    """For each spatial axis, whether the window is a single position that moves in steps of 1 and meets no padding."""
    count = len(kernel)
    attrs = node.attrs
    strides = attrs.get("strides") or [1] * count
    pads = attrs.get("pads") or [0] * 2 * count
    extra = attrs.get("output_padding") or [0] * count
    if attrs.get("output_shape") or len(strides) != count or len(pads) != 2 * count or len(extra) != count:
        return [False] * count
    return [
        kernel[axis] == 1 and strides[axis] == 1 and not (pads[axis] or pads[count + axis] or extra[axis])
        for axis in range(count)
    ]


def put_mixed(node: gs.Node, facts: Facts, axes: Sequence[Axis | None], reason: str) -> None:
    """States the axes of the first output.

    Args:
        axes: None stands for positions that the operator mixes: a new axis, pinned together with the axis of the first
            input at the same place.
    """
    x, y = node.inputs[0], node.outputs[0]
    sizes = _sizes(y, len(axes))
    facts.put(y, [facts.algebra.fresh(size) if axis is None else axis for axis, size in zip(axes, sizes, strict=True)])
    for place, axis in enumerate(axes):
        for tensor in (x, y):
            if axis is None and place < len(facts.axes[tensor.name]):
                facts.pin(node.op, tensor, place, reason, window=True)


def pin_part(node: gs.Node, facts: Facts, tensor: Any, axis: int, part: Axis, reason: str) -> None:
    """Pins one factor of an axis of a tensor; what is merged with it stays free."""
    facts.pins.append(Pin(tensor.name, axis, node.op, reason, (part,)))


def _sizes(tensor: Any, rank: int) -> list[Size]:
    if tensor.shape is None or len(tensor.shape) != rank:
        return [None] * rank
    return [size if isinstance(size, int) and size >= 0 else None for size in tensor.shape]
