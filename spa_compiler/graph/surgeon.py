"""A skeleton ModelProto into an onnx-graphsurgeon graph, its weights attached by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from spa_compiler.graph.model import constants, scopes
from spa_compiler.graph.weights import Weight


def import_graph(proto: onnx.ModelProto, values: Mapping[str, Any], folder: Path | None) -> gs.Graph:
    """Imports a skeleton that is ours alone: the graph keeps references into it.

    Args:
        proto: small initializers hold their data; large ones have name, type and dims only.
        values: what stands for the large ones, by name: a TensorProto of the source file, lazy values, or an array.
        folder: where external data of TensorProtos lies.
    """
    graph = gs.import_onnx(proto)
    if graph.import_domains is not None:
        graph.import_domains = [onnx.helper.make_opsetid(d.domain, d.version) for d in graph.import_domains]
    for constant in constants(graph):
        tensor = getattr(constant._values, "tensor", None)
        held = values.get(constant.name, tensor)
        if isinstance(held, TensorProto):
            constant._values = Weight(held, folder)
        elif held is not tensor:
            constant._values = held
        constant.data_location = None
    for scope in scopes(graph):
        for node in scope.nodes:
            for value in node.attrs.values():
                if isinstance(value, gs.Constant) and isinstance(getattr(value._values, "tensor", None), TensorProto):
                    value._values = Weight(value._values.tensor, folder)
    return graph
