"""Why bytes are no ONNX model: cut short, another format, or nothing at all."""

from __future__ import annotations

_MAGICS = {
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint or .npz?)",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x1f\x8b": "a gzip file",
    b"\xfd7zXZ": "an xz file",
    b"\x89HDF": "an HDF5 file (a Keras model?)",
    b"version https://git-lfs": "a Git LFS pointer; fetch the real file with `git lfs pull`",
    b"{": "JSON text",
    b"<": "XML or HTML text",
}
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""ModelProto's field numbers and their protobuf wire types (onnx.proto)."""
_GRAPH_FIELD = 7


def diagnose(data: bytes) -> tuple[str, str]:
    """What is wrong with bytes that protobuf cannot read as a model, and what to do: two sentences' worth of text."""
    export = "Give the .onnx file that an exporter wrote"
    if not data:
        return "the file is empty", export
    for magic, name in _MAGICS.items():
        if data.startswith(magic):
            return f"this is not an ONNX model but {name}", export
    if data.startswith(b"\x08") and len(data) >= 1 << 31:
        return (
            "the file is above protobuf's limit of 2 GB and cannot be a single message",
            "Export it with external data",
        )
    cut = _cut_short(data)
    if cut is not None:
        return (
            f"the file is cut short: it has {len(data):,} bytes, and a part that starts before its end needs {cut:,}",
            "Copy or download it again",
        )
    if data.startswith(b"\x08"):
        return "this looks like an ONNX model, but its contents are damaged", "Copy, download or export it again"
    return "this is not an ONNX model", export


def _cut_short(data: bytes) -> int | None:
    """The length that the file should have at least, if its top level reads as a model up to a field that ends too
    late.
    """
    position, seen = 0, 0
    while position < len(data):
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if _MODEL_FIELDS.get(field) != wire:
            return None
        if wire == 0:
            _, position = _varint(data, position)
        else:
            length, position = _varint(data, position)
            position += length
        if position > len(data):
            return position if seen else None
        seen |= field
    return None if seen & _GRAPH_FIELD == _GRAPH_FIELD else len(data) + 1


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            return value, len(data) + 1
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80 or shift > 63:
            return value, position
