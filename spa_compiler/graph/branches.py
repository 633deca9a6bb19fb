"""A graph of a ModelProto together with the branches of its control flow."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def with_branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and every graph that its nodes hold, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from with_branches(attribute.g)
            for inner in attribute.graphs:
                yield from with_branches(inner)
