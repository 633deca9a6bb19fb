"""`Model`: the graph that passes edit in place, with the facts about the file it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from spa_compiler.graph.metadata import Metadata

G_LOGGER.severity = G_LOGGER.CRITICAL  # it logs on stdout, which carries results only

Dim: TypeAlias = int | str | None
"""A size, a symbol, or nothing known."""


@dataclass(frozen=True)
class ValueInfo:
    """One graph input or output.

    `shape` has sizes, symbols (`"batch"`) or None per axis; it is `()` with `ranked` false where the file states no
    rank. `dtype` is numpy's (ml_dtypes for bfloat16 and the like; `object` for strings and for what is no tensor).
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]
    ranked: bool = True


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in the file's order; initializers that are listed as inputs are no inputs."""

    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """The distinct symbols of the inputs, in order of appearance."""
        seen: dict[str, None] = {}
        for value in self.inputs:
            seen.update((dim, None) for dim in value.shape if isinstance(dim, str))
        return tuple(seen)


@dataclass(frozen=True)
class Source:
    """Facts about the file: nothing in here changes when passes edit the graph.

    `bytes` counts the model file and its external data; `outer_constants` names the initializers of the outermost
    graph, which graphsurgeon may move into control-flow branches; `stated_shapes` names the tensors whose shapes the
    file states, inputs and outputs aside; `notes` says what loading had to change.
    """

    path: Path | None
    name: str
    opset: int
    ir_version: int
    bytes: int
    notes: tuple[str, ...] = ()
    outer_constants: frozenset[str] = frozenset()
    stated_shapes: frozenset[str] = frozenset()


@dataclass
class Model:
    """An ONNX model whose `graph` passes edit in place.

    Weights are graphsurgeon Constants; those that nobody touched stay lazy (`weights.Weight`). Arrays are shared
    between copies, so never write into `.values`: assign a new array instead.
    """

    graph: gs.Graph
    source: Source
    signature: Signature
    metadata: Metadata = field(default_factory=Metadata)

    def copy(self) -> Model:
        """A copy with its own nodes and tensors; weight arrays are shared."""
        graph = copy_graph(self.graph)
        return dataclasses.replace(self, graph=graph, metadata=self.metadata.copy())


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """graphsurgeon's copy, with what it loses put back: tensor types, data locations, producer, own opset imports."""
    originals = {tensor.name: tensor for scope in scopes(graph) for tensor in scope.tensors().values()}
    twin = graph.copy()
    twin.producer_name, twin.producer_version = graph.producer_name, graph.producer_version
    if graph.import_domains is not None:
        twin.import_domains = [onnx.helper.make_opsetid(d.domain, d.version) for d in graph.import_domains]
    for scope in scopes(twin):
        if scope is not twin:
            scope.import_domains = twin.import_domains
        for name, tensor in scope.tensors().items():
            original = originals.get(name)
            if isinstance(tensor, gs.Constant):
                tensor._export_dtype = None  # the copy pins it, and a pass that changes the dtype would then fail
            elif isinstance(original, gs.Variable):
                tensor.type = original.type
    return twin


def scopes(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph, then every graph inside its control-flow nodes, at any depth."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from scopes(value)


def constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Every distinct Constant of the graph and its branches, in order of first use (node attributes are not among
    them).
    """
    seen: set[int] = set()
    for scope in scopes(graph):
        for tensor in [*scope.tensors().values(), *scope.outputs]:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
