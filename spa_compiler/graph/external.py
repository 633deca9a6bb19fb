"""External data: found below the model's own folder or not at all, checked before a byte is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes  # noqa: F401 - registers the dtypes that onnx names
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from spa_compiler.errors import ModelError


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: `length` bytes from `offset` in `path`."""

    path: Path
    offset: int
    length: int


def expected_bytes(tensor: TensorProto) -> int:
    """How many bytes the tensor's dims and type ask for (packed types rounded up to whole bytes)."""
    count = int(math.prod(tensor.dims))
    if not tensor.data_type or tensor.data_type == TensorProto.STRING:
        return 0  # strings have no fixed size, and lie in the model itself
    bits = {
        TensorProto.INT4: 4,
        TensorProto.UINT4: 4,
        getattr(TensorProto, "FLOAT4E2M1", -1): 4,
        getattr(TensorProto, "INT2", -2): 2,
        getattr(TensorProto, "UINT2", -3): 2,
    }.get(tensor.data_type)
    if bits is not None:
        return (count * bits + 7) // 8
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def locate(tensor: TensorProto, folder: Path | None) -> Place:
    """Finds and checks the bytes of one external tensor.

    Raises:
        ModelError: no location; a location outside of `folder` (absolute, `..`, or through a link); a missing or too
        short
            file; a length that contradicts the dims.
    """
    where = f"tensor {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(
            "its weights lie in external files, and a model in memory has no folder to look in",
            where=where,
            fix="Pass the path of the model file instead, or load the data first: onnx.load_external_data_for_model()",
        )
    if not location:
        raise ModelError("its external data has no location", where=where, fix="Export the model again")
    path = _inside(location, folder, where)
    try:
        offset, declared = int(entries.get("offset", "0")), entries.get("length")
        length = expected_bytes(tensor) if declared is None else int(declared)
    except ValueError:
        raise ModelError(
            f"offset or length of its external data is no number: {entries}", where=where, fix="Export the model again"
        ) from None
    expected = expected_bytes(tensor)
    if length != expected or offset < 0:
        raise ModelError(
            f"its external data says {length} bytes at offset {offset}, but dims {list(tensor.dims)} need {expected}",
            where=where,
            fix="Export the model again",
        )
    size = path.stat().st_size
    if offset + length > size:
        raise ModelError(
            f"external data file {location!r} is too short: {offset + length} bytes needed, {size} there",
            where=where,
            fix="Copy or download the file again; it looks cut off",
        )
    return Place(path, offset, length)


def read(tensor: TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """The values of an external tensor, checked by `locate` first.

    Raises:
        ModelError: see `locate`; or the file cannot be read.
    """
    place = locate(tensor, folder)
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            raw = file.read(place.length)
    except OSError as error:
        raise ModelError(
            f"cannot read external data: {error.strerror}",
            where=str(place.path),
            fix="Check the file and its permissions",
        ) from error
    filled = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=list(tensor.dims), raw_data=raw)
    return np.asarray(numpy_helper.to_array(filled))


def check(tensors: Iterable[TensorProto], folder: Path | None) -> int:
    """Checks every external tensor and returns the size of the files they lie in, in bytes, each file once.

    Raises:
        ModelError: see `locate`.
    """
    files: dict[Path, int] = {}
    for tensor in tensors:
        place = locate(tensor, folder)
        files[place.path] = place.path.stat().st_size
    return sum(files.values())


def files(proto: onnx.ModelProto) -> list[str]:
    """The locations that tensors of the model name, subgraphs' too, each once. They are not checked."""

    def tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
        yield from graph.initializer
        for attribute in (a for node in graph.node for a in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors(inner)

    found = (t for t in tensors(proto.graph) if t.data_location == TensorProto.EXTERNAL)
    return list(dict.fromkeys(e.value for t in found for e in t.external_data if e.key == "location"))


def _inside(location: str, folder: Path, where: str) -> Path:
    """The file that `location` names, if it is a plain file below `folder`."""
    refusal = "Put the data file beside the model and export again; links and paths out of its folder are not followed"
    pure = PurePosixPath(location)
    windows = PureWindowsPath(location)
    if pure.is_absolute() or windows.is_absolute() or windows.drive or ".." in pure.parts or ".." in windows.parts:
        raise ModelError(f"external data {location!r} points out of the model's folder", where=where, fix=refusal)
    if "\0" in location:
        raise ModelError(f"external data {location!r} is no file name", where=where, fix=refusal)
    root = folder.resolve()
    path = root / pure
    step = root
    for part in pure.parts:
        step = step / part
        if step.is_symlink():
            raise ModelError(f"external data {location!r} goes through a symbolic link", where=where, fix=refusal)
    if not path.exists():
        raise ModelError(
            f"external data file {location!r} is missing",
            where=where,
            fix=f"Put it into {folder}, where the model lies",
        )
    if not path.is_file():
        raise ModelError(f"external data {location!r} is not a plain file", where=where, fix=refusal)
    if root not in path.resolve().parents:
        raise ModelError(f"external data {location!r} points out of the model's folder", where=where, fix=refusal)
    if path.stat().st_nlink > 1:
        raise ModelError(
            f"external data {location!r} has several names (hard links), one of which may be outside of the folder",
            where=where,
            fix="Replace it by a copy of its own: cp --remove-destination",
        )
    return path
