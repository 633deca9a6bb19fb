"""Model files read and written around their large weights, which never are in memory as a whole.

protobuf keeps a message in one piece: to parse a file of 400 MB takes 800, to write it 800 more. In a file, though, a
model is nested (tag, length, bytes), so the bytes of an initializer lie somewhere in one piece, and may stay there:

    ModelProto  .. [7, length, GraphProto  .. [5, length, TensorProto  dims, type, name, [9, length, RAW], ..] ..] ..

`outline` tells where; `write` puts a message around arrays that it takes one at a time. Everything else about a file
is for protobuf to read: where `outline` does not understand it, it says so, and the file is parsed whole.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from spa_compiler.errors import ModelError

Buffer: TypeAlias = bytes | memoryview | mmap.mmap

_CARRIERS = {
    "ModelProto": ("graph",),
    "GraphProto": ("node", "initializer"),
    "NodeProto": ("attribute",),
    "AttributeProto": ("g", "graphs"),
}
"""Fields that initializers may be in."""
_MARK = "spa-stub"  # the location of data that is put in later
_GRAPH, _INITIALIZER, _RAW = 7, 5, 9  # field numbers of ModelProto, GraphProto and TensorProto (onnx.proto)
_LENGTH = 2  # the wire type of what has a length
_FIXED = {1: 8, 5: 4}  # bytes of the others, by wire type; 0 is a varint
_LONGEST = 10  # bytes of a varint
_MOST_BYTES = 1 << 31  # that protobuf reads


class Source:
    """A file that stays open, so that what it held when it was opened can be read although the name is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def same_as(self, path: Path) -> bool:
        """Whether a path names this very file."""
        return path.exists() and os.path.samestat(os.fstat(self._descriptor), path.stat())

    def read(self, offset: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Bytes as an array of uint8. Raises ModelError when the file is shorter than it was."""
        found = np.empty(length, np.uint8)
        view, done = found.data, 0
        while done < length:
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise ModelError("it was cut short while it was read", where=str(self.path), fix="Run it again")
            done += count
        return found


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie."""

    source: Source
    offset: int
    length: int

    def read(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.source.read(self.offset, self.length)


# ---------------------------------------------------------------- in


def outline(path: Path, least: int) -> tuple[onnx.ModelProto, dict[int, Place]] | None:
    """A model without the raw data of its large initializers, and where that lies, by their numbers.

    Args:
        least: initializers of the outermost graph with more bytes than this are left out.

    Returns:
        None where the file is not what it seems; protobuf can tell why.

    Raises:
        OSError: the file cannot be read.
    """
    source = Source(path)
    with path.open("rb") as file:
        if not 0 < os.fstat(file.fileno()).st_size < _MOST_BYTES:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                parts, places = _outline(data, least)
            except ValueError:
                return None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(b"".join(parts))
    except Exception:  # noqa: BLE001 - protobuf's DecodeError, which onnx does not hand on
        return None
    return proto, {number: Place(source, *place) for number, place in places.items()}


def _outline(data: mmap.mmap, least: int) -> tuple[list[bytes], dict[int, tuple[int, int]]]:
    """The bytes that are left, and (offset, length) of what is left out. Raises ValueError where it is no model."""
    graphs = [field for field in _fields(data, 0, len(data)) if field.number == _GRAPH]
    if len(graphs) != 1 or graphs[0].kind != _LENGTH:  # several would be merged
        raise ValueError
    graph, places, kept, number = graphs[0], {}, [], 0
    start = graph.begin  # of what is kept next
    for field in _fields(data, graph.begin, graph.end):
        if field.number != _INITIALIZER:
            continue
        if field.kind != _LENGTH:
            raise ValueError
        raw = [inner for inner in _fields(data, field.begin, field.end) if inner.number == _RAW]
        if len(raw) == 1 and raw[0].kind == _LENGTH and raw[0].end - raw[0].begin > least:
            places[number] = (raw[0].begin, raw[0].end - raw[0].begin)
            rest = data[field.begin : raw[0].tag] + data[raw[0].end : field.end]
            kept += [data[start : field.tag], _header(_INITIALIZER, len(rest)), rest]
            start = field.end
        number += 1
    kept.append(data[start : graph.end])
    size = sum(map(len, kept))
    return [data[: graph.tag], _header(_GRAPH, size), *kept, data[graph.end :]], places


@dataclass(frozen=True)
class _Field:
    """One field of a message: its tag begins at `tag`, what it holds at `begin`."""

    number: int
    kind: int
    tag: int
    begin: int
    end: int


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[_Field]:
    while position < end:
        at = position
        tag, position = _varint(data, position, end)
        kind = tag & 7
        if kind == 0:
            _, after = _varint(data, position, end)
        elif kind == _LENGTH:
            length, position = _varint(data, position, end)
            after = position + length
        elif kind in _FIXED:
            after = position + _FIXED[kind]
        else:
            raise ValueError
        if after > end or not tag >> 3:
            raise ValueError
        yield _Field(tag >> 3, kind, at, position, after)
        position = after


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for i in range(_LONGEST):
        if position + i >= end:
            raise ValueError
        byte = data[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise ValueError


# ---------------------------------------------------------------- out


def mark(tensor: TensorProto, number: int) -> None:
    """Makes a tensor without data a stub: what has the number is put there when it is written."""
    tensor.external_data.add(key="location", value=f"{_MARK}:{number}")


def marked(tensor: TensorProto) -> int | None:
    """The number of a stub, None for other tensors."""
    for entry in tensor.external_data:
        if entry.value.startswith(_MARK):
            return int(entry.value.removeprefix(f"{_MARK}:"))
    return None


def unmark(tensor: TensorProto) -> None:
    """No stub any more."""
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def write(
    proto: onnx.ModelProto, path: Path, payloads: Mapping[int, tuple[int, Callable[[], Buffer]]]
) -> dict[int, tuple[int, int]]:
    """Writes a model, byte for byte as protobuf would if its stubs held their payloads as raw data.

    Args:
        payloads: of the stubs among its initializers, those of branches too, by number: how many bytes there are and
            what gives them. They are asked for one after the other.

    Returns:
        Offset and length of each in the file.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    places: dict[int, tuple[int, int]] = {}
    with path.open("wb") as file:
        for piece in _pieces(proto, {number: length for number, (length, _) in payloads.items()})[0]:
            if isinstance(piece, bytes):
                file.write(piece)
                continue
            length, give = payloads[piece]
            places[piece] = (file.tell(), length)
            if file.write(give()) != length:
                raise ValueError(f"stub {piece} has not the {length} bytes that it should have")
    return places


def _pieces(message: Any, lengths: Mapping[int, int]) -> tuple[list[bytes | int], int]:
    """What a message consists of, numbers where payloads belong, and how many bytes that makes."""
    if isinstance(message, TensorProto):
        return _tensor(message, lengths)
    pieces: list[bytes | int] = []
    size = 0
    for field, value in message.ListFields():  # by number, as protobuf writes them
        if field.name not in _CARRIERS.get(type(message).__name__, ()):
            whole = _only(message, field.name, value)
            pieces.append(whole)
            size += len(whole)
            continue
        for each in value if hasattr(value, "append") else (value,):
            inner, length = _pieces(each, lengths)
            header = _header(field.number, length)
            pieces += [header, *inner]
            size += len(header) + length
    return pieces, size


def _tensor(tensor: TensorProto, lengths: Mapping[int, int]) -> tuple[list[bytes | int], int]:
    number = marked(tensor)
    if number is None:
        whole = _bytes(tensor)
        return [whole], len(whole)
    before, after = TensorProto(), TensorProto()
    before.CopyFrom(tensor)
    unmark(before)
    after.CopyFrom(before)
    for field, _ in tensor.ListFields():  # the raw data comes between
        (after if field.number < _RAW else before).ClearField(field.name)
    head, tail, length = _bytes(before) + _header(_RAW, lengths[number]), _bytes(after), lengths[number]
    return [head, number, tail], len(head) + length + len(tail)


def _only(message: Any, name: str, value: Any) -> bytes:
    """One field of a message."""
    own = type(message)()
    target = getattr(own, name)
    if hasattr(target, "MergeFrom"):
        target.MergeFrom(value)
    else:
        setattr(own, name, value)
    return _bytes(own)


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializePartialToString(deterministic=True))


def _header(number: int, length: int) -> bytes:
    """Tag and length of a field."""
    out = bytearray()
    for value in (number << 3 | _LENGTH, length):
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)
