"""The same model in other floats: float32 while it is worked on, and for GPUs 16 bits in the end.

    x -> MatMul(W) -> Softmax -> y      ->      x -> Cast -> MatMul(W16) -> Softmax -> Cast -> y

Inputs and outputs keep their types. `half_plan` says which nodes stay float32.

onnxruntime.transformers.float16 converts, too, but keeps sums of squares in float16, makes 6e-8 of smaller epsilons,
rounds positions to 11 bits, takes no model of 2 GB, and knows no bfloat16 and no way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from spa_compiler.graph import shapes, weights
from spa_compiler.graph.half_kernels import ELEMENT, Half
from spa_compiler.graph.half_plan import LARGEST, MOVES, Plan, element_of
from spa_compiler.graph.model import Model, Signature, ValueInfo, constants, scopes

FLOAT = int(TensorProto.FLOAT)
END: dict[int, str] = {FLOAT: "f32"} | {kind: half for half, kind in ELEMENT.items()}
"""Element type -> how names of tensors of that type end."""

NUMPY: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Converted:
    """A model in 16 bits. `kept` names the nodes that stay float32, and why; `notes` is for the report."""

    model: Model
    kept: Mapping[str, str]
    notes: tuple[str, ...]


def dtype_of(kind: int) -> Any:
    """numpy's type for an ONNX float type."""
    return np.dtype(np.float32) if kind == FLOAT else NUMPY[END[kind]] if kind in END else kind


def halves(model: Model) -> set[Half]:
    """The 16-bit types among a model's constants, inputs and outputs."""
    found = {weights.onnx_type(c) for c in constants(model.graph)}
    found |= {element_of(t) for t in (*model.graph.inputs, *model.graph.outputs)}
    return {half for half, kind in ELEMENT.items() if kind in found}


def widened(model: Model, *, rounding: bool = False) -> Model:
    """A float32 twin of a model with 16-bit floats, inputs and outputs included; it computes the same, but rounds less.

    Weights stay where they are, and are widened whenever they are read.

    Args:
        rounding: round what every node gives to 16 bits, as a GPU does, which adds up in float32: ONNX Runtime on a CPU
            has few kernels for float16 and next to none for bfloat16, and leaves rounding out between the others.
    """
    twin, small = model.copy(), set(ELEMENT.values())
    computed = _computed(twin.graph, small) if rounding else []
    for constant in list(constants(twin.graph)):
        if weights.onnx_type(constant) in small:
            constant._values = weights.Widened(constant)
    for scope in scopes(twin.graph):
        for tensor in [*scope.tensors().values(), *scope.inputs, *scope.outputs]:
            if isinstance(tensor, gs.Variable) and element_of(tensor) in small:
                tensor.dtype = np.dtype(np.float32)
        for node in scope.nodes:
            for name in ("to", "dtype"):
                if node.attrs.get(name) in small and node.op != "BitCast":
                    node.attrs[name] = FLOAT
            value = node.attrs.get("value")
            if isinstance(value, gs.Constant) and weights.onnx_type(value) in small:
                node.attrs["value"] = gs.Constant(value.name, np.asarray(weights.array_of(value), np.float32))

    if computed:
        _round(twin.graph, computed)

    def signed(values: Sequence[ValueInfo]) -> tuple[ValueInfo, ...]:
        halfs = set(NUMPY.values())
        return tuple(dataclasses.replace(v, dtype=np.dtype(np.float32)) if v.dtype in halfs else v for v in values)

    def declared(values: Sequence[onnx.ValueInfoProto]) -> tuple[onnx.ValueInfoProto, ...]:
        return tuple(_retyped(v, FLOAT) if v.type.tensor_type.elem_type in small else v for v in values)

    twin.signature = Signature(signed(model.signature.inputs), signed(model.signature.outputs))
    twin.metadata.inputs, twin.metadata.outputs = declared(twin.metadata.inputs), declared(twin.metadata.outputs)
    return twin


def _computed(graph: gs.Graph, small: set[int]) -> list[tuple[gs.Node, int, int]]:
    """(node, place of the output, element type) of what nodes compute in 16 bits, and do not just pass on."""
    return [
        (node, place, element_of(tensor))
        for node in graph.nodes
        if node.op not in MOVES or node.op == "Cast"
        for place, tensor in enumerate(node.outputs)
        if tensor.name and element_of(tensor) in small
    ]


