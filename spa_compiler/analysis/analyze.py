"""Model -> Analysis: every node's rule states its facts, what has no rule pins its axes, groups follow.

Pure: the model is not touched. No large weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis import schema
from spa_compiler.analysis.facts import Facts, Pin
from spa_compiler.analysis.groups import Group, partition
from spa_compiler.analysis.numbering import Numbering
from spa_compiler.analysis.rules import find
from spa_compiler.analysis.rules.inputs import stored
from spa_compiler.analysis.unify import Incompatible
from spa_compiler.graph import settle
from spa_compiler.graph.model import Model, scopes

_NO_PARAMETERS = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.bool_), np.dtype(np.object_))
"""Types of shapes, indices, masks and strings."""

_MOVES: dict[str, int | None] = {"Concat": None} | dict.fromkeys(
    ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"), 1
)
"""Operators that compute nothing, and how many of their inputs are data (None: all)."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """Groups of coupled channels, and what pins the rest.

    `params` counts the model's parameters (elements of constants but int32, int64, bool and strings), `prunable` those
    that lie in some unit. `parameters` names the constants that are counted. `facts` has the axes of every tensor and
    the Patches, `numbering` what each index hangs on, for what cuts and counts.
    """

    groups: tuple[Group, ...]
    pins: tuple[schema.Pin, ...]
    params: int
    prunable: int
    parameters: tuple[str, ...]
    facts: Facts
    numbering: Numbering

    def document(self) -> schema.Document:
        """All of it as plain data, units included."""
        groups = [schema.Group(g.id, g.size, g.granularity, g.params, g.macs, g.units) for g in self.groups]
        return schema.Document(groups, list(self.pins))

    def to_json(self) -> str:
        """The JSON text that `schema` documents."""
        return msgspec.json.encode(self.document()).decode()


def analyze(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Analysis:
    """Finds the groups of a model.

    Args:
        model: shapes are inferred on a copy, so they need not be there.
        shapes: sizes of inputs to count MACs for, where the file leaves them open.
    """
    twin = model.copy()
    sizes = settle.settle(twin, shapes)
    settle.apply(twin, sizes)
    _forget_ones(twin, sizes)
    constants = _constants(twin.graph)
    split = _given_out(twin.graph)
    while True:
        facts = _facts(twin.graph, sizes, split)
        parts = partition(facts, constants)
        reshapes = {node.outputs[0].name for node in twin.graph.nodes if node.op == "Reshape"}
        merged = (parts.numbering.loose - split) & reshapes
        if not merged:
            break
        split |= merged
    counted = tuple(name for name, counts in constants.items() if counts and name in facts.axes)
    return Analysis(parts.groups, parts.pins, parts.params, parts.prunable, counted, facts, parts.numbering)


def _given_out(graph: gs.Graph) -> frozenset[str]:
    """Reshapes that a cut must leave where they are: the graph gives out what they, or their readers, make."""
    outputs = {id(tensor) for tensor in graph.outputs}
    found = set()
    for node in graph.nodes:
        if node.op == "Reshape":
            made = [node.outputs[0], *(tensor for user in node.outputs[0].outputs for tensor in user.outputs)]
            if any(id(tensor) in outputs for tensor in made):
                found.add(node.outputs[0].name)
    return frozenset(found)


def _facts(graph: gs.Graph, sizes: settle.Settled, split: frozenset[str]) -> Facts:
    facts = Facts(sizes, graph.opset, split=split)
    for tensor in graph.inputs:
        facts.pin_tensor("graph input", tensor, "interface")
    for node in graph.nodes:
        _visit(node, facts)
        if node.op in _MOVES and all(t.name in facts.silent for t in node.inputs[: _MOVES[node.op]] if t.name):
            facts.silent.update(tensor.name for tensor in node.outputs)
    for tensor in graph.outputs:
        facts.pin_tensor("graph output", tensor, "interface")
    _pin_unsized(facts)
    return facts


def _forget_ones(model: Model, sizes: settle.Settled) -> None:
    """Open dimensions behind the first that no size but 1 was found for may still be something else at run time."""
    declared = {value.name: value.shape for value in model.signature.inputs}
    for tensor in model.graph.inputs:
        shape = list(tensor.shape or ())
        for axis, dim in enumerate(declared.get(tensor.name, ())):
            is_one = axis and not isinstance(dim, int) and axis < len(shape) and shape[axis] == 1
            if is_one and not sizes.varies.get(tensor.name, (True,) * len(shape))[axis]:
                shape[axis] = None
        tensor.shape = shape if tensor.shape is not None else None


def _visit(node: gs.Node, facts: Facts) -> None:
    rule = find(node)
    if rule is None:
        name = f"{node.domain}::{node.op}" if node.domain else node.op
        reason: str | None = f"no rule for {name}"
    else:
        try:
            reason = rule(node, facts)
        except Incompatible as error:
            reason = str(error)
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if tensor.name]
    if reason is not None:
        for tensor in [*tensors, *_captured(node, facts)]:
            facts.pin_tensor(node.op, tensor, reason)
        return
    for tensor in node.outputs:
        if tensor.name and tensor.name not in facts.axes and tensor.shape is not None:
            facts.pin_tensor(node.op, tensor, f"{node.op} says nothing of this output")


def _captured(node: gs.Node, facts: Facts) -> list[Any]:
    """Tensors of the outer graph that the branches of a control-flow node use."""
    found: dict[str, Any] = {}
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for scope in scopes(value):
                for tensor in [*scope.outputs, *(t for inner in scope.nodes for t in inner.inputs)]:
                    if tensor.name in facts.axes or isinstance(tensor, gs.Constant):
                        found[tensor.name] = tensor
    return list(found.values())


def _pin_unsized(facts: Facts) -> None:
    """What is merged with an axis of unknown size stays: its indices cannot be told."""
    for name, axes in facts.axes.items():
        for number, axis in enumerate(axes):
            if facts.algebra.size(axis) is None:
                facts.pins.append(Pin(name, number, "shape", "merged with an axis of unknown size", (axis,)))


def _constants(graph: gs.Graph) -> dict[str, bool]:
    """Constants and outputs of Constant nodes, and whether each counts as parameters."""
    out: dict[str, bool] = {}
    for tensor in graph.tensors().values():
        if stored(tensor):
            out[tensor.name] = tensor.dtype not in _NO_PARAMETERS
    return out
