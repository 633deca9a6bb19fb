"""A model cut into waves: what can be computed once the first sites are rewritten, then the next ones, and so on.

    x -> [q, k, v] -> attention -> [o] -> + -> norm -> [fc1] -> gelu -> [fc2] -> ...
         wave 0                    wave 1              wave 2           wave 3

A site's wave is the number of rewritten sites on the longest way to its input, so every site of a wave reads what the
waves before it leave behind, and all sites of one wave can be solved side by side. Segment w is the part of the graph
that computes what wave w reads: it takes the tensors that earlier segments hand on, and is a small model by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph import weights
from spa_compiler.graph.model import Model, constants
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.save import skeleton
from spa_compiler.graph.session import Feeds

Overrides = Mapping[tuple[int, int], np.ndarray]
"""(number of a node, which of its inputs) -> the constant to put there."""


@dataclass(frozen=True)
class Segment:
    """The nodes between two waves, by number, in topological order.

    `takes` are computed earlier or fed, `gives` are read by later segments, `reads` by the sites of the wave behind.
    """

    nodes: tuple[int, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    reads: tuple[str, ...]


class Waves:
    """The cut of one model. Nothing in the model is changed; weights are read when a segment is built.

    Args:
        sites: the operators that will be rewritten.
        watched: further tensors to hand out with the wave of a site, by the site's place in `sites`; those that are
            not computed by then are left out.
    """

    def __init__(self, model: Model, sites: Sequence[WeightedOp], watched: Mapping[int, str] | None = None) -> None:
        self._proto = skeleton(model)
        self._weights = {constant.name: constant for constant in constants(model.graph)}
        self._small = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        self.inputs = tuple(value.name for value in model.signature.inputs)
        self._nodes = list(self._proto.graph.node)
        numbers = {id(node): number for number, node in enumerate(model.graph.nodes)}
        self.numbers = tuple(numbers[id(op.node)] for op in sites)
        self._reads = [tuple(dict.fromkeys(_read_by(node))) for node in self._nodes]
        self._levels = self._levelled()
        self.waves = tuple(self._level_of_inputs(number) for number in self.numbers)
        """The wave of each site."""
        self.watched = {site: name for site, name in (watched or {}).items() if self._known(name) <= self.waves[site]}
        self.segments = tuple(self._segment(wave) for wave in range(max(self.waves, default=-1) + 1))
        """One for each wave; what only the outputs need is in none."""

    def build(self, wave: int, arrays: Feeds, overrides: Overrides) -> bytes:
        """The segment of `wave` as a serialized model.

        Args:
            arrays: one array for each tensor that the segment takes: their types are stated, their shapes are not.
            overrides: rewritten constants, by node and input.
        """
        segment = self.segments[wave]
        nodes, initializers = [], {}
        for number in segment.nodes:
            node = onnx.NodeProto()
            node.CopyFrom(self._nodes[number])
            for place in range(len(node.input)):
                values = overrides.get((number, place))
                if values is not None:
                    node.input[place] = f"{node.input[place]}::{number}"
                    initializers[node.input[place]] = numpy_helper.from_array(values, node.input[place])
            nodes.append(node)
            for name in dict.fromkeys(_read_by(node)):
                if name in self._small:
                    initializers[name] = self._small[name]
                elif name in self._weights and name not in initializers:
                    initializers[name] = weights.proto_of(self._weights[name])
        for name in segment.reads:  # a site that reads a constant has nothing computed for it
            if name in self._weights:
                initializers[name] = weights.proto_of(self._weights[name])
        given = tuple(dict.fromkeys([*segment.gives, *segment.reads]))
        passed = [name for name in given if name in segment.takes]
        graph = helper.make_graph(
            nodes,
            f"wave{wave}",
            [_typed(name, arrays[name]) for name in segment.takes],
            [onnx.ValueInfoProto(name=name) for name in given if name not in passed],
            list(initializers.values()),
        )
        proto = helper.make_model(graph, opset_imports=self._proto.opset_import, ir_version=self._proto.ir_version)
        proto.functions.extend(self._proto.functions)
        return bytes(proto.SerializeToString())

    def computed(self, wave: int) -> tuple[str, ...]:
        """What the session of a segment gives out: `gives` and `reads` without what it was handed itself."""
        segment = self.segments[wave]
        return tuple(name for name in dict.fromkeys([*segment.gives, *segment.reads]) if name not in segment.takes)

    def is_common(self, name: str) -> bool:
        """Whether a tensor is computed before every site, so that rewriting changes nothing about it."""
        return self._known(name) == 0

    def _levelled(self) -> list[int]:
        """Level of each node: how many waves must be rewritten before its result is final."""
        self._made: dict[str, int] = dict.fromkeys(self.inputs, 0)
        sites = set(self.numbers)
        levels = []
        for number, node in enumerate(self._nodes):
            level = max((self._made.get(name, 0) for name in self._reads[number]), default=0) + (number in sites)
            levels.append(level)
            self._made.update((name, level) for name in node.output if name)
        return levels

    def _level_of_inputs(self, number: int) -> int:
        return max((self._made.get(name, 0) for name in self._reads[number]), default=0)

    def _known(self, name: str) -> int:
        return self._made.get(name, len(self._nodes) + 1)

    def _segment(self, wave: int) -> Segment:
        nodes = [number for number, level in enumerate(self._levels) if level == wave]
        made = {name for number in nodes for name in self._nodes[number].output if name}
        reads = [name for number in nodes for name in self._reads[number]]
        later = {
            name
            for number, level in enumerate(self._levels)
            if wave < level <= max(self.waves)
            for name in self._reads[number]
        }
        later.update(self._nodes[n].input[0] for n, w in zip(self.numbers, self.waves, strict=True) if w > wave)
        later.update(name for site, name in self.watched.items() if self.waves[site] > wave)
        wanted = [self._nodes[n].input[0] for n, w in zip(self.numbers, self.waves, strict=True) if w == wave]
        wanted += [name for site, name in self.watched.items() if self.waves[site] == wave]
        takes = dict.fromkeys(name for name in [*reads, *wanted] if name in self._made and name not in made)
        return Segment(
            tuple(nodes),
            tuple(takes),
            tuple(name for name in self._made if name in made and name in later),
            tuple(dict.fromkeys(wanted)),
        )

    def last_use(self) -> dict[str, int]:
        """For each tensor that segments take, the last segment that does."""
        last: dict[str, int] = {}
        for wave, segment in enumerate(self.segments):
            last.update((name, wave) for name in segment.takes)
        return last


def _read_by(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node reads, those that its branches capture among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs] if attribute.type in _GRAPHS else ():
            inside = {t.name for t in graph.initializer} | {v.name for v in graph.input}
            inside.update(name for inner in graph.node for name in inner.output)
            captured = (name for inner in graph.node for name in _read_by(inner))
            yield from (name for name in [*captured, *(v.name for v in graph.output)] if name not in inside)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _typed(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    kind = TensorProto.STRING if array.dtype.kind in "OUS" else helper.np_dtype_to_tensor_dtype(array.dtype)
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = kind
    return value
