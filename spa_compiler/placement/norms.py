"""LayerNormalization and RMS normalization over the last axis, as one op or as exporters decompose them.

x - ReduceMean - Sub - Pow - ReduceMean - Add epsilon - Sqrt - Div - Mul gamma - Add beta
x - Pow - ReduceMean - Add epsilon - Sqrt - Div (or Reciprocal, Div 1, and Mul) - Mul gamma
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.graph.model import Model
from spa_compiler.graph.weights import array_of
from spa_compiler.placement.sites import held, only_reader

F32 = NDArray[np.float32]


@dataclass(eq=False)
class NormSite:
    """(source - mean) / sqrt(variance + epsilon) * gamma + beta over the last axis, computed by `nodes`.

    Without a `beta` it is the RMS norm: no mean is taken off, and the variance is the mean of squares.
    """

    source: gs.Variable
    output: gs.Variable
    nodes: list[gs.Node]
    gamma: F32
    beta: F32 | None
    epsilon: float

    @property
    def name(self) -> str:
        return str(self.nodes[-1].name or self.output.name)

    @property
    def features(self) -> int:
        return len(self.gamma)


#: SimplifiedLayerNormalization is ONNX Runtime's; it is in the standard domain in files that its optimizer wrote.
_RMS_OPS = {"RMSNormalization": ("",), "SimplifiedLayerNormalization": ("", "com.microsoft")}


def find_norms(model: Model) -> list[NormSite]:
    """Every norm over the last axis with constant float32 parameters, in topological order."""
    found: list[NormSite] = []
    outputs, taken = held(model.graph), set[int]()
    for node in model.graph.nodes:
        site = None
        if id(node) in taken:  # the second half of a LayerNormalization is the RMS norm of what is centred
            continue
        if node.op == "LayerNormalization" and not node.domain:
            site = _operator(node, outputs)
        elif node.op in _RMS_OPS and node.domain in _RMS_OPS[node.op]:
            site = _rms_operator(node, outputs)
        elif node.op == "ReduceMean":
            site = _decomposed(node, outputs) or _rms(node, outputs)
        if site is not None:
            found.append(site)
            taken |= {id(n) for n in site.nodes}
    return found


def _vector(tensor: gs.Tensor, rank: int | None = None) -> F32 | None:
    """A float32 constant [features], leading 1s allowed up to `rank` axes."""
    if not isinstance(tensor, gs.Constant) or tensor.dtype != np.float32 or len(tensor.shape) > (rank or 1):
        return None
    values = array_of(tensor)
    return values.reshape(-1) if values.ndim and values.size == values.shape[-1] and values.size > 1 else None


def _of_last_axis(node: gs.Node, outputs: Sequence[gs.Variable]) -> bool:
    """Whether an operator normalizes the last axis, and nobody reads its statistics."""
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    axis = int(node.attrs.get("axis", -1))
    if axis != -1 and (rank is None or axis != rank - 1):
        return False
    return not any(o.outputs or any(o is held for held in outputs) for o in node.outputs[1:])


def _rms_operator(node: gs.Node, outputs: Sequence[gs.Variable]) -> NormSite | None:
    source = node.inputs[0]
    if not isinstance(source, gs.Variable) or not _of_last_axis(node, outputs):
        return None
    # where sums are taken in another type than float32, the float32 kernel is no replacement
    if int(node.attrs.get("stash_type", 1)) != 1 or len(node.inputs) != 2:
        return None
    gamma = _vector(node.inputs[1], None if source.shape is None else len(source.shape))
    if gamma is None or not _fits(source, gamma):
        return None
    return NormSite(source, node.outputs[0], [node], gamma, None, float(node.attrs.get("epsilon", 1e-5)))


def _rms(mean: gs.Node, outputs: Sequence[gs.Variable]) -> NormSite | None:
    """Pow or Mul, ReduceMean, Add, Sqrt, then x over it, each step but the source read by the next alone."""
    squared = mean.inputs[0]
    square = squared.inputs[0] if isinstance(squared, gs.Variable) and len(squared.inputs) == 1 else None
    if square is None or square.domain or only_reader(squared, outputs) is not mean or not _over_last(mean):
        return None
    source = square.inputs[0]
    if not isinstance(source, gs.Variable) or not _is_square(square, source):
        return None
    add = _then(mean, "Add", outputs)
    root = _then(add, "Sqrt", outputs)
    epsilon = None if add is None else _scalar(add)
    found = None if root is None or epsilon is None else _over(source, root, outputs)
    if add is None or root is None or epsilon is None or found is None:
        return None
    scale = _then(found[-1], "Mul", outputs)
    gamma = None if scale is None else _operand(scale, found[-1].outputs[0])
    if scale is None or gamma is None or not _fits(source, gamma):
        return None
    nodes = [square, mean, add, root, *found, scale]
    return NormSite(source, scale.outputs[0], nodes, gamma, None, epsilon)


def _over(source: gs.Variable, root: gs.Node, outputs: Sequence[gs.Variable]) -> list[gs.Node] | None:
    """The nodes of source / root: Div, or the reciprocal and Mul."""
    reader = only_reader(root.outputs[0], outputs)
    if reader is None or reader.domain:
        return None
    if reader.op == "Div" and reader.inputs[0] is source and reader.inputs[1] is root.outputs[0]:
        return [reader]
    inverse = reader.op == "Reciprocal" or (
        reader.op == "Div" and reader.inputs[1] is root.outputs[0] and _scalar(reader) == 1.0
    )
    product = _then(reader, "Mul", outputs) if inverse else None
    if product is None or not any(i is source for i in product.inputs):
        return None
    return [reader, product]


def _operator(node: gs.Node, outputs: Sequence[gs.Variable]) -> NormSite | None:
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    if not _of_last_axis(node, outputs):
        return None
    gamma = _vector(node.inputs[1], rank)
    beta = _vector(node.inputs[2], rank) if len(node.inputs) > 2 and node.inputs[2].name else None
    if gamma is None or (beta is None and len(node.inputs) > 2 and node.inputs[2].name):
        return None
    beta = np.zeros_like(gamma) if beta is None else beta
    if not _fits(node.inputs[0], gamma, beta):
        return None
    return NormSite(node.inputs[0], node.outputs[0], [node], gamma, beta, float(node.attrs.get("epsilon", 1e-5)))


def _decomposed(mean: gs.Node, outputs: Sequence[gs.Variable]) -> NormSite | None:
    """ReduceMean, Sub, Pow or Mul, ReduceMean, Add, Sqrt, Div, Mul, Add, each step read by the next alone."""
    source = mean.inputs[0]
    sub = _then(mean, "Sub", outputs) if _over_last(mean) else None
    if sub is None or sub.inputs[0] is not source:
        return None
    centred = sub.outputs[0]
    square = next((n for n in centred.outputs if _is_square(n, centred)), None)
    variance = _then(square, "ReduceMean", outputs)
    add = _then(variance, "Add", outputs)
    root = _then(add, "Sqrt", outputs)
    div = _then(root, "Div", outputs)
    scale = _then(div, "Mul", outputs)
    shift = _then(scale, "Add", outputs)
    if not (square and variance and add and root and div and scale and shift):
        return None
    if div.inputs[0] is not centred or not _over_last(variance) or any(centred is o for o in outputs):
        return None
    if any(n is not square and n is not div for n in centred.outputs):
        return None
    epsilon = _scalar(add)
    gamma, beta = _operand(scale, div.outputs[0]), _operand(shift, scale.outputs[0])
    if epsilon is None or gamma is None or beta is None or not _fits(source, gamma, beta):
        return None
    nodes = [mean, sub, square, variance, add, root, div, scale, shift]
    return NormSite(source, shift.outputs[0], nodes, gamma, beta, epsilon)


def _then(node: gs.Node | None, op: str, outputs: Sequence[gs.Variable]) -> gs.Node | None:
    """The one reader of a node's result, if it is an `op`."""
    reader = None if node is None else only_reader(node.outputs[0], outputs)
    return reader if reader is not None and reader.op == op and not reader.domain else None


