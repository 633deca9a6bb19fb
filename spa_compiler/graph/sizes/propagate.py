"""One pass over the nodes of a graph: what is known of the inputs becomes what is known of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Signature
from spa_compiler.graph.sizes import microsoft_shapes, onnx_shapes
from spa_compiler.graph.sizes.control_flow import control
from spa_compiler.graph.sizes.evaluate import evaluate
from spa_compiler.graph.sizes.inference import infer
from spa_compiler.graph.sizes.known import NOTHING, Dims, Known, Misfit, Op, constant, constant_node, elem_of
from spa_compiler.graph.sizes.onnx_shapes import Rule

_RULES: dict[str, dict[str, Rule]] = {
    "": onnx_shapes.RULES,
    "ai.onnx.ml": onnx_shapes.ML,
    "com.microsoft": microsoft_shapes.RULES,
}
_SAME_TYPE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Pow", "Neg", "Sqrt", "Relu", "Sigmoid", "Softmax", "MatMul", "Gemm", "Conv"}
    | {"Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Split", "Identity"}
)  # whose outputs have their first input's type


@dataclass
class Pass:
    """One binding's results; `conflicts` counts nodes that cannot take the sizes they get."""

    inputs: Mapping[str, Dims]
    known: dict[str, Known]
    conflicts: int = 0

    @property
    def unknown(self) -> int:
        """How many tensors have a size that is not known."""
        return sum(not known.complete for known in self.known.values())


@dataclass(frozen=True)
class _Seen:
    """What a node made of what it was given: a later pass that gives it the same need not ask again."""

    given: list[Known]
    results: list[Known]
    conflict: bool


