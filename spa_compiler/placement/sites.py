"""Sites: constant weights that meet activations, with the bias and the activation that a kernel takes along."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.errors import ModelError
from spa_compiler.graph.model import Model, scopes
from spa_compiler.graph.operators import WeightedOp, describe, weighted_ops
from spa_compiler.graph.weights import array_of, is_finite, nonzero
from spa_compiler.kernels.window import Window
from spa_compiler.placement import epilogue
from spa_compiler.placement.transposed import Transposed, find_transposed

F32 = NDArray[np.float32]

_MOST_AXES = 2  # that a window may have
_LARGEST = 1 << 15  # kernel, dilation, padding: sizes that C multiplies stay far from what integers hold
_SPELLED_OUT = 1 << 26  # elements of a weight whose groups are spelled out
_MOST_SKIPPED = 4  # a larger stride than this and than the kernel lays out what nobody reads


@dataclass(eq=False)
class Site:
    """act(W x + b) at one place of the graph.

    `source` is x, `output` the result, `nodes` what computes it now. `layout` is that of `kernels/panel.py`.
    A convolution that looks at more than a pixel has a `window`, its x is what the window sees there: k values a pixel.
    `residual` is set when a residual Add right behind the site is taken in, `term` when it is the sum of two sites:
    act(W x + V z + b + residual), with z and V those of the other one, whose bias is in `bias`. `factor` is what the
    result is multiplied with, as in SwiGLU. Of a transposed convolution, n is that of all pixels (y, x) that a pixel
    becomes, `grow` down and to the right.
    """

    op: WeightedOp
    layout: str
    source: gs.Variable
    output: gs.Variable
    nodes: list[gs.Node]
    bias: F32 | None
    act: str = "none"
    low: float = 0.0
    high: float = 0.0
    residual: gs.Variable | None = None
    factor: gs.Variable | None = None
    term: Site | None = None
    window: Window | None = None
    grow: tuple[int, int] = (1, 1)
    _weight: weakref.ref[F32] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def products(self) -> tuple[Site, ...]:
        """The sites whose products are added up here: this one, and the term."""
        return (self,) if self.term is None else (self, self.term)

    @property
    def n(self) -> int:
        return self.op.n

    @property
    def k(self) -> int:
        """Columns: those of all groups."""
        return self.op.k * self.op.group

    @property
    def own(self) -> F32:
        """[n, k / groups]: what the file holds, the columns of each output's own group."""
        return np.asarray(self.op.rows(), np.float32)

    @property
    def weight(self) -> F32:
        """[n, k]. Of a convolution with groups zeros stand where an output sees nothing of other groups.

        Made anew unless somebody still holds it: those of all sites take as much memory as the model.
        """
        found = None if self._weight is None else self._weight()
        if found is None:
            found = np.ascontiguousarray(_spelled_out(self.own, self.op.group))
            self._weight = weakref.ref(found)
        return found

    def pixels(self, shape: Sequence[int]) -> int:
        """Products with the weight at an input of `shape`: tokens, or pixels of the output."""
        if self.window is None:
            return math.prod(shape) // self.k if self.k else 0
        height, width = self.window.outputs(*([1] * (_MOST_AXES + 2 - len(shape))), *shape[2:])
        return shape[0] * height * width

    @property
    def density(self) -> float:
        """Share of the weight's elements that are not zero."""
        return float(nonzero(self.op.weight) / math.prod(self.op.weight.shape))


def _spelled_out(own: F32, groups: int) -> F32:
    """[n, k / groups] -> [n, k]: blocks along the diagonal."""
    if groups == 1:
        return own
    each, (n, k) = len(own) // groups, own.shape
    weight = np.zeros((n, k * groups), np.float32)
    for g in range(groups):
        weight[g * each : (g + 1) * each, g * k : (g + 1) * k] = own[g * each : (g + 1) * each]
    return weight


@dataclass(frozen=True)
class Refusal:
    """A weighted operator that is no site, and why."""

    op: WeightedOp
    reason: str


