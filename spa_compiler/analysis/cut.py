"""Cuts units out of a model: constants are sliced, then every node that names a size is patched.

A cut is exact: the result computes what the whole model computes with the activations of the removed units set to zero
wherever they are read. Sizes that the graph computes with (`Shape`) stay those of the whole model, as they may be
used as numbers; what takes them as sizes is patched.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis import count
from spa_compiler.analysis.count import Removed
from spa_compiler.analysis.facts import Array
from spa_compiler.analysis.terms import Axis, Indices
from spa_compiler.graph.fold import lift_constants
from spa_compiler.graph.model import Model, constants
from spa_compiler.graph.weights import array_of

if TYPE_CHECKING:
    from spa_compiler.analysis.analyze import Analysis

Statistics: TypeAlias = Literal["masked", "kept"]
Slabs: TypeAlias = dict[tuple[str, int], Indices]
"""(tensor, axis) -> indices, ascending."""


def cut(model: Model, analysis: Analysis, removed: Removed, statistics: Statistics = "masked") -> Model:
    """A copy of the model without the units.

    Args:
        analysis: of this model, or of one with the same tensor names.
        removed: group id -> units; they must leave an element to every Dim (`choose.spare`).
        statistics: what norms and means over an axis that shrinks count: the whole axis with the removed indices as
            zeros (exact), or what is left alone (another model: its statistics are those of a smaller one).
    """
    out = model.copy()
    apply(out, analysis, removed, statistics)
    return out


def apply(model: Model, analysis: Analysis, removed: Removed, statistics: Statistics = "masked") -> None:
    """`cut` in place. Weight arrays are replaced, never written to."""
    lift_constants(model.graph)
    Cut(model, analysis, removed, statistics).run()


def removed_slabs(analysis: Analysis, removed: Removed) -> tuple[Slabs, Slabs]:
    """What goes from parameters, and what is to be masked of activations to check the result."""
    gone: tuple[dict[tuple[str, int], list[Indices]], ...] = ({}, {})
    for number, units in removed.items():
        group = analysis.groups[number]
        chosen = np.zeros(group.size + 1, np.bool_)  # the last one answers for -1
        chosen[np.fromiter(units, np.int64)] = True
        for member in group.members:
            hit = np.logical_or.reduce([chosen[row] for row in member.occurrences])
            if hit.any():
                place = gone[0 if member.is_parameter else 1]
                place.setdefault((member.tensor, member.axis), []).append(np.flatnonzero(hit))
    parameters, activations = ({key: np.unique(np.concatenate(found)) for key, found in side.items()} for side in gone)
    return parameters, activations


class Cut:
    """The model being cut, and what stays. Tensors are given as graphsurgeon tensors or by name.

    Sizes "before" are those of the file; where they depend on the inputs, of the binding that the analysis chose.
    """

    def __init__(self, model: Model, analysis: Analysis, removed: Removed, statistics: Statistics = "masked") -> None:
        self.graph = model.graph
        self.statistics = statistics
        self._analysis = analysis
        self._facts = analysis.facts
        self._dead = count.dead(analysis, removed)
        self._keep: dict[int, Indices | None] = {}
        self._names = {*model.graph.tensors(), *(node.name for node in model.graph.nodes)}

    def run(self) -> None:
        """Slices the constants, then lets every Patch speak."""
        for tensor in constants(self.graph):
            values = None
            for axis in range(len(self._facts.axes.get(tensor.name, ()))):
                kept = self.keep(tensor, axis)
                if kept is not None:
                    values = np.take(array_of(tensor) if values is None else values, kept, axis)
            if values is not None:
                tensor.values = np.ascontiguousarray(values)
        by_output = {node.outputs[0].name: node for node in self.graph.nodes if node.outputs}
        for patch in self._facts.patches:
            if patch.node in by_output:
                patch.apply(by_output[patch.node], self)
        for tensor in self.graph.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor.name in self._facts.axes:
                axes = range(len(self._facts.axes[tensor.name]))
                if any(self.keep(tensor, axis) is not None for axis in axes):
                    tensor.shape = None

    def keep(self, tensor: Any, axis: int) -> Indices | None:
        """Positions on the axis that stay, ascending; None if all do."""
        axes = self._facts.axes.get(tensor if isinstance(tensor, str) else tensor.name)
        return None if axes is None else self.keep_on(axes[axis])

    def keep_on(self, axis: Axis) -> Indices | None:
        """The same for an axis of the algebra."""
        if id(axis) not in self._keep:
            numbering = self._analysis.numbering
            gone = numbering.gone(axis, self._dead) if numbering.may_lose(axis) else np.zeros(0, np.bool_)
            self._keep[id(axis)] = np.flatnonzero(~gone) if gone.any() else None
        return self._keep[id(axis)]

    def size_on(self, axis: Axis) -> tuple[int, int]:
        """Indices on an axis of the algebra, of known size, before and after."""
        before = self._facts.algebra.size(axis)
        if before is None:
            raise ValueError("an axis of unknown size is never cut")
        kept = self.keep_on(axis)
        return before, before if kept is None else int(kept.size)

    def sizes(self, tensor: Any, axis: int) -> tuple[int, int]:
        """Indices on an axis of a tensor before and after."""
        return self.size_on(self._facts.axes[tensor if isinstance(tensor, str) else tensor.name][axis])

    def constant(self, values: Array, hint: str) -> gs.Constant:
        """A new initializer under a free name made from `hint`."""
        return gs.Constant(self.free_name(hint), np.array(values, order="C"))  # ascontiguousarray makes scalars [1]

    def value(self, node: gs.Node, place: int) -> Array | None:
        """The values of input `place` if it is a constant now, sliced already."""
        tensor = node.inputs[place] if place < len(node.inputs) else None
        return array_of(tensor) if isinstance(tensor, gs.Constant) else None

    def set_input(self, node: gs.Node, place: int, values: Array) -> None:
        """Gives the node a constant of its own at input `place`; other users of the old one keep it."""
        own = self.constant(values, f"{node.outputs[0].name}_{place}")
        while len(node.inputs) < place:
            node.inputs.append(gs.Variable.empty())
        if place == len(node.inputs):
            node.inputs.append(own)
        else:
            node.inputs[place] = own

    def before(
        self, node: gs.Node, place: int, op: str, extra: list[Array], attrs: dict[str, Any] | None = None
    ) -> gs.Node:
        """Puts `op(input, *extra)` between the node and its input `place`; other users of the input see nothing of it.

        Returns:
            The new node.
        """
        tensor = node.inputs[place]
        name = self.free_name(f"{node.outputs[0].name}_{op}")
        result = gs.Variable(name, dtype=tensor.dtype)
        new = gs.Node(op, name, dict(attrs or {}), [tensor, *self._constants(extra, name)], [result])
        node.inputs[place] = result
        self._insert(new, node, 0)
        return new

    def after(
        self, node: gs.Node, place: int, op: str, extra: list[Array], attrs: dict[str, Any] | None = None
    ) -> gs.Node:
        """Puts `op(output, *extra)` behind output `place`: every user, and the graph, gets its result under the
        output's own name.

        Returns:
            The new node.
        """
        tensor = node.outputs[place]
        name = self.free_name(f"{tensor.name}_whole")
        whole = gs.Variable(name, dtype=tensor.dtype)
        node.outputs[place] = whole
        new = gs.Node(op, self.free_name(f"{tensor.name}_{op}"), dict(attrs or {}), None, None)
        new.inputs = [whole, *self._constants(extra, name)]
        new.outputs = [tensor]
        self._insert(new, node, 1)
        return new

    def replace(self, node: gs.Node, nodes: list[gs.Node]) -> None:
        """Puts nodes, in topological order, in the place of one; they must make its outputs, which it has lost."""
        at = self._at(node)
        self.graph.nodes[at : at + 1] = nodes

    def patch_sizes(self, node: gs.Node, place: int, output: int = 0) -> None:
        """Input `place` lists the sizes of the node's output (Reshape, Expand, ConstantOfShape), aligned at the last:
        entries of axes that shrank follow, whether it is a constant (0 and -1 stay) or computed in the graph.
        """
        axes = self._facts.axes[self._original(node.outputs[output].name)]
        sizes = [self.size_on(axis) if self.keep_on(axis) is not None else (1, 1) for axis in axes]
        if all(before == after for before, after in sizes):
            return
        values = self.value(node, place)
        if values is not None:
            entries = np.array(values, np.int64)
            for back in range(1, min(entries.size, len(sizes)) + 1):
                before, after = sizes[-back]
                if before != after and entries[-back] == before:
                    entries[-back] = after
            self.set_input(node, place, entries)
            return
        known = self._facts.settled.values[node.inputs[place].name]
        count_ = int(known.array.size)
        ratio = np.ones((2, count_), np.int64)
        for back in range(1, min(count_, len(sizes)) + 1):
            before, after = sizes[-back]
            literal = bool(known.fixed.reshape(-1)[-back]) and int(known.array.reshape(-1)[-back]) != before
            if before != after and not literal:
                common = math.gcd(before, after)
                ratio[:, -back] = after // common, before // common
        if (ratio != 1).any():
            self.before(node, place, "Mul", [ratio[0]])
            self.before(node, place, "Div", [ratio[1]])

    def _original(self, name: str) -> str:
        """The name by which the facts know the output of a node, whatever was put behind it since."""
        while name not in self._facts.axes:
            user = next(n for n in self.graph.nodes if any(t.name == name for t in n.inputs))
            name = user.outputs[0].name
        return name

    def _constants(self, extra: list[Array], hint: str) -> list[gs.Constant]:
        return [self.constant(np.asarray(values), f"{hint}_{place}") for place, values in enumerate(extra)]

    def _insert(self, new: gs.Node, node: gs.Node, offset: int) -> None:
        self.graph.nodes.insert(self._at(node) + offset, new)

    def _at(self, node: gs.Node) -> int:
        return next(place for place, other in enumerate(self.graph.nodes) if other is node)

    def free_name(self, hint: str) -> str:
        """A name for a tensor or a node that nothing has yet."""
        name, number = hint, 0
        while name in self._names:
            number += 1
            name = f"{hint}_{number}"
        self._names.add(name)
        return name
