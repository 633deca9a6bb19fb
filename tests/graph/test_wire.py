"""Model files around their weights: what is read and written is what protobuf would read and write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.errors import ModelError
from spa_compiler.graph import wire
from spa_compiler.graph.load import load
from spa_compiler.graph.save import save, settle, to_proto
from spa_compiler.graph.weights import Weight, array_of
from tests.graph.protos import large_mlp

LEAST = 64


def model(sizes: list[int], behind: bool = True) -> onnx.ModelProto:
    """Identities of weights of some sizes, with fields before and behind everything that can be left out."""
    tensors = [numpy_helper.from_array(np.arange(size, dtype=np.float32) + i, f"w{i}") for i, size in enumerate(sizes)]
    nodes = [helper.make_node("Identity", [t.name], [f"y{t.name}"], doc_string="n") for t in tensors]
    outputs = [helper.make_tensor_value_info(f"y{t.name}", TensorProto.FLOAT, list(t.dims)) for t in tensors]
    if behind:
        for tensor in tensors:
            tensor.doc_string = "said"
            tensor.metadata_props.add(key="a", value="b")
    graph = helper.make_graph(nodes, "g", [], outputs, tensors, doc_string="graph")
    made = helper.make_model(graph, producer_name="p", opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made.metadata_props.add(key="k", value="v")
    return made


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 16, 17, 31, 32, 100, 5000, 40000]), max_size=6), behind=st.booleans())
def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], behind: bool) -> None:
    path = tmp_path_factory.mktemp("wire") / "m.onnx"
    proto = model(sizes, behind)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    found = wire.outline(path, LEAST)
    assert found is not None
    bare, places = found
    assert set(places) == {i for i, size in enumerate(sizes) if size * 4 > LEAST}
    for number, place in places.items():
        assert not bare.graph.initializer[number].HasField("raw_data")
        assert place.read().tobytes() == proto.graph.initializer[number].raw_data
        wire.mark(bare.graph.initializer[number], number)
    again = path.with_name("again.onnx")
    lies = wire.write(bare, again, {n: (p.length, lambda p=p: p.read().data) for n, p in places.items()})
    assert again.read_bytes() == path.read_bytes()
    assert lies == {n: (p.offset, p.length) for n, p in places.items()}


def test_stubs_in_branches_are_filled(tmp_path: Path) -> None:
    big = numpy_helper.from_array(np.arange(1000, dtype=np.float32), "big")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1000])
    inner = helper.make_graph([helper.make_node("Identity", ["big"], ["y"])], "t", [], [y], [big])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    whole = helper.make_model(helper.make_graph([node], "g", [c], [y]), ir_version=8)
    stubs = onnx.ModelProto()
    stubs.CopyFrom(whole)
    for number, attribute in enumerate(stubs.graph.node[0].attribute):
        attribute.g.initializer[0].ClearField("raw_data")
        wire.mark(attribute.g.initializer[0], number)
    wire.write(stubs, tmp_path / "m.onnx", {n: (4000, lambda: big.raw_data) for n in range(2)})
    assert (tmp_path / "m.onnx").read_bytes() == whole.SerializeToString(deterministic=True)


def test_what_is_no_model_is_left_to_protobuf(tmp_path: Path) -> None:
    data = model([40000]).SerializeToString()
    path = tmp_path / "m.onnx"
    for bad in (b"", b"\x00", b"no model", data[:-100], data[:60], data + data, b"\x3b" + data):
        path.write_bytes(bad)
        assert wire.outline(path, LEAST) is None


def test_a_payload_of_another_length_is_refused(tmp_path: Path) -> None:
    bare = model([100])
    bare.graph.initializer[0].ClearField("raw_data")
    wire.mark(bare.graph.initializer[0], 0)
    with pytest.raises(ValueError, match="400 bytes"):
        wire.write(bare, tmp_path / "m.onnx", {0: (400, lambda: b"short")})


def test_weights_of_a_file_stay_there(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(large_mlp(), path)
    weight = next(c for c in load(path).graph.tensors().values() if c.name == "w")
    assert isinstance(weight._values, Weight)
    assert weight._values.place is not None
    assert not weight._values.tensor.HasField("raw_data")
    want = numpy_helper.to_array(next(t for t in large_mlp().graph.initializer if t.name == "w"))
    assert np.array_equal(array_of(weight), want)
    assert weight._values.nonzero == np.count_nonzero(want)
    assert weight._values.finite


def test_a_model_can_be_saved_over_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(large_mlp(), path)
    read = load(path)
    wanted = to_proto(read).SerializeToString(deterministic=True)
    save(read, path)
    assert path.read_bytes() == wanted == to_proto(read).SerializeToString(deterministic=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_that_got_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(large_mlp(), path)
    read = load(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ModelError, match="cut short while it was read"):
        to_proto(read)


@pytest.mark.parametrize("beside", [False, True])
def test_a_settled_model_holds_no_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    if beside:
        monkeypatch.setattr("spa_compiler.graph.save.EXTERNAL_ABOVE", 0)
    read = load(large_mlp())
    weight = next(c for c in read.graph.tensors().values() if c.name == "w")
    weight.values = weight.values * 2
    before = to_proto(read)
    files = settle(read, tmp_path / "m.onnx")
    assert len(files) == 1 + beside
    assert isinstance(weight._values, Weight)
    assert to_proto(read) == before
    for file in files:
        file.unlink()  # it stays open
    assert to_proto(read) == before
