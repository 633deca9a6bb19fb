"""Every kind of bad model is refused with words that say what, where and what to do; good ones keep what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa_compiler.errors import ModelError
from spa_compiler.graph.load import load
from spa_compiler.graph.save import to_proto
from tests.graph.protos import large_mlp
from tests.onnx_text import HEADER, model_from

MLP = """
mlp (float["batch", 4] x) => (float["batch", 3] y) <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
  h = MatMul(x, w)
  y = Relu(h)
}
"""


def parsed(text: str, header: str = HEADER) -> onnx.ModelProto:
    """Text to proto without any check."""
    return onnx.parser.parse_model(header + text)


def test_signature_and_source_facts(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(large_mlp(), path)
    model = load(path)
    assert [(v.name, v.shape, v.dtype) for v in model.signature.inputs] == [("x", ("batch", 64), np.dtype("float32"))]
    assert model.signature.symbols == ("batch",)
    assert (model.source.name, model.source.opset, model.source.ir_version) == ("net", 17, 8)
    assert model.source.bytes == path.stat().st_size
    assert load(str(path)).signature == model.signature


def test_a_proto_is_not_changed() -> None:
    proto = large_mlp()
    before = proto.SerializeToString(deterministic=True)
    model = load(proto)
    model.graph.nodes[0].name = "renamed"
    to_proto(model)
    assert proto.SerializeToString(deterministic=True) == before


def test_initializers_among_the_inputs_become_constants() -> None:
    proto = large_mlp()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 32]))
    model = load(proto)
    assert [value.name for value in model.signature.inputs] == ["x"]
    assert "initializers listed as inputs became constants: w" in model.source.notes[0]
    assert to_proto(model).ir_version == 4


def test_nodes_out_of_order_are_sorted() -> None:
    proto = parsed(MLP)
    nodes = list(proto.graph.node)
    swapped = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(nodes)]
    del proto.graph.node[:]
    proto.graph.node.extend(swapped)
    model = load(proto)
    assert [node.op for node in model.graph.nodes] == ["MatMul", "Relu"]
    assert "topological order" in model.source.notes[0]


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "my" : 1]>
    g (float[2] x) => (float[2] y) { y = my.twice(x) }
    <domain: "my", opset_import: ["" : 21]> twice (a) => (b) { b = Add(a, a) }
    """
    model = load(onnx.parser.parse_model(text))
    assert [node.op for node in model.graph.nodes] == ["Add"]
    assert model.source.notes == ("1 local functions inlined",)


def test_the_default_domain_is_spelled_one_way() -> None:
    proto = parsed(MLP, '<ir_version: 10, opset_import: ["ai.onnx" : 21]>\n')
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    written = to_proto(load(proto))
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 21)]


def test_operators_of_other_domains_are_kept() -> None:
    model = model_from(
        "g (float[2] x) => (float[2] y) { y = com.other.Thing(x) }",
        '<ir_version: 10, opset_import: ["" : 21, "com.other" : 1]>\n',
    )
    assert model.graph.nodes[0].domain == "com.other"


def test_large_constant_nodes_become_initializers() -> None:
    proto = large_mlp()
    weight = proto.graph.initializer[0]
    node = helper.make_node("Constant", [], ["w"], name="c", value=weight)
    nodes = [node, *proto.graph.node]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.initializer[:]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    model = load(proto)
    assert [n.op for n in model.graph.nodes] == ["MatMul"]
    assert to_proto(model).graph.initializer[0].raw_data == weight.raw_data


@pytest.mark.parametrize("opset", [7, 9, 12])
def test_old_opsets_that_work(opset: int) -> None:
    assert load(parsed(MLP, f'<ir_version: 4, opset_import: ["" : {opset}]>\n')).source.opset == opset


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.onnx: there is no such file\. Check the path"):
        load(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match=r"this is not a file\. Name the \.onnx file itself"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"hello world, this is text", "not an ONNX model"),
        (b"\x08\x0a", "cut short|not an ONNX model"),
    ],
)
def test_not_onnx(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_protobuf(tmp_path: Path, share: float) -> None:
    whole = large_mlp().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"cut short.*Copy or download it again"):
        load(path)


