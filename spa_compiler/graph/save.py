"""A `Model` back to ONNX: in memory below 2 GB, on disk at any size, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph import metadata, runtime_ops, weights, wire
from spa_compiler.graph.model import Model, constants

OLDEST_IR, NEWEST_IR = 4, 10
"""IR versions we write: initializers need not be inputs from 4 on; ONNX Runtime 1.18 reads nothing above 10."""

EXTERNAL_ABOVE = 1 << 30
"""Weights of more than this many bytes go into `<name>.data` beside the model."""

PROTOBUF_LIMIT = (1 << 31) - (1 << 20)
_PAGE = 4096  # ONNX Runtime maps external tensors into memory by pages


def weight_bytes(model: Model) -> int:
    """Size of all constants of the graph, in bytes, each once."""
    return sum(weights.nbytes(constant) for constant in constants(model.graph))


def to_proto(model: Model, *, extra_outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """The model as one valid ModelProto: metadata put back, IR version 4 to 10, the source's signature byte for byte.

    Args:
        extra_outputs: names of tensors of the outermost graph to add as outputs, for looking inside.

    Raises:
        ModelError: it is above protobuf's 2 GB (`save` writes any size), or the graph is not valid ONNX.
    """
    size = weight_bytes(model)
    if size > PROTOBUF_LIMIT:
        raise ModelError(
            f"the model has {size / 2**30:.1f} GiB of weights, more than one protobuf message holds",
            where=model.source.name,
            fix="Save it to a file instead: weights then go into a data file beside it",
        )
    proto, left_out = _export(model, extra_outputs)
    for number, tensor in _stubs(proto.graph):
        _fill(tensor, left_out[number])
    return proto


def _fill(tensor: TensorProto, constant: gs.Constant) -> None:
    """Puts the data into a stub."""
    filled = weights.proto_of(constant)
    if filled.raw_data:
        wire.unmark(tensor)
        tensor.raw_data = filled.raw_data
        return
    doc, props = tensor.doc_string, list(tensor.metadata_props)
    tensor.CopyFrom(filled)
    tensor.doc_string = doc
    del tensor.metadata_props[:]
    tensor.metadata_props.extend(props)


def save(model: Model, path: Path, *, threshold: int = EXTERNAL_ABOVE, extra_outputs: Sequence[str] = ()) -> list[Path]:
    """Writes the model, and its weights into `<file name>.data` beside it when they exceed `threshold` bytes.

    Returns:
        The files written, the model first.

    Raises:
        UsageError: the data file would overwrite weights that the model still reads from there.
        ModelError: the graph is not valid ONNX.
        OSError: the disk is full or the folder not writable.
    """
    return _save(model, path, threshold, extra_outputs)[0]


def settle(model: Model, path: Path) -> list[Path]:
    """Saves the model, whose weights are read from there from then on: what only it had in memory is freed.

    Returns, raises: as `save`.
    """
    files, lies = _save(model, path, EXTERNAL_ABOVE, ())
    source = wire.Source(files[-1])
    for constant, offset, length in lies:
        if not length:  # strings have no raw data
            continue
        stub = weights.stub_of(constant)
        constant._values = weights.Weight(stub, None, wire.Place(source, offset, length))
    return files


_Lies: TypeAlias = list[tuple[gs.Constant, int, int]]
"""Offset and length of Constants in the last file written."""


def _save(model: Model, path: Path, threshold: int, extra_outputs: Sequence[str]) -> tuple[list[Path], _Lies]:
    proto, left_out = _export(model, extra_outputs)
    if weight_bytes(model) <= min(threshold, PROTOBUF_LIMIT):
        return [path], _embed(proto, left_out, path)
    data, lies = path.with_name(path.name + ".data"), []
    _refuse_own_weights(left_out, data)
    with data.open("wb") as file:
        for number, tensor in _stubs(proto.graph):
            constant = left_out[number]
            place = _append(file, constant)
            lies.append((constant, *place))
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", str(place[0])), ("length", str(place[1]))):
                tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return [path, data], lies


def _embed(proto: onnx.ModelProto, left_out: Sequence[gs.Constant], path: Path) -> _Lies:
    """One file with everything in it; weights pass through memory one by one."""
    payloads = {}
    for number, tensor in _stubs(proto.graph):
        length = weights.raw_length(left_out[number])
        if length is None:
            _fill(tensor, left_out[number])
        else:
            payloads[number] = (length, partial(weights.raw, left_out[number]))
    # Weights may still be read from a file of this name: it goes when all is written.
    path = path.resolve()
    target = path.with_name(path.name + ".new") if path.exists() else path
    try:
        places = wire.write(proto, target, payloads)
        target.replace(path)
    finally:
        if target != path:
            target.unlink(missing_ok=True)
    return [(left_out[number], *place) for number, place in places.items()]


def skeleton(model: Model) -> onnx.ModelProto:
    """The model without its large constants, which become inputs after its own: small, and valid by itself.

    Right for checkers, shape inference and structural rewriting of models of any size.
    """
    proto, _ = _export(model, (), check=False)
    _strip(proto)
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Turns the data-less initializers of an exported graph into inputs of the outermost graph, in place."""
    declared = {value.name for value in proto.graph.input}
    for graph in _graphs(proto.graph):
        kept = [tensor for tensor in graph.initializer if wire.marked(tensor) is None]
        if len(kept) == len(graph.initializer):
            continue
        for tensor in graph.initializer:
            if wire.marked(tensor) is not None and tensor.name not in declared:
                declared.add(tensor.name)
                proto.graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                )
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _export(
    model: Model, extra_outputs: Sequence[str], *, check: bool = True
) -> tuple[onnx.ModelProto, list[gs.Constant]]:
    """The exported graph with marked, data-less stubs for the large constants, and those constants by mark."""
    left_out: list[gs.Constant] = []
    with _stubbed(model.graph, left_out):
        try:
            proto = gs.export_onnx(model.graph)
        except Exception as error:  # graphsurgeon raises several kinds for one cause
            raise ModelError(f"the graph cannot be exported: {error}", where=model.source.name) from error
    copied = onnx.ModelProto()  # small constants' protos are the source's own, and names are set below
    copied.CopyFrom(proto)
    proto = copied
    proto.ir_version = min(max(model.source.ir_version, OLDEST_IR), NEWEST_IR)
    _own_branches(proto, model)
    metadata.put_back(model.metadata, proto)
    _add_outputs(proto, extra_outputs)
    if check:
        _state_no_more(proto, model)
        _check(proto, model)
    return proto, left_out


