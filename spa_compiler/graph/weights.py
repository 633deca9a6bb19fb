"""Weights that stay where they are until somebody touches them: in a file, or inside a protobuf message."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from spa_compiler.graph import external
from spa_compiler.graph.wire import Place

LARGE_BYTES = 1024
"""Constants above this many bytes are kept out of skeletons; shapes, axes and scalars stay in."""


class Weight(LazyValues):  # type: ignore[misc]
    """A tensor of a file, read when it is used.

    `tensor` is the source's own TensorProto and is never written to. With `place`, its data lies there, and the
    TensorProto has none. For external data `folder` is the model's folder; graphsurgeon's own class would read from the
    current folder. Copies of a model share one array while any of them holds it, and what was found out about it.
    """

    def __init__(self, tensor: TensorProto, folder: Path | None, place: Place | None = None) -> None:
        super().__init__(tensor)
        self.folder, self.place = folder, place
        self._loaded: weakref.ref[np.ndarray[Any, Any]] | None = None
        self._finite: bool | None = None
        self._nonzero: int | None = None

    @property
    def is_external(self) -> bool:
        """Whether the data lies in a file of its own."""
        return bool(self.tensor.data_location == TensorProto.EXTERNAL)

    def load(self) -> np.ndarray[Any, Any]:
        """The values as an array of the tensor's own dtype (ml_dtypes where numpy has none).

        Raises:
            ModelError: the external data is missing, too short, or outside of the model's folder.
        """
        array = self._loaded() if self._loaded is not None else None
        if array is None:
            array = self._read()
            self._loaded = weakref.ref(array)
        return array

    def _read(self) -> np.ndarray[Any, Any]:
        if self.place is None:
            tensor = self.tensor
            return external.read(tensor, self.folder) if self.is_external else numpy_helper.to_array(tensor)
        raw, dtype = self.place.read(), onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        if _is_plain(dtype):
            return raw.view(dtype).reshape(tuple(self.tensor.dims))
        tensor = TensorProto(data_type=self.tensor.data_type, dims=self.tensor.dims, raw_data=raw.tobytes())
        return np.asarray(numpy_helper.to_array(tensor))

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or an infinity."""
        if self._finite is None:
            self._finite = bool(np.isfinite(self.load()).all())
        return self._finite

    @property
    def nonzero(self) -> int:
        """How many values are not zero."""
        if self._nonzero is None:
            self._nonzero = int(np.count_nonzero(self.load()))
        return self._nonzero


class Widened(LazyValues):  # type: ignore[misc]
    """float32 values of a Constant with 16-bit floats, widened whenever they are read."""

    def __init__(self, constant: gs.Constant) -> None:
        stub = TensorProto(name=constant.name, data_type=TensorProto.FLOAT, dims=list(constant.shape))
        stub.data_location = TensorProto.EXTERNAL  # there is no float32 data anywhere yet
        super().__init__(stub)
        self._narrow = gs.Constant(constant.name, np.zeros(0, np.float32))
        self._narrow._values = constant._values

    def load(self) -> np.ndarray[Any, Any]:
        """The values, a new array."""
        return np.asarray(array_of(self._narrow)).astype(np.float32)


def array_of(constant: gs.Constant) -> np.ndarray[Any, Any]:
    """The values of a Constant without making it hold them: right for one pass over all weights."""
    held = constant._values
    array: np.ndarray[Any, Any] = held.load() if isinstance(held, LazyValues) else held
    return array


def proto_of(constant: gs.Constant) -> TensorProto:
    """A Constant as a self-contained TensorProto (raw data, nothing external), under the Constant's name."""
    held = constant._values
    in_tensor = isinstance(held, LazyValues) and held.tensor.data_location != TensorProto.EXTERNAL
    if in_tensor and getattr(held, "place", None) is None:
        tensor = TensorProto()
        tensor.CopyFrom(held.tensor)
    else:
        tensor = numpy_helper.from_array(np.asarray(array_of(constant)), constant.name)
    tensor.name = constant.name
    return tensor


def stub_of(constant: gs.Constant) -> TensorProto:
    """Name, type and dims of a Constant, without data."""
    return TensorProto(name=constant.name, data_type=onnx_type(constant), dims=list(constant.shape))


def onnx_type(constant: gs.Constant) -> int:
    """The ONNX element type of a Constant."""
    held = constant._values
    if isinstance(held, LazyValues):
        tensor = held.tensor
        return int(tensor.values.data_type if isinstance(tensor, onnx.SparseTensorProto) else tensor.data_type)
    return int(onnx.helper.np_dtype_to_tensor_dtype(held.dtype))


def nbytes(constant: gs.Constant) -> int:
    """Size of a Constant's values in bytes."""
    return int(constant._values.nbytes)


def raw_length(constant: gs.Constant) -> int | None:
    """Bytes that `raw` gives; None where the values are no raw data (strings, or numbers in fields of their own)."""
    held = constant._values
    if isinstance(held, Weight) and held.place is not None:
        return held.place.length
    if isinstance(held, np.ndarray) and _is_plain(held.dtype):
        return int(held.nbytes)
    filled = proto_of(constant)
    return len(filled.raw_data) or None


def raw(constant: gs.Constant) -> bytes | memoryview:
    """The values as a file holds them."""
    held = constant._values
    if isinstance(held, Weight) and held.place is not None:
        return held.place.read().data
    if isinstance(held, np.ndarray) and _is_plain(held.dtype):
        return np.ascontiguousarray(held).reshape(-1).view(np.uint8).data
    return bytes(proto_of(constant).raw_data)


def is_finite(constant: gs.Constant) -> bool:
    """Whether a Constant holds no NaN or infinity; asked twice of a tensor of a file, it is read once."""
    held = constant._values
    return held.finite if isinstance(held, Weight) else bool(np.isfinite(array_of(constant)).all())


def nonzero(constant: gs.Constant) -> int:
    """How many values of a Constant are not zero; asked twice of a tensor of a file, it is read once."""
    held = constant._values
    return held.nonzero if isinstance(held, Weight) else int(np.count_nonzero(array_of(constant)))


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether numpy holds values of this type as a file does."""
    return dtype.isbuiltin == 1 and dtype.kind in "fiub" and sys.byteorder == "little"