def _too_old(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 6


def _too_new(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


def _no_opset(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


def _undefined(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "ghost"


def _undefined_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "ghost"


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


def _unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type = "Reluu"
    proto.graph.node[1].name = "act"


def _too_new_operator(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 17
    proto.graph.node[1].op_type = "Gelu"


def _removed_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type = "Upsample"


def _defined_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].output[0] = "y"


def _initializer_twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def _bad_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].attribute.append(helper.make_attribute("alpha", 1.0))


def _zero_size(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0


def _inconsistent(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].name = "dense"
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def _wrong_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def _missing_import(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].domain = "com.other"


@pytest.mark.parametrize(
    "spoil,words",
    [
        (_too_old, "opset 6 is too old; opset 7 is the first.*version_converter"),
        (_too_new, "opset 999 is newer than the installed onnx"),
        (_no_opset, "does not say which opset"),
        (_undefined, r"node '-> h' \(MatMul\) uses tensor 'ghost', which nothing defines"),
        (_undefined_output, "output 'ghost' is defined by nothing"),
        (_cycle, r"the graph has a cycle: node '-> h' \(MatMul\) -> node '-> y' \(Relu\) -> node '-> h'"),
        (_unknown_operator, r"node 'act' \(Reluu\): there is no operator 'Reluu' in ONNX's default domain"),
        (_too_new_operator, "no operator 'Gelu' in ONNX's default domain in opset 17"),
        (_removed_operator, "Upsample no longer exists in opset 21"),
        (_defined_twice, r"tensor 'y' is defined twice, by node '-> y' \(MatMul\) and by node '-> y' \(Relu\)"),
        (_initializer_twice, "tensor 'w' is defined twice"),
        (_bad_attribute, "not valid ONNX: Unrecognized attribute: alpha"),
        (_zero_size, "axis 0 of input 'x' has size zero"),
        (_inconsistent, r"shapes or types do not fit: .*MatMul, node name: dense"),
        (_wrong_type, r"shapes or types do not fit"),
        (_missing_import, "domain 'com.other', which the model does not import"),
    ],
)
def test_bad_models(spoil: Callable[[onnx.ModelProto], None], words: str) -> None:
    proto = parsed(MLP)
    spoil(proto)
    with pytest.raises(ModelError, match=words) as caught:
        load(proto)
    assert caught.value.where == "mlp"
    assert caught.value.fix


def test_damaged_bytes_are_refused_or_read_never_worse(tmp_path: Path) -> None:
    whole = bytearray(model_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load(path)
        except ModelError:
            refused += 1
    assert refused > 100


def model_bytes() -> bytes:
    proto = parsed(MLP)
    proto.graph.node[0].name = "dense"
    return bytes(proto.SerializeToString())


def test_weights_of_the_wrong_size() -> None:
    proto = large_mlp()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ModelError, match=r"tensor 'w' has 8188 bytes, but type and dims \[64, 32\] need 8192"):
        load(proto)


def test_branches_are_checked_too() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
      y = If(c) <then_branch = t () => (float[2] a) { a = Nonsense(x) },
                 else_branch = e () => (float[2] b) { b = Abs(x) }>
    }"""
    with pytest.raises(ModelError, match="there is no operator 'Nonsense'"):
        load(parsed(text))
    with pytest.raises(ModelError, match="uses tensor 'z', which nothing defines"):
        load(parsed(text.replace("Nonsense(x)", "Abs(z)")))


def test_wrong_intermediate_shapes_are_ignored_with_a_note() -> None:
    proto = parsed(MLP)
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 7]))
    model = load(proto)
    assert "intermediate shapes stated in the file" in model.source.notes[0]


def test_shapes_that_inference_cannot_know_are_no_error() -> None:
    model_from("""g (float[N, 4] x, int64[2] s) => (float[A, B] y) {
      r = Reshape(x, s)
      y = Abs(r)
    }""")


def test_a_graph_without_its_weights_is_refused() -> None:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[600, 600])
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 600]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "hollow", values[:1], values[1:], [tensor])
    with pytest.raises(ModelError, match=r"1 initializers have dims but no values: w"):
        load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))
