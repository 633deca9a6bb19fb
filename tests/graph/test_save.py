"""What graphsurgeon drops is put back; what is written is valid and reads everywhere."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.errors import ModelError
from spa_compiler.graph.load import load
from spa_compiler.graph.save import save, skeleton, to_proto
from spa_compiler.graph.session import open_model, run
from tests.graph.protos import large_mlp
from tests.onnx_text import model_from, proto_from, text_of

BRANCHES = """g (bool c, float[2] x) => (float[2] y) <float[2] k = {1, 2}> {
  y = If(c) <then_branch = t () => (float[2] a) { a = Add(x, k) },
             else_branch = e () => (float[2] b) { b = Mul(x, k) }>
}"""


def test_text_survives() -> None:
    text = """g (float["batch", 2] x) => (float["batch", 2] y) <float[2] k = {1, 2}> {
      [first] h = Add(x, k)
      [second] y = LeakyRelu<alpha = 0.25>(h)
    }"""
    once = text_of(model_from(text))
    assert once == text_of(load(proto_from(once_header(once))))
    assert "[second] y = LeakyRelu <alpha" in once


def once_header(text: str) -> str:
    """The printer leaves the model's header out; the parser wants one."""
    return '<ir_version: 10, opset_import: ["" : 21]>\n' + text


def test_metadata_comes_back() -> None:
    proto = large_mlp()
    proto.doc_string, proto.domain, proto.model_version = "about", "org.example", 7
    proto.metadata_props.add(key="author", value="me")
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.doc_string = "graph"
    proto.graph.node[0].doc_string = "node"
    proto.graph.node[0].metadata_props.add(key="n", value="2")
    proto.graph.input[0].doc_string = "input"
    proto.graph.input[0].metadata_props.add(key="i", value="3")
    proto.graph.initializer[0].doc_string = "weight"
    proto.graph.initializer[0].metadata_props.add(key="w", value="4")
    annotation = proto.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    model = load(proto)
    model.graph.nodes[0].inputs[1].values = model.graph.nodes[0].inputs[1].values * 2
    model.metadata.annotate(model.graph.nodes[0], {"spa.form": "dense"})
    back = to_proto(model.copy())
    assert (back.doc_string, back.domain, back.model_version) == ("about", "org.example", 7)
    assert back.metadata_props[0].value == "me"
    assert (back.graph.doc_string, back.graph.metadata_props[0].key) == ("graph", "g")
    node = back.graph.node[0]
    assert (node.doc_string, {p.key: p.value for p in node.metadata_props}) == ("node", {"n": "2", "spa.form": "dense"})
    assert back.graph.input[0] == proto.graph.input[0]
    weight = back.graph.initializer[0]
    assert (weight.doc_string, weight.metadata_props[0].value) == ("weight", "4")
    assert np.array_equal(numpy_helper.to_array(weight), numpy_helper.to_array(proto.graph.initializer[0]) * 2)
    assert back.graph.quantization_annotation[0].tensor_name == "y"


def test_attributes_that_graphsurgeon_cannot_hold() -> None:
    proto = large_mlp()
    node = helper.make_node("Thing", ["y0"], ["y"], domain="com.other")
    node.attribute.add(name="raw", type=onnx.AttributeProto.STRING, s=b"\xff\xfe")
    node.attribute.add(name="none", type=onnx.AttributeProto.INTS)
    node.attribute.append(helper.make_attribute("many", [numpy_helper.from_array(np.ones(2), "t")]))
    node.attribute.append(helper.make_attribute("kept", 3))
    proto.graph.node[0].output[0] = "y0"
    proto.graph.node.append(node)
    proto.opset_import.append(helper.make_opsetid("com.other", 1))
    back = to_proto(load(proto))
    assert {a.name: a for a in back.graph.node[1].attribute} == {a.name: a for a in node.attribute}


def test_branches_share_outer_constants() -> None:
    model = model_from(BRANCHES)
    back = to_proto(model)
    assert [tensor.name for tensor in back.graph.initializer] == ["k"]
    for attribute in back.graph.node[0].attribute:
        assert not attribute.g.initializer
        assert not attribute.g.value_info
    feeds = {"c": np.array(True), "x": np.ones(2, np.float32)}
    assert run(open_model(model.copy()), feeds)["y"].tolist() == [2, 3]


def test_copies_share_arrays_but_not_structure() -> None:
    model = load(large_mlp())
    values = model.graph.nodes[0].inputs[1].values
    twin = model.copy()
    assert twin.graph.nodes[0].inputs[1].values is values
    twin.graph.nodes[0].inputs[1].values = values + 1
    twin.graph.nodes[0].op = "Gemm"
    assert model.graph.nodes[0].op == "MatMul"
    assert model.graph.nodes[0].inputs[1].values is values


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "uint4"])
@pytest.mark.parametrize("touch", [False, True])
def test_small_types_survive(dtype: str, touch: bool) -> None:
    values = np.arange(6).astype(getattr(ml_dtypes, dtype))
    tensor = numpy_helper.from_array(values, "w")
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), helper.make_node("Add", ["c", "x"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6])],
        [tensor],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    if touch:
        assert model.graph.nodes[0].inputs[0].values.tolist() == values.tolist()
    back = to_proto(model)
    assert back.graph.initializer[0].data_type == tensor.data_type
    assert back.graph.initializer[0].raw_data == tensor.raw_data


def test_strings_survive() -> None:
    model = model_from('g (string[2] x) => (string[4] y) <string[2] s = {"a", "b"}> { y = Concat<axis = 0>(x, s) }')
    assert list(to_proto(model).graph.initializer[0].string_data) == [b"a", b"b"]


def test_skeleton_has_no_weights() -> None:
    model = load(large_mlp(512, 512))
    bare = skeleton(model)
    assert bare.ByteSize() < 1000
    assert [value.name for value in bare.graph.input] == ["x", "w"]
    onnx.checker.check_model(bare, full_check=True)


def test_data_file_above_the_threshold(tmp_path: Path) -> None:
    model = load(large_mlp())
    assert save(model, tmp_path / "one.onnx") == [tmp_path / "one.onnx"]
    files = save(model, tmp_path / "two.onnx", threshold=100)
    assert files == [tmp_path / "two.onnx", tmp_path / "two.onnx.data"]
    onnx.checker.check_model(files[0])
    assert (
        onnx.load(files[0]).graph.initializer[0].raw_data
        == onnx.load(tmp_path / "one.onnx").graph.initializer[0].raw_data
    )
    first = files[1].read_bytes(), files[0].read_bytes()
    save(model, tmp_path / "two.onnx", threshold=100)
    assert first == (files[1].read_bytes(), files[0].read_bytes())


def test_broken_graphs_are_not_written() -> None:
    model = load(large_mlp())
    model.graph.nodes[0].attrs["nonsense"] = 1
    with pytest.raises(ModelError, match="not valid ONNX: Unrecognized attribute: nonsense"):
        to_proto(model)


def test_ir_version_is_at_most_ten() -> None:
    proto = large_mlp()
    proto.ir_version = 11
    assert to_proto(load(proto)).ir_version == 10


def test_new_constants_and_nodes_are_written() -> None:
    model = load(large_mlp())
    node = model.graph.nodes[0]
    y = node.outputs[0]
    node.outputs = [gs.Variable("h", np.float32)]
    model.graph.nodes.append(
        gs.Node("Add", "bias", inputs=[node.outputs[0], gs.Constant("b", np.ones(32, np.float32))], outputs=[y])
    )
    assert run(open_model(model), {"x": np.zeros((1, 64), np.float32)})["y"].tolist() == [[1.0] * 32]