def find_sites(model: Model) -> tuple[list[Site], list[Refusal]]:
    """Every MatMul, Gemm, Conv and ConvTranspose with a constant float32 weight, in topological order; the others with
    reasons.

    Raises:
        ModelError: the weight of any of them, site or not, holds NaN or Inf.
    """
    sites, refusals = [], []
    outputs = held(model.graph)
    for op in weighted_ops(model.graph):
        _check_finite(op)
        reason = _unfit(op)
        if reason:
            refusals.append(Refusal(op, reason))
        else:
            sites.append(_site(op, outputs))
    for node in model.graph.nodes:
        found = find_transposed(node)
        if isinstance(found, Transposed):
            _check_finite(found.op)
            sites.append(_transposed_site(found, outputs))
        elif found is not None:
            refusals.append(Refusal(*found))
    if any(s.op.kind == "ConvTranspose" for s in sites):
        position = {id(node): i for i, node in enumerate(model.graph.nodes)}
        sites.sort(key=lambda s: position[id(s.op.node)])
    refusals += [Refusal(op, "alpha, beta and transA have no kernel") for op in map(_scaled, model.graph.nodes) if op]
    return sites, refusals


def _check_finite(op: WeightedOp) -> None:
    if not is_finite(op.weight):
        raise ModelError(
            f"the weight {op.weight.name!r} holds NaN or Inf",
            where=op.name,
            fix="Export the model again; a model that was trained to this point computes nothing useful",
        )


def _scaled(node: gs.Node) -> WeightedOp | None:
    """A Gemm with a constant weight that `graph/operators.py` does not describe."""
    if node.op != "Gemm" or node.domain or describe(node) is not None:
        return None
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or len(weight.shape) != 2:
        return None
    n, k = weight.shape if node.attrs.get("transB", 0) else weight.shape[::-1]
    return WeightedOp(node, "Gemm", weight, int(n), int(k))


def _unfit(op: WeightedOp) -> str:
    if op.group != 1 and op.group == op.n and op.weight.shape[1] == 1:
        return "a depthwise convolution has no sparse kernel"
    if op.group != 1 and op.n * op.k * op.group > _SPELLED_OUT:
        return "its groups have more columns than kernels are tried with"
    if not op.pointwise and (reason := unfit_window(op)):
        return reason
    if op.weight.dtype != np.float32:
        return f"its weight is {np.dtype(op.weight.dtype).name}, kernels are float32"
    if op.kind == "Gemm" and len(op.node.inputs) > 2 and op.bias is None:
        return "its C is not a constant vector of outputs"
    if not isinstance(op.node.inputs[0], gs.Variable):
        return "its activations are constant"
    if op.kind == "Conv" and len(op.node.inputs) > 2 and op.bias is None:
        return "its bias is not constant"
    if op.k * op.group > 1 << 22 or op.n > 1 << 22:
        return "it is larger than kernels index"
    return ""


def unfit_window(op: WeightedOp) -> str:
    """Why no kernel looks at an input as this convolution does; empty if one does."""
    if len(op.kernel) > _MOST_AXES:
        return f"a convolution over {len(op.kernel)} axes has no sparse kernel yet"
    if op.node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its padding depends on the size of the input (auto_pad)"
    return unfit(window_of(op))


def unfit(window: Window) -> str:
    """The same for a window."""
    if not all(0 <= value <= _LARGEST for value in (*window.pads, *window.size, *window.dilation)):
        return f"its kernel, dilation or padding is larger than {_LARGEST}"
    extents = [(size - 1) * step + 1 for size, step in zip(window.size, window.dilation, strict=True)]
    if not all(1 <= step <= max(_MOST_SKIPPED, extent) for step, extent in zip(window.stride, extents, strict=True)):
        return f"its stride of {max(window.stride)} leaves out most of the input"
    return ""


def window_of(op: WeightedOp) -> Window:
    """How a convolution looks at its input; one axis is the second of two, behind a window of height 1."""
    attrs, axes = op.node.attrs, len(op.kernel)

    def pair(values: Sequence[int], missing: int) -> tuple[int, int]:
        both = [*[missing] * (_MOST_AXES - axes), *(int(v) for v in values)]
        return both[0], both[1]

    pads = attrs.get("pads") or [0] * (2 * axes)
    before, after = pair(pads[:axes], 0), pair(pads[axes:], 0)
    return Window(
        int(op.weight.shape[1]) * op.group,
        pair(op.kernel, 1),
        pair(attrs.get("strides") or [1] * axes, 1),
        pair(attrs.get("dilations") or [1] * axes, 1),
        (*before, *after),
        axes,
    )


