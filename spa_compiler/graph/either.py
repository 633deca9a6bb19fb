"""Two models of one signature in one file: which of them runs is decided by the size of an input, at every call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph import wire
from spa_compiler.graph.save import PROTOBUF_LIMIT
from spa_compiler.graph.weights import LARGE_BYTES

NAME = "spa/either"
_INT64_COMPARISONS = 9  # the opset from which on `Less` takes what `Size` gives
_FIRST, _SECOND = "__first", "__second"


@dataclass(frozen=True)
class Bounds:
    """The second model runs where `input` has fewer than `below` elements, or `above` or more of them; 0: nowhere."""

    input: str
    below: int
    above: int

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether the second one runs where `input` has this shape."""
        count = math.prod(shape)
        return count < self.below or bool(self.above and count >= self.above)


@dataclass(frozen=True)
class Outline:
    """A model whose large weights are stubs, and where the data of each lies, by number."""

    proto: onnx.ModelProto
    places: Mapping[int, wire.Place]

    @staticmethod
    def of(path: Path, first: int = 0) -> Outline:
        """A model of ours. Its stubs are numbered from `first` on."""
        found = wire.outline(path, LARGE_BYTES)
        if found is None:
            return Outline(onnx.load(str(path)), {})
        proto, places = found
        for number in places:
            wire.mark(proto.graph.initializer[number], first + number)
        return Outline(proto, {first + number: place for number, place in places.items()})


def unfit(first: onnx.ModelProto, second: onnx.ModelProto, stubs: int = 0) -> str:
    """Why two models cannot be one; empty if they can. `stubs`: bytes that belong into them besides."""
    for model in (first, second):
        graph = model.graph
        if any(o.domain in ("", "ai.onnx") and o.version < _INT64_COMPARISONS for o in model.opset_import):
            return f"its opset is older than {_INT64_COMPARISONS}"
        if model.functions or any(a.HasField("g") or a.graphs for n in graph.node for a in n.attribute):
            return "it has control flow or functions of its own"
        made = {name for node in graph.node for name in node.output}
        if any(o.name not in made or not o.type.HasField("tensor_type") for o in graph.output):
            return "an output is no tensor that a node makes"
        if any(t.data_location == TensorProto.EXTERNAL for t in graph.initializer):
            return "its weights lie beside it in a file of their own"
    if first.ByteSize() + second.ByteSize() + stubs > PROTOBUF_LIMIT:
        return "both forms are more than one file holds"
    return ""


def write_either(first: Path, second: Path, bounds: Bounds, output: Path) -> str:
    """Writes both models as one, as `either` does; their large weights pass through memory one by one.

    Returns:
        Why they cannot be one, and nothing was written; empty if all is well.
    """
    one = Outline.of(first)
    other = Outline.of(second, len(one.proto.graph.initializer))
    places = {**one.places, **other.places}
    if reason := unfit(one.proto, other.proto, sum(place.length for place in places.values())):
        return reason
    proto = either(one.proto, other.proto, bounds, places)
    wire.write(proto, output, {number: (place.length, partial(_data, place)) for number, place in places.items()})
    return ""


def _data(place: wire.Place) -> memoryview:
    return place.read().data


