"""Sparse initializers, made dense: everything behind `load` knows one kind of initializer."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import SparseTensorProto, TensorProto, numpy_helper

from spa_compiler.errors import ModelError
from spa_compiler.graph.branches import with_branches

MOST_BYTES = 1 << 30
"""Of all that is made dense in one file, which can state any dims in a few bytes and must fit one protobuf message."""

_NUMBERS = "biufcV"
"""Kinds of numpy types; V are those that numpy has not by itself, such as bfloat16."""


def densify(graph: onnx.GraphProto, where: str) -> list[str]:
    """Turns the sparse initializers of a graph and of its branches into dense ones, in place; returns their names.

    Raises:
        ModelError: one is damaged, or they are too large.
    """
    names: list[str] = []
    left = MOST_BYTES
    for inner in with_branches(graph):
        for tensor in inner.sparse_initializer:
            dense = densified(tensor, where, left)
            left -= dense.ByteSize()
            names.append(dense.name)
            inner.initializer.append(dense)
        del inner.sparse_initializer[:]
    return names


def densified(tensor: SparseTensorProto, where: str, most: int = MOST_BYTES) -> TensorProto:
    """The same values as a dense tensor of the same name and type.

    Args:
        most: bytes that it may take.

    Raises:
        ModelError: indices do not fit the dims (ONNX IR: linear `[nnz]` or `[nnz, rank]`, int64, each once), there
            is another number of values, they are no numbers or lie outside of the file, or it takes too much.
    """
    name, dims = tensor.values.name, list(tensor.dims)
    if not isinstance(name, str):  # protobuf hands on bytes where a damaged file has something else
        raise _damaged(name, where, "its name is no text")
    if TensorProto.EXTERNAL in (tensor.values.data_location, tensor.indices.data_location):
        raise _damaged(name, where, "its values or indices are external data")
    try:
        values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    except Exception as error:  # whatever onnx makes of a damaged tensor
        raise _damaged(name, where, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if values.dtype.kind not in _NUMBERS:
        raise _damaged(name, where, "its values are no numbers")
    if any(dim < 0 for dim in dims) or values.ndim != 1 or indices.dtype != np.int64:
        raise _damaged(name, where, f"dims {dims}, values {list(values.shape)}, indices of type {indices.dtype}")
    if math.prod(max(1, dim) for dim in dims) * values.dtype.itemsize > most:
        raise ModelError(
            f"sparse initializer {name!r} has dims {dims}: dense, all of them would take more than 1 GB",
            where=where,
            fix="Store it as a dense initializer in external data",
        )
    if indices.shape == (values.size, len(dims)) and dims:
        shape, places = dims, tuple(indices.T)
    elif indices.shape == values.shape:
        shape, places = [math.prod(dims)], (indices,)
    else:
        raise _damaged(name, where, f"{values.size} values, but indices {list(indices.shape)}")
    if any(((place < 0) | (place >= size)).any() for place, size in zip(places, shape, strict=True)):
        raise _damaged(name, where, f"an index is outside of the dims {dims}")
    if len(np.unique(indices, axis=0)) < len(indices):
        raise _damaged(name, where, "it gives two values for one index")
    try:
        dense = np.zeros(shape, values.dtype)
        dense[places] = values
    except ValueError as error:  # more axes than numpy knows
        raise _damaged(name, where, str(error)) from error
    return numpy_helper.from_array(dense.reshape(dims), name)


def _damaged(name: object, where: str, what: str) -> ModelError:
    return ModelError(f"sparse initializer {name!r} is damaged: {what}", where=where, fix="Export the model again")
