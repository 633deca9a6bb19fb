"""Weights that stay where they are until somebody touches them: inside the protobuf, or in a file beside it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from spa_compiler.graph import external

LARGE_BYTES = 1024
"""Constants above this many bytes are kept out of skeletons; shapes, axes and scalars stay in."""


class Weight(LazyValues):  # type: ignore[misc]
    """A tensor of the source file, read on first use.

    `tensor` is the source's own TensorProto and is never written to. For external data `folder` is the model's folder;
    graphsurgeon's own class would read from the current folder. Copies of a model share one array while any of them
    holds it.
    """

    def __init__(self, tensor: TensorProto, folder: Path | None) -> None:
        super().__init__(tensor)
        self.folder = folder
        self._loaded: weakref.ref[np.ndarray[Any, Any]] | None = None

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
            array = external.read(self.tensor, self.folder) if self.is_external else numpy_helper.to_array(self.tensor)
            self._loaded = weakref.ref(array)
        return array


def array_of(constant: gs.Constant) -> np.ndarray[Any, Any]:
    """The values of a Constant without making it hold them: right for one pass over all weights."""
    held = constant._values
    array: np.ndarray[Any, Any] = held.load() if isinstance(held, LazyValues) else held
    return array


def proto_of(constant: gs.Constant) -> TensorProto:
    """A Constant as a self-contained TensorProto (raw data, nothing external), under the Constant's name."""
    held = constant._values
    if isinstance(held, LazyValues) and held.tensor.data_location != TensorProto.EXTERNAL:
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
