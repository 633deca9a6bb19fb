"""An ONNX file or ModelProto -> `Model`: every kind of bad model is refused here, before any work.

Large weights are left in the file, or set aside unread, and everything else works on the skeleton that is left, so that
models of any size pass. What the file says is kept, with four exceptions, each noted in `Source.notes`:
initializers that are listed as inputs become constants, sparse ones become dense, local functions are inlined, and
nodes are put into topological order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from onnx import TensorProto

from spa_compiler.errors import ModelError
from spa_compiler.graph import external, metadata, structure, wire
from spa_compiler.graph.damage import diagnose
from spa_compiler.graph.model import Dim, Model, Signature, Source, ValueInfo
from spa_compiler.graph.sparse import densify
from spa_compiler.graph.structure import has_data
from spa_compiler.graph.surgeon import import_graph
from spa_compiler.graph.weights import LARGE_BYTES, Weight
from spa_compiler.graph.wire import Place

OLDEST_OPSET = 7


def load(source: Path | str | onnx.ModelProto) -> Model:
    """Reads and checks a model; weights stay unread until touched.

    Args:
        source: path of a model file (external data is looked for in its folder alone), or a ModelProto, which is not
            changed; its large tensors are shared, not copied.

    Raises:
        ModelError: not a file, not ONNX, cut short, opset before 7, external data missing, too short or outside of the
            model's folder, cyclic, with undefined or doubly defined tensors, unknown operators, inconsistent shapes, or
            inputs of size zero.
    """
    try:
        if isinstance(source, onnx.ModelProto):
            return _build(source, {}, None, _size_of(source))
        path = Path(source)
        proto, places = _parse(path)
        return _build(proto, places, path, path.stat().st_size)
    except UnicodeDecodeError as error:  # raised wherever a damaged name is first looked at
        where = "the model" if isinstance(source, onnx.ModelProto) else str(source)
        raise ModelError(
            f"text in it is damaged: {error.object[:40]!r}", where=where, fix="Copy, download or export it again"
        ) from error


def _size_of(proto: onnx.ModelProto) -> int:
    """About the size of a ModelProto in bytes, also where protobuf itself cannot say (above 2 GB)."""
    weights = sum(external.expected_bytes(tensor) for tensor in proto.graph.initializer)
    return weights + sum(int(node.ByteSize()) for node in proto.graph.node)


def _parse(path: Path) -> tuple[onnx.ModelProto, dict[int, Place]]:
    """The model without the data of large initializers, and where in the file that lies, by their numbers."""
    if not path.exists():
        raise ModelError("there is no such file", where=str(path), fix="Check the path")
    if not path.is_file():
        raise ModelError("this is not a file", where=str(path), fix="Name the .onnx file itself")
    try:
        found = wire.outline(path, LARGE_BYTES)
        if found is not None and found[0].HasField("graph") and found[0].ir_version > 0:
            return found
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path), fix="Check its permissions") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, which onnx does not hand on
        what, fix = diagnose(data)
        raise ModelError(what, where=str(path), fix=fix) from error
    if not proto.HasField("graph") or proto.ir_version <= 0:
        what, fix = diagnose(data)
        raise ModelError(what, where=str(path), fix=fix)
    return proto, {}


def _build(proto: onnx.ModelProto, places: Mapping[int, Place], path: Path | None, size: int) -> Model:
    where = str(path) if path is not None else (proto.graph.name or "the model")
    folder = path.parent if path is not None else None
    notes: list[str] = []
    if not proto.HasField("graph"):
        raise ModelError("it holds no graph", where=where, fix="Export the model again")
    empty = [
        tensor.name
        for number, tensor in enumerate(proto.graph.initializer)
        if tensor.data_location != TensorProto.EXTERNAL and number not in places and not has_data(tensor)
    ]
    if empty:
        raise ModelError(
            f"{len(empty)} initializers have dims but no values: {_some(empty)}",
            where=where,
            fix="Give the whole model, not a graph without its weights",
        )
    work, large, placed = _set_aside(proto, places)
    _check_sizes(large.values(), placed, where)
    opset = _normalize_domains(work, where)
    if work.functions:
        notes.append(f"{len(work.functions)} local functions inlined")
        work = onnx.inliner.inline_local_functions(work)
    if sparse := densify(work.graph, where):
        notes.append(f"{len(sparse)} sparse initializers made dense: {_some(sparse)}")
    _hoist_constants(work, large, folder)
    size += external.check((t for t in large.values() if t.data_location == TensorProto.EXTERNAL), folder)
    listed = _drop_listed_initializers(work)
    if listed:
        notes.append(f"{len(listed)} initializers listed as inputs became constants: {_some(listed)}")
    if structure.check(work, opset, where):
        notes.append("nodes were not in topological order")
    notes += structure.check_shapes(work, where)
    kept = metadata.take(work)
    stored = {name: Weight(large[name], folder, place) for name, place in placed.items()}
    graph = import_graph(work, {**large, **stored}, folder)
    facts = Source(
        path=path,
        name=path.stem if path is not None else (proto.graph.name or "model"),
        opset=opset,
        ir_version=proto.ir_version,
        bytes=size,
        notes=tuple(notes),
        outer_constants=frozenset(tensor.name for tensor in work.graph.initializer),
        stated_shapes=frozenset(value.name for value in work.graph.value_info),
    )
    signature = Signature(
        tuple(value_info(value) for value in work.graph.input), tuple(value_info(value) for value in work.graph.output)
    )
    return Model(graph, facts, signature, kept)


def value_info(value: onnx.ValueInfoProto) -> ValueInfo:
    """A declared input or output as numpy type and shape."""
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or TensorProto.STRING)
    if not tensor.HasField("shape"):
        return ValueInfo(value.name, dtype, (), ranked=False)
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_param") and dim.dim_param:
            dims.append(dim.dim_param)
        else:
            dims.append(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None)
    return ValueInfo(value.name, dtype, tuple(dims))


def _set_aside(
    proto: onnx.ModelProto, places: Mapping[int, Place]
) -> tuple[onnx.ModelProto, dict[str, TensorProto], dict[str, Place]]:
    """A private copy in which large initializers of the outermost graph have no data; those tensors by name, and where
    in the file the data of some of them lies."""
    large: dict[str, TensorProto] = {}
    placed: dict[str, Place] = {}
    work, graph = onnx.ModelProto(), onnx.GraphProto()
    _copy_fields(proto, work, without="graph")
    _copy_fields(proto.graph, graph, without="initializer")
    work.graph.CopyFrom(graph)
    for number, tensor in enumerate(proto.graph.initializer):
        external_data = tensor.data_location == TensorProto.EXTERNAL
        if tensor.name not in large and (external_data or number in places or _is_large(tensor)):
            large[tensor.name] = tensor
            if number in places and not external_data:
                placed[tensor.name] = places[number]
            stub = work.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=list(tensor.dims))
            stub.doc_string = tensor.doc_string
            stub.metadata_props.extend(tensor.metadata_props)
        else:
            work.graph.initializer.add().CopyFrom(tensor)
    return work, large, placed


def _check_sizes(tensors: Iterable[TensorProto], placed: Mapping[str, Place], where: str) -> None:
    """Weights that are set aside do not pass the checker, so their sizes are checked here."""
    for tensor in tensors:
        place = placed.get(tensor.name)
        if tensor.data_location == TensorProto.EXTERNAL or (place is None and not tensor.HasField("raw_data")):
            continue
        size = len(tensor.raw_data) if place is None else place.length
        if any(dim < 0 for dim in tensor.dims) or size != external.expected_bytes(tensor):
            raise ModelError(
                f"tensor {tensor.name!r} has {size} bytes, but type and dims {list(tensor.dims)} need "
                f"{external.expected_bytes(tensor)}",
                where=where,
                fix="Export the model again",
            )


def _copy_fields(source: Any, target: Any, *, without: str) -> None:
    """Copies a protobuf message but for one field, which may be too large to copy."""
    for field, value in source.ListFields():
        if field.name == without:
            continue
        own = getattr(target, field.name)
        if hasattr(own, "MergeFrom"):
            own.MergeFrom(value)
        else:
            setattr(target, field.name, value)


def _is_large(tensor: TensorProto) -> bool:
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) > LARGE_BYTES
    return external.expected_bytes(tensor) > LARGE_BYTES if tensor.data_type else False


def _hoist_constants(work: onnx.ModelProto, large: dict[str, TensorProto], folder: Path | None) -> None:
    """Large `Constant` nodes of the outermost graph become initializers of the same name, like all other weights."""
    graph = work.graph
    outputs = {value.name for value in graph.output}
    taken = {tensor.name for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        name = node.output[0] if node.output else ""
        if node.op_type != "Constant" or node.domain or value is None or name in outputs or name in taken or not name:
            kept.append(node)
            continue
        if value.data_location != TensorProto.EXTERNAL and not _is_large(value):
            kept.append(node)
            continue
        taken.add(name)
        large[name] = TensorProto()
        large[name].CopyFrom(value)
        large[name].name = name
        graph.initializer.add(name=name, data_type=value.data_type, dims=list(value.dims), doc_string=node.doc_string)
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _normalize_domains(work: onnx.ModelProto, where: str) -> int:
    """Spells the default domain `""` everywhere; returns its opset.

    Raises:
        ModelError: the opset is too old, or newer than the installed onnx knows.
    """
    versions: dict[str, int] = {}
    for entry in work.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        versions[domain] = max(entry.version, versions.get(domain, 0))
    newest = onnx.defs.onnx_opset_version()
    opset = versions.get("", 0)
    if "" not in versions:
        if any(node.domain in ("", "ai.onnx") for node in work.graph.node):
            raise ModelError("it does not say which opset it uses", where=where, fix="Export the model again")
        opset = versions[""] = OLDEST_OPSET
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"opset {opset} is too old; opset {OLDEST_OPSET} is the first that can be compiled",
            where=where,
            fix="Export it with opset 17 or later, or convert it: onnx.version_converter.convert_version(model, 17)",
        )
    if opset > newest:
        raise ModelError(
            f"opset {opset} is newer than the installed onnx {onnx.__version__} knows ({newest})",
            where=where,
            fix="Upgrade onnx: pip install -U onnx; or export with an older opset",
        )
    del work.opset_import[:]
    work.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    structure.rename_domain(work.graph, "ai.onnx", "")
    return opset


def _drop_listed_initializers(work: onnx.ModelProto) -> list[str]:
    """Initializers need no entry among the inputs since IR version 4; what has a value is a constant."""
    names = {tensor.name for tensor in work.graph.initializer}
    listed = [value.name for value in work.graph.input if value.name in names]
    if listed:
        true_inputs = [value for value in work.graph.input if value.name not in names]
        copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in true_inputs]
        del work.graph.input[:]
        work.graph.input.extend(copies)
    return listed


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
