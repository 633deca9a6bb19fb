"""Transposed convolutions that are a product: where their windows do not overlap, or move by a pixel at a time.

With a stride as large as the kernel, a pixel becomes kernel x kernel pixels of its own: a product with rows
(y, x, output), whose channels then become pixels (`image_unfold`). With a stride of 1 it is a convolution with the
kernel turned around.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.weights import array_of
from spa_compiler.kernels.window import Window

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution as another layer.

    Attributes:
        op: with the weight [n, k] of that layer.
        bias: [n].
        window: of the convolution that it is; None: a product.
        grow: rows and columns of pixels that its channels then become, (y, x, output).
    """

    op: WeightedOp
    bias: F32 | None
    window: Window | None
    grow: tuple[int, int]


def find_transposed(node: gs.Node) -> Transposed | tuple[WeightedOp, str] | None:
    """A ConvTranspose with a constant float32 weight as another layer.

    Returns:
        The operator and the reason, if it is no other layer; None for other operators.
    """
    weight = node.inputs[1] if node.op == "ConvTranspose" and not node.domain and len(node.inputs) > 1 else None
    if not isinstance(weight, gs.Constant) or weight.dtype != np.float32 or not isinstance(node.inputs[0], gs.Variable):
        return None
    made = _as_layer(node, weight)
    if isinstance(made, Transposed):
        return made
    values = array_of(weight)
    return WeightedOp(node, "ConvTranspose", weight, values.shape[1], values.size // values.shape[1]), made


def _as_layer(node: gs.Node, weight: gs.Constant) -> Transposed | str:
    values, attrs = array_of(weight), node.attrs
    axes, bias = values.ndim - 2, None
    if axes not in (1, 2):
        return f"one over {axes} axes has no sparse kernel"
    size = values.shape[2:]
    stride, dilation = (tuple(attrs.get(key) or [1] * axes) for key in ("strides", "dilations"))
    pads = list(attrs.get("pads") or [0] * (2 * axes))
    if len(node.inputs) > 2:
        if not isinstance(node.inputs[2], gs.Constant):
            return "its bias is not constant"
        bias = np.asarray(array_of(node.inputs[2]), np.float32)
    if attrs.get("group", 1) != 1 or attrs.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in attrs:
        return "one with groups, or whose padding depends on the size of the input, has no sparse kernel"
    if any(attrs.get("output_padding") or []):
        return "one whose output is padded has no sparse kernel"
    if stride == size and not any(pads) and all(step == 1 for step in dilation):
        rows = np.moveaxis(values, (0, 1), (-1, -2)).reshape(-1, len(values))  # (y, x, output), input
        grow = (1, *size) if axes == 1 else size
        repeated = None if bias is None else np.tile(bias, len(rows) // len(bias))
        return Transposed(_op(node, weight, rows), repeated, None, (int(grow[0]), int(grow[1])))
    seen = [(s - 1) * d - pad for s, d, pad in zip(size * 2, dilation * 2, pads, strict=True)]
    if any(step != 1 for step in stride) or min(seen) < 0:
        return "one whose windows overlap has no sparse kernel"
    turned = np.flip(values, tuple(range(2, values.ndim))).swapaxes(0, 1)
    lead = (1,) * (2 - axes)
    top, bottom = [0] * (2 - axes) + seen[:axes], [0] * (2 - axes) + seen[axes:]
    window = Window(
        len(values),
        (*lead, *size),
        (1, 1),
        (*lead, *dilation),
        (*top, *bottom),
        axes,
    )
    return Transposed(_op(node, weight, turned.reshape(len(turned), -1)), bias, window, (1, 1))


def _op(node: gs.Node, weight: gs.Constant, rows: NDArray[np.float32]) -> WeightedOp:
    values = np.ascontiguousarray(rows, np.float32)
    n, k = values.shape
    size = tuple(int(s) for s in array_of(weight).shape[2:])
    return WeightedOp(node, "ConvTranspose", gs.Constant(weight.name, values), n, k, 1, size)