def _state_no_more(proto: onnx.ModelProto, model: Model) -> None:
    """Leaves out shapes of tensors that the file did not state, but those that no inference knows.

    ONNX Runtime fuses more where it finds them, which can cost: SkipLayerNormalization, which it makes of Add and
    LayerNormalization, takes many times as long in onnxruntime 1.31.
    """
    told = set(model.source.stated_shapes)
    told.update(name for node in proto.graph.node if node.domain not in ("", "ai.onnx") for name in node.output)
    infos = [value for value in proto.graph.value_info if value.name in told]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(infos)


@contextmanager
def _stubbed(graph: gs.Graph, left_out: list[gs.Constant]) -> Iterator[None]:
    """While it lasts, large constants are stubs and small ones self-contained protos; arrays are put back after."""
    held: list[tuple[gs.Constant, Any]] = []
    try:
        for constant in constants(graph):
            values = constant._values
            held.append((constant, values))
            if weights.nbytes(constant) > weights.LARGE_BYTES or _is_external(values):
                tensor = weights.stub_of(constant)
                tensor.data_location = TensorProto.EXTERNAL
                wire.mark(tensor, len(left_out))
                left_out.append(constant)
            else:
                tensor = weights.proto_of(constant)
            constant._values = LazyValues(tensor)
        yield
    finally:
        for constant, values in held:
            constant._values = values


def _is_external(values: Any) -> bool:
    return isinstance(values, LazyValues) and values.tensor.data_location == TensorProto.EXTERNAL


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _stubs(graph: onnx.GraphProto) -> Iterator[tuple[int, TensorProto]]:
    for inner in _graphs(graph):
        found = [(wire.marked(tensor), tensor) for tensor in inner.initializer]
        yield from ((number, tensor) for number, tensor in found if number is not None)


def _own_branches(proto: onnx.ModelProto, model: Model) -> None:
    """Branches keep only what is theirs: graphsurgeon copies outer initializers and value_info into each branch."""
    top = proto.graph
    present = {tensor.name for tensor in top.initializer}
    outer = present | model.source.outer_constants
    for branch in list(_graphs(top))[1:]:
        kept = []
        for tensor in branch.initializer:
            if tensor.name not in outer:
                kept.append(tensor)
            elif tensor.name not in present:
                present.add(tensor.name)
                top.initializer.append(tensor)
        del branch.initializer[:]
        branch.initializer.extend(kept)
        made = {name for node in branch.node for name in node.output}
        infos = [value for value in branch.value_info if value.name in made]
        del branch.value_info[:]
        branch.value_info.extend(infos)


def _add_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    declared = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)


def _check(proto: onnx.ModelProto, model: Model) -> None:
    """onnx's checker on the graph, data-less constants standing as inputs, so that it works at any size."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    _strip(bare)
    for value in [*bare.graph.input, *bare.graph.output]:
        if not value.HasField("type"):
            value.type.tensor_type.elem_type = TensorProto.FLOAT  # extra outputs have no type; any one satisfies
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()  # the checker wants a rank, ONNX Runtime and we do not
    runtime_ops.hide(bare)
    try:
        onnx.checker.check_model(bare)
    except onnx.checker.ValidationError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the graph is not valid ONNX: {first}", where=model.source.name) from error


def _append(file: IO[bytes], constant: gs.Constant) -> tuple[int, int]:
    """Writes one constant at the next page border; returns offset and length."""
    payload = weights.raw(constant) or numpy_helper.from_array(np.asarray(weights.array_of(constant))).raw_data
    file.seek(-(-file.tell() // _PAGE) * _PAGE)
    offset = file.tell()
    file.write(payload)
    return offset, file.tell() - offset


def _refuse_own_weights(left_out: Sequence[gs.Constant], data: Path) -> None:
    for constant in left_out:
        values = constant._values
        if isinstance(values, weights.Weight) and values.is_external and values.folder is not None:
            location = next((e.value for e in values.tensor.external_data if e.key == "location"), "")
            if data.exists() and (values.folder / location).exists() and data.samefile(values.folder / location):
                raise UsageError(
                    "saving here would overwrite weights that the model still reads",
                    where=str(data),
                    fix="Save elsewhere",
                )
