"""Sparse initializers are read as what they say, in either layout of their indices; bad ones are refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.errors import ModelError
from spa_compiler.graph.load import load
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.sparse import densified

DENSE = np.array([[0, 5, 0], [7, 0, 0]])


def sparse(
    values: np.ndarray, indices: Sequence[object], dims: Sequence[int] = (2, 3), *, raw: bool = True
) -> onnx.SparseTensorProto:
    """A sparse tensor w, its values as raw bytes or in the field of their type."""
    if raw:
        held = numpy_helper.from_array(values, "w")
    else:
        held = helper.make_tensor("w", helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, values)
    return helper.make_sparse_tensor(held, numpy_helper.from_array(np.array(indices, np.int64)), dims)


def outside(tensor: onnx.SparseTensorProto) -> onnx.SparseTensorProto:
    """The same, with its values in another file."""
    tensor.values.ClearField("raw_data")
    tensor.values.data_location = TensorProto.EXTERNAL
    tensor.values.external_data.add(key="location", value="secret.bin")
    return tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int64, np.int8])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("indices", [[1, 3], [[0, 1], [1, 0]]])
def test_values_and_type_stay(dtype: type, raw: bool, indices: Sequence[object]) -> None:
    got = numpy_helper.to_array(densified(sparse(np.array([5, 7], dtype), indices, raw=raw), "here"))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, DENSE)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (sparse(np.array([5, 7], np.float32), [1, 6]), r"an index is outside of the dims \[2, 3\]"),
        (sparse(np.array([5, 7], np.float32), [-1, 3]), "an index is outside"),
        (sparse(np.array([5, 7], np.float32), [[0, 3], [1, 0]]), "an index is outside"),
        (sparse(np.array([5, 7], np.float32), [1, 2, 3]), r"2 values, but indices \[3\]"),
        (sparse(np.array([5.0], np.float32), [0], dims=(1 << 16, 1 << 16)), "more than 1 GB"),
        (sparse(np.zeros(0, np.float32), np.zeros(0), dims=(0, 1 << 62, 4)), "more than 1 GB"),
        (sparse(np.array([5, 7], np.float32), [2, 0], dims=()), "an index is outside"),
        (sparse(np.array([5], np.float32), [[0] * 100], dims=[1] * 100), "dimension"),
        (sparse(np.array([5, 7], np.float32), [3, 3]), "two values for one index"),
        (sparse(np.array([b"5"], object), [0]), "no numbers"),
        (outside(sparse(np.array([5], np.float32), [0])), "external data"),
        (sparse(np.array([5.0], np.float32), [0], dims=(-2, 3)), "dims"),
    ],
)
def test_bad_ones_are_refused(tensor: onnx.SparseTensorProto, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        densified(tensor, "here")


def test_a_model_with_one_loads_as_if_it_were_dense() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y])
    graph.sparse_initializer.append(sparse(np.array([5, 7], np.float32), [1, 3]))
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert "1 sparse initializers made dense: w" in model.source.notes
    proto = to_proto(model)
    assert not proto.graph.sparse_initializer
    (weight,) = proto.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(weight), DENSE.astype(np.float32))


def test_branches_are_seen_and_all_of_them_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])
        graph = helper.make_graph([helper.make_node("Identity", ["w"], [name])], name, [], [out])
        graph.sparse_initializer.append(sparse(np.array([5, 7], np.float32), [1, 3]))
        return graph

    choose = helper.make_tensor_value_info("choose", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    node = helper.make_node("If", ["choose"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    proto = helper.make_model(
        helper.make_graph([node], "g", [choose], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    again = to_proto(load(proto))
    for attribute in again.graph.node[0].attribute:
        (weight,) = attribute.g.initializer
        np.testing.assert_array_equal(numpy_helper.to_array(weight), DENSE.astype(np.float32))
    monkeypatch.setattr("spa_compiler.graph.sparse.MOST_BYTES", 50)  # one takes 24 and its header
    with pytest.raises(ModelError, match="more than 1 GB"):
        load(proto)


def test_a_name_that_is_no_text_is_refused() -> None:
    damaged = sparse(np.array([5], np.float32), [0]).SerializeToString().replace(b"\x01w", b"\x01\xff")
    with pytest.raises(ModelError, match="damaged"):
        densified(onnx.SparseTensorProto.FromString(damaged), "here")
