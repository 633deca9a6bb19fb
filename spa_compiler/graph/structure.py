"""Checks of a skeleton ModelProto: names, order, operators, attributes and shapes, with messages that name the node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
import onnx
import onnx.defs
import onnx.shape_inference
from onnx import AttributeProto

from spa_compiler.errors import EnvironmentFault, ModelError
from spa_compiler.graph import runtime_ops
from spa_compiler.graph.branches import with_branches
from spa_compiler.graph.session import open_session, runtime

_EXPORT_AGAIN = "Export the model again, or repair it with a graph editor"


def check(work: onnx.ModelProto, opset: int, where: str) -> bool:
    """Checks names, cycles, operators and attributes; sorts the nodes topologically if they are not.

    Args:
        work: a skeleton: large initializers may lack their data.
        opset: of the default domain.
        where: the file, for messages.

    Returns:
        Whether the nodes had to be sorted.

    Raises:
        ModelError: see `load`.
    """
    _check_text(work.graph, where)
    for value in work.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value == 0:
                raise ModelError(
                    f"axis {axis} of input {value.name!r} has size zero: there is nothing to compute",
                    where=where,
                    fix="Export it with the real size, or with a symbolic dimension if the size varies",
                )
    _check_operators(work.graph, opset, {entry.domain for entry in work.opset_import}, where)
    moved = _check_names(work.graph, frozenset(), where)
    bare = _checkable(work)
    for value in [*bare.graph.input, *bare.graph.output]:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()  # the checker wants a rank, ONNX Runtime and we do not
    runtime_ops.hide(bare)
    try:
        onnx.checker.check_model(bare)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise ModelError(f"not valid ONNX: {_first_line(error)}", where=where, fix=_EXPORT_AGAIN) from error
    return moved


def check_shapes(work: onnx.ModelProto, where: str) -> list[str]:
    """Refuses shapes that contradict each other.

    onnx's inference decides; where it objects to what ONNX Runtime accepts (exporters write wrong intermediate shapes,
    and runtimes ignore those), the model passes with a note.

    Raises:
        ModelError: an operator cannot take the shapes or types it is given.
    """
    bare = _checkable(work)
    for node in _all_nodes(bare.graph):
        if not node.name:
            node.name = next((f"-> {name}" for name in node.output if name), "")
    first = _inference_error(bare)
    if first is None:
        return []
    del bare.graph.value_info[:]
    second = _inference_error(bare)
    if second is None:
        return ["intermediate shapes stated in the file contradict its operators and were ignored"]
    if _runtime_accepts(bare):
        return [f"shape inference objects to what ONNX Runtime accepts: {second}"]
    raise ModelError(
        f"shapes or types do not fit: {second}", where=where, fix="Correct the sizes at that node, or export again"
    )


def rename_domain(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Renames an operator domain in the graph and its branches, in place."""
    for node in _all_nodes(graph):
        if node.domain == old:
            node.domain = new


def _check_text(graph: onnx.GraphProto, where: str) -> None:
    """Names must be text; protobuf hands on bytes where a damaged file has something else."""
    names = [value.name for value in [*graph.input, *graph.output, *graph.initializer]]
    for node in _all_nodes(graph):
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    for name in names:
        if not isinstance(name, str):
            raise ModelError(
                f"a name in it is damaged: {bytes(name)!r}", where=where, fix="Copy, download or export it again"
            )


def _check_operators(graph: onnx.GraphProto, opset: int, domains: set[str], where: str) -> None:
    for node in _all_nodes(graph):
        if node.domain:
            if node.domain not in domains:
                raise ModelError(
                    f"{_title(node)} uses the domain {node.domain!r}, which the model does not import",
                    where=where,
                    fix=_EXPORT_AGAIN,
                )
            continue
        if node.op_type in runtime_ops.NAMES:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            hint = "" if not onnx.defs.has(node.op_type) else f" in opset {opset}"
            raise ModelError(
                f"{_title(node)}: there is no operator {node.op_type!r} in ONNX's default domain{hint}",
                where=where,
                fix="Export the model again; a custom operator belongs into a domain of its own",
            ) from None
        if schema.deprecated:
            raise ModelError(
                f"{_title(node)}: {node.op_type} no longer exists in opset {opset}",
                where=where,
                fix="Export the model again, or with an older opset",
            )