def _round(graph: gs.Graph, computed: Sequence[tuple[gs.Node, int, int]]) -> None:
    """Puts two Casts behind each, in place."""
    taken = {name for scope in scopes(graph) for name in scope.tensors()}
    for node, place, kind in computed:
        tensor = node.outputs[place]
        exact, narrow = gs.Variable(f"{tensor.name}__exact"), gs.Variable(f"{tensor.name}__{END[kind]}")
        if taken.isdisjoint((exact.name, narrow.name)):
            node.outputs[place] = exact
            graph.nodes.append(gs.Node("Cast", narrow.name, {"to": kind}, [exact], [narrow]))
            graph.nodes.append(gs.Node("Cast", f"{tensor.name}__f32", {"to": FLOAT}, [narrow], [tensor]))
    graph.toposort()


def _retyped(value: onnx.ValueInfoProto, kind: int) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.type.tensor_type.elem_type = kind
    return copy


def convert(model: Model, half: Half | None, source: Model | None = None, *, keep: Collection[str] = ()) -> Converted:
    """The model with weights and activations of 16 bits; a copy.

    Args:
        model: float32, its shapes inferred.
        half: the type; None: float32 stays, and `source`'s types are put back at the borders alone.
        source: what has the inputs and outputs that the result shall have; None: those of `model`.
        keep: names of nodes that must stay float32, beside those that `half_plan` finds.
    """
    twin = model.copy()
    if source is not None:
        twin.signature = source.signature
        twin.metadata.inputs, twin.metadata.outputs = source.metadata.inputs, source.metadata.outputs
    border = {v.name: int(v.type.tensor_type.elem_type) for v in (*twin.metadata.inputs, *twin.metadata.outputs)}
    plan = Plan(twin, half, border, keep)
    _Rewrite(twin, plan).apply()
    twin.graph.cleanup().toposort()
    shapes.infer(twin)
    names = {node.name: why for node in plan.nodes if (why := plan.kept.get(id(node))) is not None}
    return Converted(twin, names, tuple(_notes(plan)))


def _notes(plan: Plan) -> Iterator[str]:
    if plan.half is None:
        return
    count, reasons = sum(floats is not None for floats in plan.floats.values()), dict[str, int]()
    for why in plan.kept.values():
        reasons[why] = reasons.get(why, 0) + 1
    told = "; ".join(f"{n}: {why}" for why, n in sorted(reasons.items(), key=lambda each: -each[1]))
    yield f"{plan.half}: {count - len(plan.kept)} of {count} nodes run on 16 bits" + (f" ({told})" if told else "")
    if plan.clamped:
        one = len(plan.clamped) == 1
        names = ", ".join(plan.clamped[:3]) + (", ..." if len(plan.clamped) > 3 else "")
        what = "1 constant" if one else f"{len(plan.clamped)} constants"
        yield f"{plan.half}: {what} beyond +-{LARGEST:.0f} became +-{LARGEST:.0f}: {names}"


