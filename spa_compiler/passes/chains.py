"""Factorized weights in a graph: one weighted operator becomes a chain of thinner ones.

    MatMul(x, W)      MatMul(MatMul(x, down), up)                  down [k, r], up [r, n]
    Gemm(x, W, c)     Gemm(MatMul(x, down), up, c)
    Conv(x, W, b)     Conv 1x1(Conv(x, down), up, b)               down has W's kernel, strides, pads, dilations
                      Conv 1x1(Conv(Conv 1x1(x, first), core), last, b)         Tucker-2: core has them
    any of them       Add(op(x, S), up(down(x)))                   sparse + low rank: S takes W's place, with the bias

Weights that share a `down` and read the same tensor share the node, too. The operator at the end makes the tensor that
the whole made, and has its name. All operators have been there since opset 1, and everything keeps its element type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.calibration.moments import Geometry
from spa_compiler.graph.metadata import Facts
from spa_compiler.graph.model import Model, scopes
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.solvers.problem import F64
from spa_compiler.solvers.svd import Factors
from spa_compiler.solvers.tucker import Tucker


@dataclass(frozen=True, eq=False)
class Beside:
    """A sparse weight `[n, k]` with a low-rank one beside it, None where the sparse one is all."""

    sparse: F64
    factors: Factors | None


Form: TypeAlias = Factors | Tucker | Beside
"""What a weight `[n, k]` became. Forms that have the same array in them share the initializer."""


def rounded(form: Form, dtype: np.dtype[Any]) -> Form:
    """The form as it is when its arrays are stored as `dtype`; still float64."""

    def cast(array: F64) -> F64:
        return array.astype(dtype).astype(np.float64)

    if isinstance(form, Factors):
        return Factors(cast(form.up), cast(form.down))
    if isinstance(form, Tucker):
        return Tucker(cast(form.first), cast(form.core), cast(form.last))
    low = None if form.factors is None else Factors(cast(form.factors.up), cast(form.factors.down))
    return Beside(cast(form.sparse), low)


def product(form: Form) -> F64:
    """The weight `[n, k]` that a form stands for."""
    if isinstance(form, Factors):
        return form.weight
    if isinstance(form, Tucker):
        return form.weight.reshape(form.last.shape[0], -1)
    return form.sparse if form.factors is None else form.sparse + form.factors.weight


def label(form: Form) -> str:
    """The form in a word or two: `rank 64`, `tucker 32x64`, `rank 8 + sparse`."""
    if isinstance(form, Factors):
        return f"rank {form.rank}"
    if isinstance(form, Tucker):
        return f"tucker {form.ranks[0]}x{form.ranks[1]}"
    return "sparse" if form.factors is None else f"{label(form.factors)} + sparse"


def write(model: Model, ops: Sequence[WeightedOp], forms: Sequence[Form | None]) -> None:
    """Puts forms in the place of weights, in `model` in place; None leaves an operator alone.

    Args:
        ops: convolutions among them have one group; a Tucker form belongs to one with a two-dimensional kernel.
    """
    writer = _Writer(model)
    for op, form in zip(ops, forms, strict=True):
        if form is not None:
            writer.write(op, form)


class _Writer:
    """Adds nodes to one graph, under names that nothing has."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tensors = {name for scope in scopes(model.graph) for name in scope.tensors()}
        self._nodes = {node.name for scope in scopes(model.graph) for node in scope.nodes}
        # By identity; the arrays are held by the forms that are being written.
        self._constants: dict[tuple[int, tuple[int, ...], bool], gs.Constant] = {}
        self._downs: dict[tuple[int, int, Geometry], gs.Variable] = {}

    def write(self, op: WeightedOp, form: Form) -> None:
        if isinstance(form, Tucker):
            self._tucker(op, form)
        elif isinstance(form, Factors):
            self._low_rank(op, form)
        else:
            self._beside(op, form)

    def _low_rank(self, op: WeightedOp, factors: Factors) -> None:
        thin = self._down(op, factors)
        if op.kind == "Conv":
            self._hand_on(op.node.outputs[0].name, thin.inputs[0])
            self._narrow_to_one(op, factors.up, "up")
        else:
            values = factors.up.T if op.transposed else factors.up
            op.node.inputs[1] = self._constant(op, factors.up, values.shape, values, "up")
        op.node.inputs[0] = thin

    def _down(self, op: WeightedOp, factors: Factors) -> gs.Variable:
        """What `down` makes of the operator's input."""
        source, geometry = op.node.inputs[0], Geometry.of(op)
        key = id(factors.down), id(source), geometry
        if key not in self._downs:
            if op.kind == "Conv":
                shape: tuple[int, ...] = (factors.rank, *(int(size) for size in op.weight.shape[1:]))
                held = self._constant(op, factors.down, shape, factors.down.reshape(shape), "down")
                made = self._add(op, "Conv", "down", [source, held], dict(op.node.attrs), self._shape(op, factors.rank))
            else:
                held = self._constant(op, factors.down, (op.k, factors.rank), factors.down.T, "down")
                made = self._add(op, "MatMul", "down", [source, held], {}, self._shape(op, factors.rank))
            self._downs[key] = made
        return self._downs[key]

    def _tucker(self, op: WeightedOp, tucker: Tucker) -> None:
        source, (inner, outer) = op.node.inputs[0], tucker.ranks
        first = tucker.first[:, :, None, None]
        held = self._constant(op, tucker.first, first.shape, first, "first")
        shape = None if source.shape is None else [source.shape[0], inner, *source.shape[2:]]
        narrow = self._add(op, "Conv", "first", [source, held], {"kernel_shape": [1, 1]}, shape)
        held = self._constant(op, tucker.core, tucker.core.shape, tucker.core, "core")
        thin = self._add(op, "Conv", "core", [narrow, held], dict(op.node.attrs), self._shape(op, outer))
        self._hand_on(op.node.outputs[0].name, thin.inputs[0])
        self._narrow_to_one(op, tucker.last, "last")
        op.node.inputs[0] = thin

    def _beside(self, op: WeightedOp, form: Beside) -> None:
        name = op.name
        shared = (id(form.sparse), tuple(op.weight.shape), op.transposed) in self._constants
        if shared or len(op.weight.outputs) > 1:
            values = op.laid_out(form.sparse)
            op.node.inputs[1] = self._constant(op, form.sparse, values.shape, values, "sparse")
        else:
            op.replace(form.sparse)
        if form.factors is None:
            return
        thin, whole = self._down(op, form.factors), op.node.outputs[0]
        up = form.factors.up
        wide = None if whole.shape is None else list(whole.shape)
        if op.kind == "Conv":
            shape = (op.n, form.factors.rank, *(1 for _ in op.kernel))
            held = self._constant(op, up, shape, up.reshape(shape), "up")
            attrs = {"kernel_shape": [1 for _ in op.kernel]}
            low = self._add(op, "Conv", "up", [thin, held], attrs, wide)
        else:
            held = self._constant(op, up, (form.factors.rank, op.n), up.T, "up")
            low = self._add(op, "MatMul", "up", [thin, held], {}, wide)
        beside = self._variable(op, "sparse", wide)
        op.node.outputs[0] = beside
        node = gs.Node("Add", name, inputs=[beside, low], outputs=[whole])
        op.node.name = _fresh(f"{name}_sparse", self._nodes)
        self._model.graph.nodes.insert(self._place(op.node) + 1, node)
        self._hand_on(whole.name, op.node)

    def _narrow_to_one(self, op: WeightedOp, last: F64, what: str) -> None:
        """The convolution itself becomes the 1x1 that widens again; its bias stays."""
        shape = (*last.shape, *(1 for _ in op.kernel))
        op.node.inputs[1] = self._constant(op, last, shape, last.reshape(shape), what)
        op.node.attrs = {"kernel_shape": [1 for _ in op.kernel]}

    def _shape(self, op: WeightedOp, rank: int) -> list[Any] | None:
        """That of the operator's result with `rank` channels."""
        shape = op.node.outputs[0].shape
        if shape is None:
            return None
        axis = 1 if op.kind == "Conv" else len(shape) - 1
        return [rank if place == axis else size for place, size in enumerate(shape)]

    def _constant(
        self, op: WeightedOp, array: F64, shape: Sequence[int], values: NDArray[Any], what: str
    ) -> gs.Constant:
        key = id(array), tuple(shape), op.transposed
        if key not in self._constants:
            stored = np.array(values, dtype=op.weight.dtype, order="C")
            self._constants[key] = gs.Constant(_fresh(f"{op.weight.name}_{what}", self._tensors), stored)
        return self._constants[key]

    def _variable(self, op: WeightedOp, what: str, shape: list[Any] | None) -> gs.Variable:
        name = _fresh(f"{op.node.outputs[0].name}_{what}", self._tensors)
        return gs.Variable(name, dtype=op.weight.dtype, shape=shape)

    def _add(
        self,
        op: WeightedOp,
        kind: str,
        what: str,
        inputs: Sequence[gs.Tensor],
        attrs: dict[str, Any],
        shape: list[Any] | None,
    ) -> gs.Variable:
        """A node in front of the operator, and what it makes."""
        made = self._variable(op, what, shape)
        node = gs.Node(kind, _fresh(f"{op.name}_{what}", self._nodes), attrs, list(inputs), [made])
        self._model.graph.nodes.insert(self._place(op.node), node)
        return made

    def _place(self, node: gs.Node) -> int:
        # By identity: graphsurgeon compares nodes by what is in them.
        return next(place for place, each in enumerate(self._model.graph.nodes) if each is node)

    def _hand_on(self, key: str, to: gs.Node) -> None:
        """Attributes of the node `key` that graphsurgeon cannot hold go with the node that has the others."""
        nodes = self._model.metadata.nodes
        facts = nodes.get(key)
        if facts is not None and facts.attributes:
            nodes[to.outputs[0].name] = Facts(attributes=facts.attributes)
            nodes[key] = replace(facts, attributes=())


def _fresh(stem: str, taken: set[str]) -> str:
    """A name that is not taken; from now on it is."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name
