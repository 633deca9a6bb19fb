"""Indices of activations whose value is the same for every input: what rules prove, with the value that a run shows.

    Conv, Gemm, MatMul    y[o] = b[o]        where all weights of o are zero
    norms, Mul            y[i] = b[i]        where the factor of i is zero
    element-wise          y[i] = f(c[i])     where the operands are constant at i
    movers, pools         y[i] = c[...]      where all that lies in the same unit is constant
    MatMul of activations y[i] = 0           where an operand is zero on an axis that is not summed over

A rule says what a slab hangs on, never its value: that is read from runs on two inputs, in which it must be the same at
all positions (behind a padded convolution it is not).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.analysis import Group
from spa_compiler.passes.importance import array, holders

Values: TypeAlias = NDArray[np.float64]
Place: TypeAlias = tuple[str, int]
"""(tensor, axis)"""

ELEMENTWISE = frozenset(
    {"Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu"}
    | {
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Mean",
    }
    | {
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
    }
    | {"Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where", "Xor"}
    | {"BiasGelu", "FastGelu", "QuickGelu"}
)
MOVERS = frozenset(
    {"Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice"}
    | {"SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Every element of the output is one of the inputs' (or of Pad's value)."""
POOLS = frozenset(
    {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "MaxPool", "ReduceMax"}
    | {"ReduceMean", "ReduceMin", "ReduceSum", "Resize", "Upsample"}
)
"""An element of the output comes from elements that agree with it in every other axis's index."""
_COUNTING = frozenset({"ReduceSum", "LpPool", "GlobalLpPool"})
"""Their result hangs on how many positions there are, so only zeros stay what they are."""
_PER_CHANNEL_NORMS = frozenset({"BatchNormalization", "InstanceNormalization"})
_SCALED_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})

_EQUAL = 1e-6
"""Relative: vectorized loops and their remainders may differ in the last bit."""