class _Rewrite:
    """Carries a plan out: constants, types, Casts."""

    def __init__(self, model: Model, plan: Plan) -> None:
        self._graph, self._plan = model.graph, plan
        self._half = FLOAT if plan.half is None else ELEMENT[plan.half]
        self._taken = {name for scope in scopes(model.graph) for name in scope.tensors()}
        self._kinds: dict[int, int] = {}  # of tensors that are not float32, by identity
        self._as: dict[tuple[int, int], gs.Variable] = {}  # a tensor in an element type
        self._constants: dict[int, gs.Constant] = {}
        self._casts: list[gs.Node] = []

    def apply(self) -> None:
        """In place."""
        plan, graph = self._plan, self._graph
        inner = [scope for scope in scopes(graph) if scope is not graph]
        needs = list(self._needs()) + [
            (node, i, t, FLOAT) for scope in inner for node in scope.nodes for i, t in enumerate(node.inputs)
        ]
        own = self._own_constants(needs)
        for t in graph.inputs:
            self._kinds[id(t)] = plan.border.get(t.name, element_of(t))
            t.dtype = dtype_of(self._kinds[id(t)])
        for node in plan.narrow():
            self._name_types(node)
            for t in plan.results(node):
                self._kinds[id(t)] = self._half
                t.dtype = dtype_of(self._half)
        for t in graph.outputs:
            self._give_out(t)
        for node, i, t, want in needs:
            if isinstance(t, gs.Constant):
                node.inputs[i] = self._constant(t, own) if want == self._half != FLOAT else t
            elif id(t) in self._kinds or want != FLOAT:
                node.inputs[i] = self._in_type(t, want)
        for scope in inner:  # a branch that gives an outer tensor out as it is
            for place, t in enumerate(scope.outputs):
                if id(t) in self._kinds:
                    scope.outputs[place] = self._in_type(t, FLOAT)
        graph.nodes.extend(self._casts)

    def _needs(self) -> Iterator[tuple[gs.Node, int, gs.Tensor, int]]:
        """(node, place, tensor, element type that it takes there) of the float inputs of all outer nodes."""
        for node in self._plan.nodes:
            floats = self._plan.floats[id(node)]
            for i, t in enumerate(node.inputs):
                if element_of(t) != FLOAT or not t.name:
                    continue
                if floats is None:  # takes whatever there is
                    yield node, i, t, 0
                else:
                    narrow = id(node) not in self._plan.kept and i in floats.inputs
                    yield node, i, t, self._half if narrow else FLOAT

    def _in_type(self, tensor: gs.Variable, want: int) -> gs.Variable:
        """The tensor, or what a Cast makes of it; `want` 0 is any type."""
        kind = self._kinds.get(id(tensor), FLOAT)
        found = self._as.get((id(tensor), want or kind))
        if found is not None:
            return found
        if want in (0, kind):
            return tensor
        end = END[want]
        made = gs.Variable(self._name(f"{tensor.name}_{end}"), dtype=dtype_of(want), shape=tensor.shape)
        self._as[id(tensor), want] = made
        self._cast(self._as.get((id(tensor), kind), tensor), made, want)
        return made

    def _give_out(self, output: gs.Variable) -> None:
        """A graph output keeps its name and type: where its maker gives another type, a Cast stands between them."""
        made, border = self._kinds.get(id(output), FLOAT), self._plan.border.get(output.name, element_of(output))
        if not output.inputs or element_of(output) not in END or made == border:
            return
        if any(output is t for t in self._graph.inputs):
            return
        maker = output.inputs[0]
        place = next(i for i, t in enumerate(maker.outputs) if t is output)
        own = gs.Variable(self._name(f"{output.name}_{END[made]}"), dtype=dtype_of(made), shape=output.shape)
        maker.outputs[place] = own
        output.dtype = dtype_of(border)
        self._kinds[id(output)] = made
        self._as[id(output), made], self._as[id(output), border] = own, output
        self._cast(own, output, border)

    def _cast(self, source: gs.Variable, target: gs.Variable, to: int) -> None:
        name = self._name(f"{target.name}_cast")
        self._casts.append(gs.Node("Cast", name, {"to": int(to)}, [source], [target]))

    def _own_constants(self, needs: Sequence[tuple[gs.Node, int, gs.Tensor, int]]) -> set[int]:
        """Constants that are read in 16 bits alone, and so keep their names."""
        wide = {id(t) for _, _, t, want in needs if want != self._half}
        return {id(t) for _, _, t, _ in needs} - wide - {id(t) for t in self._graph.outputs}

    def _constant(self, constant: gs.Constant, own: set[int]) -> gs.Constant:
        if id(constant) not in self._constants:
            values = np.asarray(weights.array_of(constant))
            beyond = np.isfinite(values) & (np.abs(values) > LARGEST)
            if self._plan.half == "fp16" and np.any(beyond):
                values = np.where(beyond, np.sign(values) * LARGEST, values)
                self._plan.clamped.append(constant.name)
            with np.errstate(over="ignore", under="ignore"):
                narrow = np.asarray(values.astype(dtype_of(self._half)), order="C")
            if id(constant) in own:
                constant.values = narrow
                self._constants[id(constant)] = constant
            else:
                self._constants[id(constant)] = gs.Constant(self._name(f"{constant.name}_{END[self._half]}"), narrow)
        return self._constants[id(constant)]

    def _name_types(self, node: gs.Node) -> None:
        """Types that a node names itself."""
        if node.op == "Cast":
            node.attrs["to"] = int(self._half)
        elif node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            fill = np.zeros(1, np.float32) if value is None else np.asarray(weights.array_of(value))
            if self._plan.half == "fp16":
                fill = np.where(np.isfinite(fill), np.clip(fill, -LARGEST, LARGEST), fill)
            node.attrs["value"] = gs.Constant(f"{node.name}_value", fill.astype(dtype_of(self._half)))

    def _name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name