def _fits(source: gs.Variable, *parameters: F32) -> bool:
    """Whether the parameters have one value for each feature: they may not be what widens the result."""
    last = source.shape[-1] if source.shape else None
    sizes = {len(p) for p in parameters}
    return len(sizes) == 1 and (not isinstance(last, int) or last in sizes)


def _over_last(node: gs.Node) -> bool:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = array_of(node.inputs[1]).reshape(-1).tolist()
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    last = {-1} if rank is None else {-1, rank - 1}
    return bool(node.attrs.get("keepdims", 1)) and axes is not None and len(axes) == 1 and int(axes[0]) in last


def _is_square(node: gs.Node, x: gs.Variable) -> bool:
    if node.op == "Mul":
        return node.inputs[0] is x and node.inputs[1] is x
    return node.op == "Pow" and node.inputs[0] is x and _scalar(node) == 2.0


def _scalar(node: gs.Node) -> float | None:
    """The node's one scalar constant operand."""
    constants = [i for i in node.inputs if isinstance(i, gs.Constant) and int(np.prod(i.shape)) == 1]
    return float(array_of(constants[0]).reshape(())) if len(constants) == 1 else None


def _operand(node: gs.Node, x: gs.Variable) -> F32 | None:
    other = next((i for i in node.inputs if i is not x), None)
    return None if other is None else _vector(other, None if x.shape is None else len(x.shape))
