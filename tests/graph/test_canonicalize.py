"""Canonical form computes the same, keeps the signature, and gives way where a rewrite goes wrong."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph import canonicalize as module
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds, open_model, run
from tests.graph.protos import large_mlp
from tests.onnx_text import model_from

REDUNDANT = """g (float["batch", "sequence", 4] x) => (float["batch", "sequence", 4] y) <float[4] k = {1, 2, 3, 4}> {
  a = Identity(x)
  s = Shape(a)
  one = Constant<value = float[1] {1}>()
  b = Reshape(a, s)
  c = Add(b, k)
  y = Mul(c, one)
}"""


def feeds_for(model: Model, *shapes: tuple[int, ...]) -> list[Feeds]:
    rng = np.random.default_rng(0)
    name = model.signature.inputs[0].name
    return [{name: rng.standard_normal(shape).astype(np.float32)} for shape in shapes]


def test_simplifies_and_keeps_symbols() -> None:
    model = model_from(REDUNDANT)
    feeds = feeds_for(model, (1, 3, 4), (2, 5, 4))
    result = canonicalize(model, feeds)
    assert len(result.model.graph.nodes) < len(model.graph.nodes)
    assert "Identity" not in {node.op for node in result.model.graph.nodes}
    assert any(note.startswith("onnxslim: ") for note in result.notes)
    before, after = to_proto(model), to_proto(result.model)
    assert list(before.graph.input) == list(after.graph.input)
    assert list(before.graph.output) == list(after.graph.output)
    for feed in feeds:
        assert np.array_equal(run(open_model(model), feed)["y"], run(open_model(result.model), feed)["y"])


def test_the_model_given_is_not_changed() -> None:
    model = model_from(REDUNDANT)
    before = to_proto(model).SerializeToString(deterministic=True)
    canonicalize(model, feeds_for(model, (1, 3, 4)))
    assert to_proto(model).SerializeToString(deterministic=True) == before


def test_nothing_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    model = model_from(REDUNDANT)
    canonicalize(model, feeds_for(model, (1, 3, 4)))
    assert capfd.readouterr().out == ""


def test_names_are_unique_and_traceable() -> None:
    model = model_from("""g (float[2] x) => (float[2] y) {
      [same] a = Abs(x)
      [same] b = Neg(a)
      c = Exp(b)
      y = Log(c)
    }""")
    result = canonicalize(model, [])
    assert [node.name for node in result.model.graph.nodes] == ["same", "same_1", "Exp_2", "Log_3"]


def test_large_weights_stay_lazy_through_onnxslim() -> None:
    model = load(large_mlp())
    result = canonicalize(model, [])
    constant = weighted_ops(result.model.graph)[0].weight
    assert not isinstance(constant._values, np.ndarray)


def transposed_weight(shared: bool) -> onnx.ModelProto:
    """MatMul with a Transpose of a large weight, which a Gather reads too if `shared`."""
    weight = numpy_helper.from_array(np.arange(2048, dtype=np.float32).reshape(32, 64), "w")
    nodes = [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])]
    left = "x"
    if shared:
        inputs = [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])]
        nodes.append(helper.make_node("Gather", ["w", "x"], ["rows"]))
        left = "rows"
    nodes.append(helper.make_node("MatMul", [left, "wt"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])]
    graph = helper.make_graph(nodes, "t", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_computation_on_weights_is_done_ahead() -> None:
    model = load(transposed_weight(shared=False))
    result = canonicalize(model, feeds_for(model, (3, 64)))
    assert [node.op for node in result.model.graph.nodes] == ["MatMul"]
    assert result.notes == ("1 operators on weights computed ahead",)


def test_a_shared_weight_is_not_doubled() -> None:
    result = canonicalize(load(transposed_weight(shared=True)), [{"x": np.arange(3)}])
    assert sorted(node.op for node in result.model.graph.nodes) == ["Gather", "MatMul", "Transpose"]


def test_a_rewrite_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Model) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(module, "_STEPS", (module._Step("the broken one", broken),))
    model = model_from(REDUNDANT)
    result = canonicalize(model, feeds_for(model, (1, 3, 4)))
    assert result.notes == ("the broken one left out: RuntimeError: no such luck",)
    assert len(result.model.graph.nodes) == len(model.graph.nodes)


def test_a_rewrite_that_changes_the_outputs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Model) -> str:
        next(node for node in model.graph.nodes if node.op == "Add").op = "Sub"
        return "wrong"

    good = module._STEPS
    monkeypatch.setattr(module, "_STEPS", (good[0], module._Step("the wrong one", wrong), *good[1:]))
    model = model_from(REDUNDANT)
    feed = feeds_for(model, (1, 3, 4))
    result = canonicalize(model, feed)
    assert "the wrong one left out: it changed the outputs" in result.notes
    assert any(note.startswith("onnxslim: ") for note in result.notes)
    assert np.array_equal(run(open_model(model), feed[0])["y"], run(open_model(result.model), feed[0])["y"])


def test_a_rewrite_that_grows_the_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fat(model: Model) -> None:
        node = next(node for node in model.graph.nodes if node.op == "Add")
        node.inputs[1].values = np.zeros((100, 100, 4), np.float32)

    monkeypatch.setattr(module, "_STEPS", (module._Step("the fat one", fat),))
    model = model_from(REDUNDANT)
    assert "the model would grow from" in canonicalize(model, feeds_for(model, (1, 3, 4))).notes[0]


def test_unknown_operators_are_left_as_they_came() -> None:
    model = model_from(
        "g (float[2] x) => (float[2] y) { y = com.other.Thing(x) }",
        '<ir_version: 10, opset_import: ["" : 21, "com.other" : 1]>\n',
    )
    result = canonicalize(model, [{"x": np.zeros(2, np.float32)}])
    assert "ONNX Runtime cannot run it here" in result.notes[0]
    assert [node.op for node in result.model.graph.nodes] == ["Thing"]
