"""Shapes from the command line in three spellings, and chosen ones that run."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.calibration.shapes import default_shapes, parse_shapes
from spa_compiler.errors import UsageError
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from tests.onnx_text import model_from

TWO = """g (float["batch", 3, "h", "w"] x, float["batch", 2] z, float[1] s)
  => (float["batch", 3, "h", "w"] y, float["batch", 2] u) {
  y = Add(x, s)
  u = Add(z, s)
}"""


@pytest.mark.parametrize(
    "option", ["x=1,3,224,224", "x:1x3x224x224", "x:[1,3,224,224]", "x=[1, 3, 224, 224]", " x=1x3x224x224 "]
)
def test_spellings(option: str) -> None:
    assert parse_shapes([option], model_from(TWO)) == [{"x": (1, 3, 224, 224), "z": (1, 2), "s": (1,)}]


def test_a_repeated_input_starts_the_next_shape() -> None:
    options = ["x=1,3,8,8", "z=1,2", "x=4,3,8,8"]
    assert parse_shapes(options, model_from(TWO)) == [
        {"x": (1, 3, 8, 8), "z": (1, 2), "s": (1,)},
        {"x": (4, 3, 8, 8), "z": (4, 2), "s": (1,)},
    ]
    assert parse_shapes([], model_from(TWO)) == []


def test_names_with_colons() -> None:
    model = model_from("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    model.graph.inputs[0].name = "x:0"
    object.__setattr__(model.signature.inputs[0], "name", "x:0")
    assert parse_shapes(["x:0=5,2"], model) == [{"x:0": (5, 2)}]
    assert parse_shapes(["x:0:5x2"], model) == [{"x:0": (5, 2)}]


@pytest.mark.parametrize(
    "options,words",
    [
        (["nope=1,2"], r"no input 'nope'.*Its inputs are: x, z, s"),
        (["x"], "cannot read the shape 'x'. Write it as"),
        (["x=1,a"], "cannot read the shape"),
        (["x=1,3,8"], r"3 dimensions for an input of 4\. Input 'x' is \[batch, 3, h, w\]"),
        (["x=1,4,8,8"], "axis 1 is 4, but the model fixes it to 3"),
        (["x=0,3,8,8"], "axis 0 has size zero"),
        (["x=2,3,8,8", "z=1,2"], "the symbol 'batch' cannot be 2 and 1 at once"),
    ],
)
def test_shapes_that_do_not_fit(options: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_shapes(options, model_from(TWO))
    assert caught.value.exit_code == 2


def embedding(positions: int) -> Model:
    """Token and position embeddings added; `positions` is what the position table holds."""
    arrays = {"tokens": np.zeros((50, 8), np.float32), "places": np.zeros((1, positions, 8), np.float32)}
    arrays |= {"zero": np.array([0]), "one": np.array([1])}
    nodes = [
        helper.make_node("Gather", ["tokens", "input_ids"], ["t"]),
        helper.make_node("Shape", ["input_ids"], ["shape"], start=1, end=2),
        helper.make_node("Slice", ["places", "zero", "shape", "one"], ["p"]),
        helper.make_node("Add", ["t", "p"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 8])
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "e", [ids], [out], weights)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize("positions,length", [(512, 128), (128, 128), (77, 77), (20, 20)])
def test_sequences_fit_the_position_table(positions: int, length: int) -> None:
    assert default_shapes(embedding(positions)) == {"input_ids": (1, length)}


def test_convolutions_say_what_they_need() -> None:
    model = model_from("""g (float["batch", "c", "h", "w"] x) => (float["batch", 2, "i", "j"] y)
      <float[2, 1, 1, 1] w = {1, 2}> {
      y = Conv<group = 1>(x, w)
    }""")
    assert default_shapes(model) == {"x": (1, 1, 224, 224)}


def test_images_behind_a_transpose() -> None:
    model = model_from("""g (float["n", "h", "w", "c"] x) => (float["n", 2, "i", "j"] y)
      <float[2, 1, 1, 1] w = {1, 2}> {
      t = Transpose<perm = [0, 3, 1, 2]>(x)
      y = Conv(t, w)
    }""")
    assert default_shapes(model) == {"x": (1, 224, 224, 1)}


def test_equal_symbols_are_equal_and_sums_are_sums() -> None:
    text = (
        'g (float["b", "past_len", 4] c, float["b", "m", 4] n) => (float["b", "k", 4] y) { y = Concat<axis = 1>(c, n) }'
    )
    parsed = model_from(text)
    object.__setattr__(parsed.signature.inputs[1], "shape", ("b", "past_len + 1", 4))
    assert default_shapes(parsed) == {"c": (1, 128, 4), "n": (1, 129, 4)}


def test_static_models_need_no_run() -> None:
    assert default_shapes(model_from("g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }")) == {"x": (2, 3)}


def test_when_nothing_runs() -> None:
    model = model_from("""g (float["a", "b"] x) => (float["c", 7] y) <int64[2] s = {13, 7}> {
      y = Reshape(x, s)
    }""")
    with pytest.raises(UsageError, match=r"none of the \d+ shapes tried.*--shape, for: x"):
        default_shapes(model)
