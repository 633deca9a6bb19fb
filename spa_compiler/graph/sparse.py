"""Sparse initializers, made dense: everything behind `load` knows one kind of constant."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import SparseTensorProto, TensorProto, numpy_helper

from spa_compiler.errors import ModelError

_MOST_BYTES = 1 << 31
"""A file of a few bytes can state any dims; a dense tensor that one protobuf message cannot hold is refused."""


def densified(tensor: SparseTensorProto, where: str) -> TensorProto:
    """The same values as a dense tensor of the same name and type.

    Raises:
        ModelError: indices do not fit the dims (ONNX IR: linear `[nnz]` or coordinates `[nnz, rank]`, int64), there is
            another number of values, or the dense tensor would have 2 GB or more.
    """
    name, dims = tensor.values.name, list(tensor.dims)
    try:
        values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    except Exception as error:  # whatever onnx makes of a damaged tensor
        raise _damaged(name, where, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if any(dim < 0 for dim in dims) or values.ndim != 1 or indices.dtype != np.int64:
        raise _damaged(name, where, f"dims {dims}, values {list(values.shape)}, indices of type {indices.dtype}")
    if math.prod(dims) * values.dtype.itemsize >= _MOST_BYTES:
        raise ModelError(
            f"sparse initializer {name!r} has dims {dims}: dense, that is 2 GB or more",
            where=where,
            fix="Store it as a dense initializer in external data",
        )
    if indices.shape == (values.size, len(dims)):
        shape, places = dims, tuple(indices.T)
    elif indices.shape == values.shape:
        shape, places = [math.prod(dims)], (indices,)
    else:
        raise _damaged(name, where, f"{values.size} values, but indices {list(indices.shape)}")
    if any(((place < 0) | (place >= size)).any() for place, size in zip(places, shape, strict=True)):
        raise _damaged(name, where, f"an index is outside of the dims {dims}")
    dense = np.zeros(shape, values.dtype)
    dense[places] = values
    return numpy_helper.from_array(dense.reshape(dims), name)


def _damaged(name: str, where: str, what: str) -> ModelError:
    return ModelError(f"sparse initializer {name!r} is damaged: {what}", where=where, fix="Export the model again")


def densify(graph: onnx.GraphProto, where: str) -> list[str]:
    """Turns the sparse initializers of one graph into dense ones, in place; returns their names."""
    names = [tensor.values.name for tensor in graph.sparse_initializer]
    graph.initializer.extend(densified(tensor, where) for tensor in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    return names
