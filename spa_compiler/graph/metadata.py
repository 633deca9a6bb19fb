"""What graphsurgeon drops on the way through, kept by name and put back on export.

Dropped are: metadata_props of model, graph, nodes, inputs and initializers; doc strings but the graph's; the model's
version and domain; quantization annotations; and node attributes of kinds that graphsurgeon cannot hold (sparse
tensors, types, lists of tensors or graphs, empty lists, strings that are not UTF-8).

A node is known by its *key*, the name of its first output: output names are unique where node names need not be, and
rewrites keep them. Nodes inside control flow have the branch in front, `<key of the node>:<attribute>/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from onnx import AttributeProto

_HELD = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.GRAPH,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.STRINGS,
}


@dataclass(frozen=True)
class Facts:
    """Documentation, key-value pairs and attributes of one node or tensor."""

    doc: str = ""
    props: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[AttributeProto, ...] = ()


@dataclass
class Metadata:
    """Everything that is put back on export, keyed by name (nodes: by key, see above)."""

    doc: str = ""
    domain: str = ""
    version: int = 0
    props: dict[str, str] = field(default_factory=dict)
    graph_props: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, Facts] = field(default_factory=dict)
    constants: dict[str, Facts] = field(default_factory=dict)
    inputs: tuple[onnx.ValueInfoProto, ...] = ()
    outputs: tuple[onnx.ValueInfoProto, ...] = ()
    quantization: tuple[onnx.TensorAnnotation, ...] = ()

    def copy(self) -> Metadata:
        """Own dictionaries; the facts themselves are shared and never written to."""
        return replace(
            self,
            props=dict(self.props),
            graph_props=dict(self.graph_props),
            nodes=dict(self.nodes),
            constants=dict(self.constants),
        )

    def annotate(self, node: Any, props: Mapping[str, str]) -> None:
        """Adds `metadata_props` to a node (a graphsurgeon node of the outermost graph) in the written file."""
        key = next(tensor.name for tensor in node.outputs if tensor.name)
        old = self.nodes.get(key, Facts())
        self.nodes[key] = replace(old, props={**old.props, **props})

    def props_of(self, node: Any) -> Mapping[str, str]:
        """The `metadata_props` that a node (of the outermost graph) has now."""
        key = next((tensor.name for tensor in node.outputs if tensor.name), "")
        return self.nodes.get(key, Facts()).props


def take(model: onnx.ModelProto) -> Metadata:
    """Collects what graphsurgeon would drop. Attributes that it cannot hold are taken *out* of `model`'s nodes.

    Args:
        model: a private copy; its graph inputs must be the true inputs already.
    """
    graph = model.graph
    metadata = Metadata(
        doc=model.doc_string,
        domain=model.domain,
        version=model.model_version,
        props=_pairs(model.metadata_props),
        graph_props=_pairs(graph.metadata_props),
        inputs=tuple(graph.input),
        outputs=tuple(graph.output),
        quantization=tuple(graph.quantization_annotation),
    )
    for key, node in _nodes(graph, ""):
        misfits = tuple(a for a in node.attribute if not _fits(a))
        facts = Facts(node.doc_string, _pairs(node.metadata_props), misfits)
        if misfits:
            kept = [a for a in node.attribute if _fits(a)]
            del node.attribute[:]
            node.attribute.extend(kept)
        if facts != Facts():
            metadata.nodes[key] = facts
    for tensor in graph.initializer:
        facts = Facts(tensor.doc_string, _pairs(tensor.metadata_props))
        if facts != Facts():
            metadata.constants[tensor.name] = facts
    return metadata


def put_back(metadata: Metadata, model: onnx.ModelProto) -> None:
    """Writes into an exported model what was taken, for all nodes and tensors that still exist."""
    graph = model.graph
    model.doc_string, model.domain, model.model_version = metadata.doc, metadata.domain, metadata.version
    _set_pairs(model.metadata_props, metadata.props)
    _set_pairs(graph.metadata_props, metadata.graph_props)
    for key, node in _nodes(graph, ""):
        facts = metadata.nodes.get(key)
        if facts is None:
            continue
        if facts.doc:
            node.doc_string = facts.doc
        _set_pairs(node.metadata_props, facts.props)
        present = {a.name for a in node.attribute}
        node.attribute.extend(a for a in facts.attributes if a.name not in present)
    for tensor in graph.initializer:
        facts = metadata.constants.get(tensor.name)
        if facts is not None:
            tensor.doc_string = facts.doc
            _set_pairs(tensor.metadata_props, facts.props)
    _restore(graph.input, metadata.inputs)
    _restore(graph.output, metadata.outputs)
    existing = {name for _, node in _nodes(graph, "") for name in node.output}
    existing |= {t.name for t in graph.initializer} | {v.name for v in graph.input}
    del graph.quantization_annotation[:]
    for annotation in metadata.quantization:
        parameters = {p.value for p in annotation.quant_parameter_tensor_names}
        if annotation.tensor_name in existing and parameters <= existing:
            graph.quantization_annotation.append(annotation)


def _restore(values: Any, kept: tuple[onnx.ValueInfoProto, ...]) -> None:
    """The kept declarations, in their order, byte for byte; values that the source does not know follow."""
    names = {value.name for value in kept}
    added = [value for value in values if value.name not in names]
    del values[:]
    values.extend([*kept, *added])


def _nodes(graph: onnx.GraphProto, scope: str) -> Iterator[tuple[str, onnx.NodeProto]]:
    for node in graph.node:
        key = scope + next((name for name in node.output if name), node.name)
        yield key, node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g, f"{key}:{attribute.name}/")


def _fits(attribute: AttributeProto) -> bool:
    """Whether graphsurgeon imports and exports this attribute unharmed."""
    if attribute.type not in _HELD:
        return False
    lists = (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS)
    if attribute.type in lists and not (attribute.floats or attribute.ints or attribute.strings):
        return False  # the exporter cannot tell what an empty list is a list of
    try:
        attribute.s.decode()
        for text in attribute.strings:
            text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _pairs(entries: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


def _set_pairs(entries: Any, pairs: Mapping[str, str]) -> None:
    del entries[:]
    for key, value in pairs.items():
        entries.add(key=key, value=value)