def either(
    first: onnx.ModelProto, second: onnx.ModelProto, bounds: Bounds, places: Mapping[int, wire.Place] | None = None
) -> onnx.ModelProto:
    """`first`, or `second` where `bounds` hold. What both have as the same initializer is there once; large ones are in
    the outermost graph, small ones, which fusions look for, in the branch that reads them.

    Args:
        first: gives the signature and the metadata; both are as `unfit` asks.
        places: where the data of stubs lies, by number.
    """
    theirs = {t.name: t for t in second.graph.initializer}
    own = [t for t in first.graph.initializer if t.name in theirs]
    same = {t.name for t in own if _equal(t, theirs[t.name], places or {})}
    result = onnx.ModelProto()
    result.CopyFrom(first)
    graph = result.graph
    for part in (graph.node, graph.initializer, graph.value_info, graph.quantization_annotation):
        del part[:]
    graph.initializer.extend(t for t in first.graph.initializer if t.name in same)
    known = {o.domain for o in result.opset_import}
    result.opset_import.extend(o for o in second.opset_import if o.domain not in known)

    size, tests = f"{NAME}/size", []

    def test(name: str, comparison: str, limit: int) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(limit, np.int64), f"{NAME}/{name}/limit"))
        tests.append(f"{NAME}/{name}")
        graph.node.append(helper.make_node(comparison, [size, f"{NAME}/{name}/limit"], tests[-1:], tests[-1]))

    graph.node.append(helper.make_node("Size", [bounds.input], [size], f"{NAME}/Size"))
    if bounds.below:
        test("below", "Less", bounds.below)
    if bounds.above:
        test("above", "Greater", bounds.above - 1)  # GreaterOrEqual is younger than some opsets
    if len(tests) > 1:
        graph.node.append(helper.make_node("Or", tests, [f"{NAME}/outside"], f"{NAME}/outside"))
        tests = [f"{NAME}/outside"]
    outputs = [o.name for o in graph.output]
    branches = {
        "then_branch": _branch(second.graph, _SECOND, same),
        "else_branch": _branch(first.graph, _FIRST, same),
    }
    for branch in branches.values():
        # ONNX Runtime 1.31 keeps weights of a branch two and a half times, those of the outermost graph once.
        small = [t for t in branch.initializer if not _is_large(t)]
        graph.initializer.extend(t for t in branch.initializer if _is_large(t))
        del branch.initializer[:]
        branch.initializer.extend(small)
    graph.node.append(helper.make_node("If", tests, outputs, NAME, **branches))
    return result


def original_name(name: str) -> str:
    """The name that a node or tensor of a branch had in its model."""
    return name.replace(_FIRST, "").replace(_SECOND, "")


def _branch(graph: onnx.GraphProto, suffix: str, outer: set[str]) -> onnx.GraphProto:
    """A model's graph as a branch; names in a file are unique, so all but the outer ones get the suffix."""
    own = {t.name for t in graph.initializer} | {name for node in graph.node for name in node.output}
    names = {name: name + suffix for name in own - outer if name}
    branch = onnx.GraphProto(name=(graph.name or "graph") + suffix)
    for node in graph.node:
        twin = branch.node.add()
        twin.CopyFrom(node)
        twin.name = node.name + suffix if node.name else ""
        twin.input[:] = [names.get(name, name) for name in node.input]
        twin.output[:] = [names.get(name, name) for name in node.output]
    for part, kept in (
        (branch.initializer, [t for t in graph.initializer if t.name not in outer]),
        (branch.output, graph.output),
        (branch.value_info, graph.value_info),
    ):
        _take(part, kept, names)
    return branch


def _take(part, kept, names: Mapping[str, str]) -> None:  # type: ignore[no-untyped-def]  # protobuf's containers
    for each in kept:
        twin = part.add()
        twin.CopyFrom(each)
        twin.name = names.get(each.name, each.name)


def _is_large(tensor: TensorProto) -> bool:
    return wire.marked(tensor) is not None or tensor.ByteSize() > LARGE_BYTES


def _equal(one: TensorProto, other: TensorProto, places: Mapping[int, wire.Place]) -> bool:
    stubs = wire.marked(one), wire.marked(other)
    if stubs[0] is not None and stubs[1] is not None:
        lie = places[stubs[0]], places[stubs[1]]
        alike = one.data_type == other.data_type and one.dims == other.dims and lie[0].length == lie[1].length
        return alike and bool((lie[0].read() == lie[1].read()).all())
    return (
        stubs == (None, None)
        and one.data_type == other.data_type
        and one.dims == other.dims
        and one.raw_data == other.raw_data
        and (bool(one.raw_data) or one.SerializeToString() == other.SerializeToString())
    )
