"""Activations behind a tensor, recognized by what they compute, not by how an exporter spells them.

Element-wise nodes that depend on the tensor and on scalar constants alone are evaluated on a grid in float64; what
equals a known activation on the grid *is* that activation. So GELU is found as one op, as x/2 (1 + erf(x / sqrt 2)) in
any order of the factors, or with tanh, without a pattern for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import scipy.special
from numpy.typing import NDArray

from spa_compiler.graph.weights import array_of
from spa_compiler.kernels import activation

F64 = NDArray[np.float64]
# The far ends tell a bound of 100 from none; they are within float32, whose largest value exporters write for "none".
_FAR = (40.0, 1e3, 1e6, 1e12, 3e38)
_GRID: F64 = np.concatenate([np.linspace(-12.0, 12.0, 193), [-1e-3, 1e-3], _FAR, np.negative(_FAR)])
_STEP = 0.125  # of the grid between its ends
_F32_MAX = float(np.finfo(np.float32).max)
_MOST_NODES = 12  # GELU with tanh takes eight
_TOLERANCE = 2e-6  # relative to max(1, |y|): exporters write constants in float32


@dataclass(frozen=True)
class Epilogue:
    """`act` of a tensor, computed by `nodes`, ends in `output`; `low` and `high` belong to `clip`."""

    act: str
    low: float
    high: float
    output: gs.Variable
    nodes: tuple[gs.Node, ...]


_OPS: dict[str, Callable[..., F64]] = {
    "Add": lambda n, a, b: a + b,
    "Sub": lambda n, a, b: a - b,
    "Mul": lambda n, a, b: a * b,
    "Div": lambda n, a, b: a / b,
    "Pow": lambda n, a, b: a**b,
    "Neg": lambda n, a: -a,
    "Sqrt": lambda n, a: np.sqrt(a),
    "Exp": lambda n, a: np.exp(a),
    "Erf": lambda n, a: np.asarray(scipy.special.erf(a)),
    "Tanh": lambda n, a: np.tanh(a),
    "Sigmoid": lambda n, a: np.asarray(scipy.special.expit(a)),
    "Relu": lambda n, a: np.maximum(a, 0.0),
    "Min": lambda n, a, b: np.minimum(a, b),
    "Max": lambda n, a, b: np.maximum(a, b),
    "Clip": lambda n, a, *bounds: _clip(n, a, bounds),
    "Gelu": lambda n, a: activation.reference(
        a, "gelu_tanh" if n.domain == "" and n.attrs.get("approximate") == "tanh" else "gelu_erf"
    ),
    "FastGelu": lambda n, a: activation.reference(a, "gelu_tanh"),
    "HardSwish": lambda n, a: activation.reference(a, "hard_swish"),
    "HardSigmoid": lambda n, a: activation.reference(
        a, "hard_sigmoid", float(n.attrs.get("alpha", 0.2)), float(n.attrs.get("beta", 0.5))
    ),
    "LeakyRelu": lambda n, a: np.where(a < 0, float(n.attrs.get("alpha", 0.01)) * a, a),
    "Swish": lambda n, a: np.asarray(a * scipy.special.expit(float(n.attrs.get("alpha", 1.0)) * a)),
}
_DOMAINS = {"Gelu": ("", "com.microsoft"), "FastGelu": ("com.microsoft",)}


def _clip(node: gs.Node, a: F64, bounds: Sequence[F64 | None]) -> F64:
    low = node.attrs.get("min") if not bounds else bounds[0]
    high = node.attrs.get("max") if len(bounds) < 2 else bounds[1]
    a = a if low is None else np.maximum(a, low)
    return a if high is None else np.minimum(a, high)


def find(tensor: gs.Variable, graph_outputs: Sequence[gs.Variable]) -> Epilogue | None:
    """The longest activation that consumes `tensor` and leaves nothing of it or of the steps in between to others."""
    values: dict[int, F64] = {id(tensor): _GRID}
    rank = 1 if tensor.shape is None else len(tensor.shape)
    nodes: list[gs.Node] = []
    held = {id(t) for t in graph_outputs}
    best: Epilogue | None = None
    queue = list(tensor.outputs)
    while queue and len(nodes) < _MOST_NODES:
        node = next((n for n in queue if _ready(n, values, rank)), None)
        if node is None:
            break
        queue = [n for n in queue if n is not node]
        value = _evaluate(node, values)
        if value is None:
            continue
        nodes.append(node)
        output = node.outputs[0]
        values[id(output)] = value
        queue += [n for n in output.outputs if all(n is not other for other in [*nodes, *queue])]
        if _closed(tensor, nodes, output, held) and (name := _name(value)) is not None:
            best = Epilogue(*name, output, tuple(nodes))
    return best


def _ready(node: gs.Node, values: dict[int, F64], rank: int) -> bool:
    if node.op not in _OPS or node.domain not in _DOMAINS.get(node.op, (None, "")):
        return False
    if len(node.outputs) != 1:
        return False
    return all(id(i) in values or _absent(i) or _is_scalar(i, rank) for i in node.inputs)


def _is_scalar(tensor: gs.Tensor, rank: int) -> bool:
    """A constant of one element and `rank` axes at most: with more, it would give the result more axes, too."""
    return isinstance(tensor, gs.Constant) and len(tensor.shape) <= rank and all(size == 1 for size in tensor.shape)


def _absent(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and not tensor.name


def _evaluate(node: gs.Node, values: dict[int, F64]) -> F64 | None:
    arguments: list[F64 | None] = []
    for i in node.inputs:
        if _absent(i):
            arguments.append(None)
        elif isinstance(i, gs.Constant):
            arguments.append(np.float64(array_of(i).reshape(-1)[0]) * np.ones(1))
        else:
            arguments.append(values[id(i)])
    try:
        with np.errstate(all="ignore"):
            return np.broadcast_to(np.asarray(_OPS[node.op](node, *arguments), np.float64), _GRID.shape)
    except TypeError:  # an optional input that only other operators of that name leave out
        return None


def _closed(tensor: gs.Variable, nodes: Sequence[gs.Node], output: gs.Variable, held: set[int]) -> bool:
    """Whether only `nodes` read the tensor and what lies between it and `output`."""
    inside = {id(n) for n in nodes}
    between = [tensor, *(n.outputs[0] for n in nodes if n.outputs[0] is not output)]
    return all(id(t) not in held and all(id(n) in inside for n in t.outputs) for t in between)


def _slope(y: F64, left: float, right: float) -> tuple[float, float]:
    """Of the line through two points of the grid, and its value at 0."""
    first, second = (float(y[np.flatnonzero(x == _GRID)[0]]) for x in (left, right))
    slope = (second - first) / (right - left)
    return slope, first - slope * left


def _name(y: F64) -> tuple[str, float, float] | None:
    if not np.isfinite(y).all():
        return None
    scale = np.maximum(1.0, np.abs(_GRID))
    for name in ("relu", "gelu_erf", "gelu_tanh", "silu", "sigmoid", "hard_swish"):
        if np.max(np.abs(activation.reference(_GRID, name) - y) / scale) < _TOLERANCE:
            return name, 0.0, 0.0
    for name, low, high in (("leaky_relu", *_slope(y, -_STEP, 0.0)), ("hard_sigmoid", *_slope(y, 0.0, _STEP))):
        if 0 < low < 1 and np.max(np.abs(activation.reference(_GRID, name, low, high) - y) / scale) < _TOLERANCE:
            return name, low, high
    low, high = float(y.min()), float(y.max())
    low = low if low > _GRID.min() else -_F32_MAX
    high = high if high < _GRID.max() else _F32_MAX
    if low < high and np.array_equal(np.clip(_GRID, low, high), y) and not np.array_equal(y, _GRID):
        return "clip", low, high
    return None