def _site(op: WeightedOp, outputs: Sequence[gs.Variable]) -> Site:
    layout = "planes" if op.kind == "Conv" else "rows"
    bias = None if op.bias is None else np.asarray(op.bias, np.float32)
    window = None if op.pointwise else window_of(op)
    if window is not None and window == Window(window.channels, (1, 1), axes=window.axes):
        window = None  # one pixel: of groups, whose other columns are zeros
    site = Site(op, layout, op.node.inputs[0], op.node.outputs[0], [op.node], bias, window=window)
    take_epilogue(site, outputs)
    return site


def _transposed_site(found: Transposed, outputs: Sequence[gs.Variable]) -> Site:
    op = found.op
    source, output = op.node.inputs[0], op.node.outputs[0]
    site = Site(op, "planes", source, output, [op.node], found.bias, window=found.window, grow=found.grow)
    take_epilogue(site, outputs)
    return site


class Product(Protocol):
    """What computes a value for each output feature, and may take along what follows it."""

    layout: str
    source: gs.Variable
    output: gs.Variable
    nodes: list[gs.Node]
    bias: F32 | None
    act: str
    low: float
    high: float

    @property
    def n(self) -> int: ...


def take_epilogue(site: Product, outputs: Sequence[gs.Variable]) -> None:
    """Takes in what follows a product or a sum (in place): the Add of a constant bias, and an activation."""
    if site.act == "none" and (added := _bias_add(site, outputs)) is not None:
        node, bias = added
        site.nodes = [*site.nodes, node]
        site.output, site.bias = node.outputs[0], bias if site.bias is None else site.bias + bias
    found = epilogue.find(site.output, outputs)
    if found is not None:
        site.nodes = [*site.nodes, *found.nodes]
        site.act, site.low, site.high, site.output = found.act, found.low, found.high, found.output


def _bias_add(site: Product, outputs: Sequence[gs.Variable]) -> tuple[gs.Node, F32] | None:
    """The Add of a constant vector of outputs that is the only reader of the product."""
    node = only_reader(site.output, outputs)
    if node is None or node.op != "Add" or node.domain:
        return None
    other = next((i for i in node.inputs if i is not site.output), None)
    if not isinstance(other, gs.Constant) or other.dtype != np.float32:
        return None
    values = array_of(other)
    # Aligned from the right: features are the last axis of rows; of planes the second, with all pixels behind it.
    if site.layout == "rows":
        fits = values.ndim >= 1 and values.size == values.shape[-1] == site.n and _rank(site.source) >= values.ndim
    else:
        rank = _rank(site.source)
        known = rank > 1 and values.ndim in (rank, rank - 1)
        fits = known and values.size == site.n == values.shape[1 - (rank - values.ndim)]
    return (node, values.reshape(site.n).astype(np.float32)) if fits else None


def _rank(tensor: gs.Variable) -> int:
    return len(tensor.shape) if tensor.shape is not None else 1


def held(graph: gs.Graph) -> list[gs.Variable]:
    """Tensors that must stay as they are: graph outputs, and what branches of control flow read from outside."""
    outer = {id(node) for node in graph.nodes}
    inner = [scope for scope in scopes(graph) if scope is not graph]
    read = [t for scope in inner for t in (*scope.outputs, *(t for node in scope.nodes for t in node.inputs))]
    return [*graph.outputs, *(t for t in read if any(id(node) in outer for node in t.inputs))]


def only_reader(tensor: gs.Variable, outputs: Sequence[gs.Variable]) -> gs.Node | None:
    """The one node that reads `tensor`, if nothing else does and it is no graph output."""
    if any(tensor is o for o in outputs) or len(tensor.outputs) != 1:
        return None
    return tensor.outputs[0]