class ConstantChannels:
    """What is known of every index of every axis that a group touches.

    Args:
        groups: those of interest.
        run: gives the named tensors for two or more inputs of the model.
    """

    def __init__(
        self, graph: gs.Graph, groups: Sequence[Group], run: Callable[[Sequence[str]], Sequence[Mapping[str, Any]]]
    ) -> None:
        self.graph = graph
        self.constants = {name: array(holder) for name, holder in holders(graph).items()}
        self.ids = _unit_ids(groups)
        self.zeros: dict[Place, NDArray[np.bool_]] = {}
        self.values: dict[Place, Values] = {}
        """`[size of the axis]`, NaN where nothing is proven."""
        names = sorted({name for name, _ in self.ids} - self.constants.keys())
        self.seen = _uniform(run(names), [place for place in self.ids if place[0] not in self.constants])
        for node in graph.nodes:
            for output in node.outputs:
                for axis in range(len(output.shape or ())):
                    self._visit(node, output, axis)

    def zero_slabs(self, name: str, axis: int) -> NDArray[np.bool_]:
        """For each index on the axis of a constant, whether its whole slab is zero."""
        if (name, axis) not in self.zeros:
            values = self.constants[name]
            others = tuple(other for other in range(values.ndim) if other != axis)
            self.zeros[name, axis] = ~(values != 0).any(axis=others)
        return self.zeros[name, axis]

    def of(self, name: str, axis: int, size: int) -> Values:
        """Values on an axis of an activation."""
        return self.values.get((name, axis), np.full(size, np.nan))

    def _visit(self, node: gs.Node, output: gs.Tensor, axis: int) -> None:
        place = (output.name, axis)
        if place not in self.ids or place not in self.seen:
            return
        size = self.ids[place].shape[1]
        value = self.seen[place]
        if value.size != size:
            return
        proven = self._proven(node, output, axis, size)
        if proven is not None and proven.any():
            self.values[place] = np.where(proven, value, np.nan)

    def _proven(self, node: gs.Node, output: gs.Tensor, axis: int, size: int) -> NDArray[np.bool_] | None:
        if (node.domain or "") not in ("", "ai.onnx", "com.microsoft"):
            return None
        if node.op in ELEMENTWISE:
            return self._elementwise(node, output, axis, size)
        if node.op in MOVERS or node.op in POOLS:
            return self._moved(node, output, axis, size)
        if node.op in _PER_CHANNEL_NORMS and axis == 1:
            if node.attrs.get("training_mode", 0):
                return None
            return self._factor(node, 1, size) | ~np.isnan(self.of(node.inputs[0].name, 1, size))
        if node.op in _SCALED_NORMS and output is node.outputs[0] and axis == len(output.shape) - 1:
            return self._factor(node, 1, size)
        if node.op == "MatMul" and node.inputs[1].name not in self.constants:
            return self._product(node, output, axis, size)
        return self._linear(node, axis, size)

    def _linear(self, node: gs.Node, axis: int, size: int) -> NDArray[np.bool_] | None:
        """Outputs of which all weights are zero; of a depthwise convolution also those of a constant channel."""
        out = output_axis(node, self.constants)
        if out is None or axis != out[1] or any(t.name not in self.constants for t in node.inputs[2:] if t.name):
            return None
        zero = self.zero_slabs(node.inputs[1].name, out[0])
        if zero.size != size:
            return None
        if node.op == "Conv" and is_depthwise(node, self.constants):
            channels = int(node.attrs.get("group", 1))
            zero = zero | np.repeat(~np.isnan(self.of(node.inputs[0].name, 1, channels)), size // channels)
        return zero

    def _factor(self, node: gs.Node, number: int, size: int) -> NDArray[np.bool_]:
        name = node.inputs[number].name
        if name not in self.constants or self.constants[name].shape != (size,):
            return np.zeros(size, np.bool_)
        return self.zero_slabs(name, 0)

    def _elementwise(self, node: gs.Node, output: gs.Tensor, axis: int, size: int) -> NDArray[np.bool_]:
        known = np.ones(size, np.bool_)
        nothing = np.zeros(size, np.bool_)
        for tensor in node.inputs:
            if not tensor.name:
                continue
            constant = self.constants.get(tensor.name)
            rank = len(tensor.shape or ()) if constant is None else constant.ndim
            own = axis - (len(output.shape) - rank)
            if constant is not None:
                if own >= 0 and constant.shape[own] == size:
                    nothing |= self.zero_slabs(tensor.name, own)
                continue
            value = self.of(tensor.name, own, size) if own >= 0 else np.full(size, np.nan)
            known &= ~np.isnan(value)
            nothing |= value == 0
        return known | nothing if node.op == "Mul" else known

    def _moved(self, node: gs.Node, output: gs.Tensor, axis: int, size: int) -> NDArray[np.bool_]:
        """Where all that lies in the same unit is constant in every input that has some of it."""
        ids = self.ids[output.name, axis]
        good: dict[int, bool] = {}
        for tensor in node.inputs:
            for number in range(len(tensor.shape or ()) if tensor.name else 0):
                if (tensor.name, number) not in self.ids:
                    continue
                own = self.ids[tensor.name, number]
                if tensor.name in self.constants:
                    fine = _same_throughout(self.constants[tensor.name], number)
                else:
                    value = self.of(tensor.name, number, own.shape[1])
                    fine = value == 0 if node.op in _COUNTING else ~np.isnan(value)
                for row in own:
                    for unit, ok in zip(row.tolist(), fine.tolist(), strict=True):
                        if unit >= 0:
                            good[unit] = good.get(unit, True) and ok
        return np.asarray([any(good.get(unit, False) for unit in column) for column in ids.T.tolist()], np.bool_)

    def _product(self, node: gs.Node, output: gs.Tensor, axis: int, size: int) -> NDArray[np.bool_]:
        zero = np.zeros(size, np.bool_)
        rank = len(output.shape)
        for number, tensor in enumerate(node.inputs):
            own = axis - (rank - len(tensor.shape or ()))
            contracted = rank - 1 if number == 0 else rank - 2
            if own >= 0 and axis != contracted and len(tensor.shape or ()) > 1:
                zero |= self.of(tensor.name, own, size) == 0
        return zero


def output_axis(node: gs.Node, constants: Mapping[str, Any]) -> tuple[int, int] | None:
    """(axis of the weight, axis of the output) of what a linear node with a constant weight makes; None: it is none."""
    if len(node.inputs) < 2 or node.inputs[1].name not in constants or (node.domain or "") not in ("", "ai.onnx"):
        return None
    weight = constants[node.inputs[1].name]
    if node.op == "Conv":
        return 0, 1
    if node.op == "ConvTranspose" and node.attrs.get("group", 1) == 1:
        return 1, 1
    if node.op == "Gemm":
        return (0 if node.attrs.get("transB", 0) else 1), 1
    if node.op == "MatMul" and weight.ndim == 2 and node.outputs[0].shape:
        return 1, len(node.outputs[0].shape) - 1
    return None


def input_axis(node: gs.Node, constants: Mapping[str, Any]) -> tuple[int, int] | None:
    """(axis of the weight, axis of input 0) over which a linear node with a constant weight sums."""
    if len(node.inputs) < 2 or node.inputs[1].name not in constants or (node.domain or "") not in ("", "ai.onnx"):
        return None
    weight = constants[node.inputs[1].name]
    if node.op == "Conv" and node.attrs.get("group", 1) == 1:
        return 1, 1
    if node.op == "ConvTranspose" and node.attrs.get("group", 1) == 1:
        return 0, 1
    if node.op == "Gemm" and not node.attrs.get("transA", 0):
        return (1 if node.attrs.get("transB", 0) else 0), 1
    if node.op == "MatMul" and weight.ndim == 2 and node.inputs[0].shape:
        return 0, len(node.inputs[0].shape) - 1
    return None


def is_depthwise(node: gs.Node, constants: Mapping[str, Any]) -> bool:
    """A Conv in which every group has one channel."""
    weight = constants.get(node.inputs[1].name)
    group = int(node.attrs.get("group", 1))
    return node.op == "Conv" and weight is not None and group > 1 and weight.shape[1] == 1


def follows(node: gs.Node, number: int, axis: int, constants: Mapping[str, Any]) -> bool:
    """Whether what a node reads at an index of input `number` shows at nothing but the same unit in its outputs."""
    if (node.domain or "") not in ("", "ai.onnx", "com.microsoft"):
        return False
    if node.op in ELEMENTWISE or node.op == "Concat":
        return True
    if node.op in MOVERS or node.op in POOLS:
        return number == 0
    if node.op in _PER_CHANNEL_NORMS:
        return axis == 1 and number == 0
    if node.op == "Conv":
        return number == 0 and axis == 1 and is_depthwise(node, constants)
    if node.op == "MatMul" and node.outputs[0].shape and node.inputs[number].shape:
        rank = len(node.inputs[number].shape)
        return rank > 1 and axis != (rank - 1 if number == 0 else rank - 2)
    if node.op == "Softmax" and "axis" in node.attrs and node.outputs[0].shape:
        rank = len(node.outputs[0].shape)
        return node.attrs["axis"] % rank == rank - 1 and axis != rank - 1
    return False


def _unit_ids(groups: Sequence[Group]) -> dict[Place, NDArray[np.int64]]:
    """For each axis `[factors, size]`: the unit of each index, numbered through all groups, or -1."""
    found: dict[Place, list[NDArray[np.int64]]] = {}
    start = 0
    for group in groups:
        for member in group.members:
            rows = found.setdefault((member.tensor, member.axis), [])
            rows += [np.where(units >= 0, units + start, -1) for units in member.occurrences]
        start += group.size
    return {place: np.stack(rows) for place, rows in found.items()}


def _uniform(runs: Sequence[Mapping[str, Any]], places: Sequence[Place]) -> dict[Place, Values]:
    """For each index the one value that its slab has in all runs, or NaN."""
    out: dict[Place, Values] = {}
    for name, axis in places:
        per_run = []
        for run in runs:
            values = np.asarray(run[name])
            if values.ndim <= axis or values.dtype.kind not in "fiub" or not values.size:
                break
            per_run.append(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1))
        if len(per_run) < len(runs) or len({rows.shape[0] for rows in per_run}) != 1:
            continue
        first = per_run[0][:, 0].astype(np.float64)
        same = np.isfinite(first)
        for rows in per_run:
            same &= (np.abs(rows - first[:, None]) <= _EQUAL * np.abs(first)[:, None]).all(axis=1)
        out[name, axis] = np.where(same, first, np.nan)
    return out


def _same_throughout(values: NDArray[Any], axis: int) -> NDArray[np.bool_]:
    slabs = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    out: NDArray[np.bool_] = (slabs == slabs[:, :1]).all(axis=1)
    return out