class Walk:
    """The nodes of a graph, to be passed over with several bindings; what does not change is computed once."""

    def __init__(self, graph: gs.Graph, signature: Signature) -> None:
        self._signature = signature
        opsets = {"" if d.domain == "ai.onnx" else d.domain: d.version for d in graph.import_domains or ()}
        opsets.setdefault("", graph.opset)
        self._ops = [Op(node, opsets) for node in graph.nodes]
        self._seen: dict[Op, _Seen] = {}
        self._branches: dict[int, Walk] = {}
        self._stated = {
            name: tensor
            for name, tensor in graph.tensors().items()
            if isinstance(tensor, gs.Variable) and (tensor.shape is not None or tensor.dtype is not None)
        }
        used = [tensor for node in graph.nodes for tensor in node.inputs] + list(graph.outputs)
        constants = {tensor.name: tensor for tensor in used if isinstance(tensor, gs.Constant)}
        self._constants = {name: constant(tensor) for name, tensor in constants.items()}

    def run(self, inputs: Mapping[str, Dims]) -> Pass:
        """One pass with these shapes of the inputs."""
        known = self._start(inputs)
        symbols: dict[str, int] = {}
        for value in self._signature.inputs:
            shape = inputs.get(value.name) or ()
            symbols |= {d: s for d, s in zip(value.shape, shape, strict=False) if isinstance(d, str) and s}
        conflicts = self._visit(known, symbols)
        return Pass(inputs, known, conflicts)

    def types(self, shapes: Mapping[str, Dims]) -> dict[str, int]:
        """Element types of all tensors whose shapes are known already."""
        known = self._start(shapes)
        for op in self._ops:
            given = [known.get(name, NOTHING) for name in op.inputs]
            if op.name == "Constant" and not op.domain:
                results = [constant_node(op)]
            elif op.name in _SAME_TYPE and not op.domain and given[0].elem:
                results = [Known(given[0].elem)] * len(op.outputs)
            elif op.has_branches:
                results = self._control(op, given, known, {})
            else:
                results, _ = _shapes(op, given)
            for name, result in zip(op.outputs, results, strict=True):
                known[name] = Known(result.elem, shapes.get(name), other=result.other)
        return {name: tensor.elem for name, tensor in known.items()}

    def _start(self, shapes: Mapping[str, Dims]) -> dict[str, Known]:
        inputs = {v.name: Known(elem_of(v.dtype), shapes.get(v.name)) for v in self._signature.inputs}
        return {**self._constants, **inputs}

    def _visit(self, known: dict[str, Known], symbols: Mapping[str, int]) -> int:
        """Adds what is known of all nodes' outputs; returns how many nodes refuse their inputs."""
        conflicts = 0
        for op in self._ops:
            given = [known.get(name, NOTHING) for name in op.inputs]
            if op.has_branches:
                results = self._control(op, given, known, symbols)
            else:
                seen = self._ask(op, given)
                results = seen.results
                conflicts += seen.conflict
            for name, result in zip(op.outputs, results, strict=True):
                known[name] = result if result.elem and result.complete else self._as_stated(name, result, symbols)
        known.pop("", None)
        return conflicts

    def _ask(self, op: Op, given: list[Known]) -> _Seen:
        """Values if they can be had, else shapes; results that are no news stay the very same objects."""
        seen = self._seen.get(op)
        if seen is not None and all(a is b for a, b in zip(seen.given, given, strict=True)):
            return seen
        results, conflict = _results(op, given)
        if seen is not None:
            results = [was if was.same(now) else now for was, now in zip(seen.results, results, strict=True)]
        self._seen[op] = _Seen(given, results, conflict)
        return self._seen[op]

    def _control(
        self, op: Op, given: list[Known], outer: Mapping[str, Known], symbols: Mapping[str, int]
    ) -> list[Known]:
        """What is known after the node's branches; a branch that cannot take its sizes is no conflict."""

        def branch(name: str, inputs: Sequence[Known]) -> list[Known]:
            graph = op.attrs[name]
            walk = self._branches.get(id(graph))
            if walk is None:
                walk = self._branches[id(graph)] = Walk(graph, self._signature)
            known = {**outer, **walk._constants}
            known |= {tensor.name: state for tensor, state in zip(graph.inputs, inputs, strict=False)}
            walk._visit(known, symbols)
            return [known.get(tensor.name, NOTHING) for tensor in graph.outputs]

        return _padded(op, control(op, given, branch))

    def _as_stated(self, name: str, known: Known, symbols: Mapping[str, int]) -> Known:
        """What is known, and where that leaves gaps, what the file says; symbols replaced."""
        tensor = self._stated.get(name)
        if tensor is None or known.other is not None:
            return known
        elem, shape = known.elem, known.shape
        if not elem and isinstance(tensor.dtype, np.dtype | type):
            elem = elem_of(np.dtype(tensor.dtype))
        if tensor.shape is not None:
            stated = tuple(d if isinstance(d, int) and d >= 0 else symbols.get(str(d)) for d in tensor.shape)
            if shape is None:
                shape = stated
            elif len(shape) == len(stated):
                shape = tuple(b if a is None else a for a, b in zip(shape, stated, strict=True))
        return known if (elem, shape) == (known.elem, known.shape) else Known(elem, shape)


def _results(op: Op, given: list[Known]) -> tuple[list[Known], bool]:
    """What is known of a node's outputs, and whether the node refuses its inputs."""
    try:
        values, refused = evaluate(op, given), False
    except Misfit:
        values, refused = None, True
    if values is not None:
        return values, False
    results, misfit = _shapes(op, given)
    return results, refused or misfit


def _shapes(op: Op, given: list[Known]) -> tuple[list[Known], bool]:
    try:
        results = _padded(op, _rule(op)(op, given))
    except (Misfit, IndexError, TypeError, ValueError, ZeroDivisionError):
        refused = all(known.complete for known, name in zip(given, op.inputs, strict=True) if name)
        return _padded(op, []), refused
    windowed = "kernel_shape" in op.attrs or op.name in ("Conv", "FusedConv")
    sizes = [size for known in results for size in known.shape or () if size is not None]
    return results, any(size < 0 or (windowed and size == 0) for size in sizes)


def _rule(op: Op) -> Rule:
    """By hand, or onnx's inference; ONNX Runtime's own operators often share name and shapes with onnx's."""
    rule = _RULES.get(op.domain, {}).get(op.name)
    if rule is not None:
        return rule
    return (lambda op, given: infer(op, given, op.name)) if op.domain == "com.microsoft" else infer


def _padded(op: Op, results: list[Known]) -> list[Known]:
    return (results + [NOTHING] * len(op.outputs))[: len(op.outputs)]
