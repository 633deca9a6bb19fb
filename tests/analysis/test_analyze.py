"""The whole analysis: what pins, what the JSON says, and what it must not do."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from spa_compiler.analysis import analyze, schema
from spa_compiler.graph.load import load
from tests.analysis import nets
from tests.analysis.told import analysis_of, group_members, weighted
from tests.onnx_text import model_from, text_of


@pytest.mark.parametrize("name", nets.ALL)
def test_the_json_is_valid(name: str) -> None:
    """Every index exists, no two units of a group share one on an axis, and the text is what the schema says."""
    model = load(weighted(nets.ALL[name]))
    analysis = analyze(model)
    document = msgspec.json.decode(analysis.to_json(), type=schema.Document)
    assert document == analysis.document()
    shapes = {key: [analysis.facts.algebra.size(axis) for axis in axes] for key, axes in analysis.facts.axes.items()}
    tensors = model.graph.tensors()
    for group in document.groups:
        assert [unit.id for unit in group.units] == list(range(group.size))
        seen: set[tuple[str, int, int]] = set()
        for unit in group.units:
            assert unit.parameters
            for slab in [*unit.parameters, *unit.activations]:
                assert slab.name in tensors
                assert slab.indices == sorted(set(slab.indices))
                assert slab.indices[0] >= 0
                assert slab.indices[-1] < (shapes[slab.name][slab.axis] or 0)
                found = {(slab.name, slab.axis, index) for index in slab.indices}
                assert not found & seen, "all units of these nets are slabs of one factor"
                seen |= found
        assert 0 < group.params <= analysis.params
    for pin in document.pins:
        assert pin.tensor in tensors
        assert 0 <= pin.axis < len(shapes[pin.tensor])
        assert pin.reason
    assert 0 < analysis.prunable <= analysis.params


def test_the_json_has_the_documented_keys() -> None:
    document = json.loads(analysis_of(nets.MLP).to_json())
    assert set(document) == {"groups", "pins"}
    assert set(document["groups"][0]) == {"id", "size", "granularity", "params", "macs", "units"}
    assert set(document["groups"][0]["units"][0]) == {"id", "parameters", "activations"}
    assert set(document["groups"][0]["units"][0]["parameters"][0]) == {"name", "axis", "indices"}
    assert set(document["pins"][0]) == {"tensor", "axis", "op", "reason", "params"}
    assert "Document" in schema.json_schema()["$defs"]


def test_pure_and_deterministic() -> None:
    model = model_from("""g (float[N, 2] x) => (float[N, 2] y)
      <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {1, 2, 3, 4, 5, 6}> {
      a = MatMul(x, w)
      b = Relu(a)
      y = MatMul(b, v)
    }""")
    before = text_of(model)
    first = analyze(model).to_json()
    assert text_of(model) == before
    assert model.graph.tensors()["b"].shape is None
    assert analyze(model).to_json() == first


def test_an_operator_without_a_rule_pins_what_it_touches() -> None:
    header = '<ir_version: 10, opset_import: ["" : 21, "my.domain" : 1]>\n'
    model = model_from(
        """g (float[N, 2] x) => (float[N, 2] y)
      <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3, 2] v = {1, 2, 3, 4, 5, 6}> {
      a = MatMul(x, w)
      b = my.domain.Relu(a)
      c = Add(a, b)
      y = MatMul(c, v)
    }""",
        header,
    )
    analysis = analyze(model)
    assert analysis.groups == ()
    found = {(pin.tensor, pin.axis, pin.reason, pin.params) for pin in analysis.pins if pin.op == "Relu"}
    assert ("a", 1, "no rule for my.domain::Relu", 6) in found


def test_what_a_rule_refuses_is_pinned_for_its_reason() -> None:
    text = """g (float[N, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      yes = Constant <value = bool {1}> ()
      ratio = Constant <value = float {0}> ()
      b = Dropout(a, ratio, yes)
      y = MatMul(b, v)
    }"""
    assert analysis_of(text).groups == ()
    reason = "dropout that may be in training mode"
    pins = {(pin.tensor, pin.axis, pin.op, pin.reason, pin.params) for pin in analysis_of(text).pins}
    assert {("a", 1, "Dropout", reason, 24), ("b", 1, "Dropout", reason, 12)} <= pins


def test_branches_pin_what_they_read() -> None:
    text = """g (float[N, 4] x, float[4, 6] w, float[6, 2] v, float[4, 5] w1, float[5, 2] v1) => (float[N, 2] y) {
      a = MatMul(x, w)
      a1 = MatMul(x, w1)
      yes = Constant <value = bool {1}> ()
      b = If (yes) <
        then_branch = g1 () => (float[N, 6] b1) { b1 = Relu(a) },
        else_branch = g2 () => (float[N, 6] b2) { b2 = Identity(a) }
      >
      c = MatMul(b, v)
      c1 = MatMul(a1, v1)
      y = Add(c, c1)
    }"""
    assert group_members(text) == [{("w1", 1), ("a1", 1), ("v1", 0)}]
    pins = [pin for pin in analysis_of(text).pins if pin.op == "If"]
    assert ("a", 1, 24) in {(pin.tensor, pin.axis, pin.params) for pin in pins}


def test_open_sizes_are_bound() -> None:
    """What the file leaves open has a size, so that what hangs on it can be told; the input's own axes are pinned."""
    text = """g (float[N, S, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, S, 2] y) {
      a = MatMul(x, w)
      y = MatMul(a, v)
    }"""
    analysis = analysis_of(text)
    assert all(isinstance(analysis.facts.algebra.size(axis), int) for axis in analysis.facts.axes["a"])
    assert analysis.facts.settled.varies["a"] == (True, True, False)
    assert group_members(text) == [{("w", 1), ("a", 2), ("v", 0)}]


def test_the_caller_chooses_the_sizes() -> None:
    text = """g (float[N, S, 4] x, float[4, 6] w, float[6, 2] v) => (float[N, S, 2] y) {
      a = MatMul(x, w)
      y = MatMul(a, v)
    }"""
    analysis = analyze(load(weighted(text)), {"x": [3, 7, 4]})
    assert [analysis.facts.algebra.size(axis) for axis in analysis.facts.axes["a"]] == [3, 7, 6]
    assert analysis.groups[0].macs == 7 * (4 * 6 + 6 * 2), "of one sample"


def test_a_graph_output_pins_what_it_gives_out() -> None:
    members = group_members("""g (float[N, 4] x, float[4, 6] w, float[6, 5] v, float[5, 2] u) =>
        (float[N, 2] y, float[N, 6] a) {
      a = MatMul(x, w)
      b = MatMul(a, v)
      y = MatMul(b, u)
    }""")
    assert members == [{("v", 1), ("b", 1), ("u", 0)}]


def test_one_weight_read_twice_is_one_axis() -> None:
    (group,) = analysis_of(nets.SHARED).groups
    assert {(m.tensor, m.axis) for m in group.parameters} == {("w0", 1), ("w", 0), ("w", 1), ("w1", 0)}


def test_integer_constants_are_no_parameters() -> None:
    analysis = analysis_of("""g (float[N, 4] x, float[4, 6] w) => (float[N, 3, 2] y) {
      a = MatMul(x, w)
      shape = Constant <value_ints = [0, 3, 2]> ()
      y = Reshape(a, shape)
    }""")
    assert (analysis.params, analysis.prunable) == (24, 0)


def test_no_weight_is_read(tmp_path: Path) -> None:
    """External data that is far too large to be read in a test stays on disk, as a file with a hole."""
    path, size = tmp_path / "large.onnx", 1 << 18
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
      g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w)
        y = MatMul(a, v) }""")
    for name, dims in (("w", (4, size)), ("v", (size, 4))):
        tensor = model.graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="large.data")
        tensor.external_data.add(key="offset", value=str(0 if name == "w" else 16 * size))
        tensor.external_data.add(key="length", value=str(16 * size))
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "large.data").open("wb") as file:
        file.truncate(32 * size)
    loaded = load(path)
    (group,) = analyze(loaded).groups
    assert (group.size, group.params) == (size, 8 * size)
    assert not isinstance(loaded.graph.tensors()["w"]._values, np.ndarray)


def test_a_unit_that_is_all_of_an_axis_stays() -> None:
    """Every index is tied to the next one round, so there is one unit, and without it nothing would be left."""
    analysis = analysis_of("""g (float[N, 3] x, float[3, 5] w, float[5, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      next = Constant <value = int64[5] {1, 2, 3, 4, 0}> ()
      b = Gather <axis = 1> (a, next)
      c = Add(a, b)
      y = MatMul(c, v)
    }""")
    assert not analysis.groups
    assert any(pin.reason == "all that is on the axis hangs together" and pin.params == 25 for pin in analysis.pins)