def _check_names(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> bool:
    """Every tensor is made once and before it is used; sorts the nodes if only their order is wrong."""
    makers: dict[str, str] = {}

    def define(name: str, by: str) -> None:
        if name in makers:
            raise ModelError(
                f"tensor {name!r} is defined twice, by {makers[name]} and by {by}", where=where, fix=_EXPORT_AGAIN
            )
        makers[name] = by

    for value in graph.input:
        define(value.name, "the inputs")
    for tensor in graph.initializer:
        define(tensor.name, "the initializers")
    for node in graph.node:
        for name in filter(None, node.output):
            define(name, _title(node))
    known = outer | makers.keys()
    for node in graph.node:
        for name in _needs(node):
            if name not in known:
                raise ModelError(
                    f"{_title(node)} uses tensor {name!r}, which nothing defines", where=where, fix=_EXPORT_AGAIN
                )
    for value in graph.output:
        if value.name not in known:
            raise ModelError(f"output {value.name!r} is defined by nothing", where=where, fix=_EXPORT_AGAIN)
    moved = _sort(graph, where)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                moved |= _check_names(attribute.g, frozenset(known), where)
    return moved


def _sort(graph: onnx.GraphProto, where: str) -> bool:
    """Topological order, stable; returns whether anything moved.

    Raises:
        ModelError: the graph has a cycle; the message spells it out.
    """
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    dependencies: nx.DiGraph[int] = nx.DiGraph()
    dependencies.add_nodes_from(range(len(graph.node)))
    in_order = True
    for i, node in enumerate(graph.node):
        for name in _needs(node):
            if name in maker:
                dependencies.add_edge(maker[name], i)
                in_order &= maker[name] < i
    if in_order:
        return False
    try:
        order = list(nx.lexicographical_topological_sort(dependencies))
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(dependencies)]
        path = " -> ".join(_title(graph.node[i]) for i in [*cycle[:5], cycle[0]])
        raise ModelError(f"the graph has a cycle: {path}", where=where, fix=_EXPORT_AGAIN) from None
    nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def _needs(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node reads, those that its branches read from outside among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            inner = attribute.g
            made = {v.name for v in inner.input} | {t.name for t in inner.initializer}
            made |= {name for n in inner.node for name in n.output}
            for child in inner.node:
                yield from (name for name in _needs(child) if name not in made)
            yield from (v.name for v in inner.output if v.name not in made)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for inner in with_branches(graph):
        yield from inner.node


def _checkable(work: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which initializers without data are inputs, as the checkers want data in every initializer."""
    bare = onnx.ModelProto()
    bare.CopyFrom(work)
    bare.ir_version = max(bare.ir_version, 4)
    kept = []
    for tensor in work.graph.initializer:
        if has_data(tensor):
            kept.append(tensor)
        else:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    return bare


def has_data(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's values are in the message, or it has none."""
    payload = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    return 0 in tensor.dims or any(len(getattr(tensor, name)) for name in payload)


def _inference_error(bare: onnx.ModelProto) -> str | None:
    try:
        onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, TypeError) as error:
        return _first_line(error)
    return None


def _runtime_accepts(bare: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime, which has its own idea of what is an error, opens the skeleton."""
    try:
        runtime()
    except EnvironmentFault:
        return False
    plain = onnx.ModelProto()
    plain.CopyFrom(bare)
    plain.ir_version = min(plain.ir_version, 10)
    try:
        open_session(plain.SerializeToString(), optimize="none")
    except Exception:  # noqa: BLE001 - its exceptions have no common root but Exception
        return False
    return True


def _title(node: onnx.NodeProto) -> str:
    name = node.name or next((f"-> {output}" for output in node.output if output), "(unnamed)")
    return f"node {name!r} ({node.op_type})"


def _first_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") if lines else type(error).__name__
