"""The bias of a weighted operator, wherever the file keeps it: Conv's B, Gemm's C, or an Add behind a MatMul."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph import weights
from spa_compiler.graph.model import scopes
from spa_compiler.graph.operators import WeightedOp


@dataclass(frozen=True)
class Bias:
    """A constant vector `[n]` that is added to the operator's result and to nothing else.

    `node` holds it as input number `place`.
    """

    node: gs.Node
    place: int
    n: int

    @property
    def values(self) -> np.ndarray[Any, Any]:
        """`[n]`, never to be written to."""
        return weights.array_of(self.node.inputs[self.place]).reshape(self.n)

    def laid_out(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`values [n]` in the file's own shape and dtype."""
        held = self.node.inputs[self.place]
        return np.array(values, dtype=held.dtype, order="C").reshape(held.shape)

    def replace(self, values: np.ndarray[Any, Any]) -> None:
        """Puts `values [n]` in the bias's place. A constant that other nodes use too is left to them."""
        held = self.node.inputs[self.place]
        new = self.laid_out(values)
        if len(held.outputs) > 1:
            self.node.inputs[self.place] = gs.Constant(f"{held.name}_{self.node.outputs[0].name}", new)
        else:
            held.values = new


def bias_of(op: WeightedOp, graph: gs.Graph) -> Bias | None:
    """The bias of `op`, or None where it has none that is a constant vector of its own."""
    if len(op.node.inputs) > 2 and op.kind != "MatMul":
        held = op.node.inputs[2]
        if not isinstance(held, gs.Constant):
            return None
        shape = tuple(held.shape)
        return Bias(op.node, 2, op.n) if shape[-1:] == (op.n,) and prod(shape) == op.n else None
    result = op.node.outputs[0]
    if len(result.outputs) != 1 or any(result is t for t in graph.outputs) or _captured(result, graph):
        return None
    node = result.outputs[0]
    if node.op != "Add" or node.domain:
        return None
    for place, held in enumerate(node.inputs):
        if isinstance(held, gs.Constant) and _is_vector(held, op):
            return Bias(node, place, op.n)
    return None


def _is_vector(held: gs.Constant, op: WeightedOp) -> bool:
    """Whether a constant has one value for each output and broadcasts over all else."""
    shape = tuple(int(size) for size in held.shape)
    # With one output, which of several axes is that of the outputs does not show in a shape of ones.
    if prod(shape) != op.n or (op.n == 1 and len(shape) > 1):
        return False
    if op.kind != "Conv":
        return bool(shape) and shape[-1] == op.n
    rank = 2 + len(op.kernel)  # aligned from the right: channels are the second axis, all of space behind them
    axis = 1 - (rank - len(shape))
    return 0 <= axis < len(shape) and shape[axis] == op.n


def _captured(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    """Whether a branch of control flow reads the tensor from outside."""
    inner = [scope for scope in scopes(graph) if scope is not graph]
    return any(tensor is t for scope in inner for node in scope.nodes for t in node.inputs)
