"""BatchNormalization goes into the layer before it, exactly, and only where it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph.batchnorm import fold_batchnorm, fold_scales
from spa_compiler.graph.load import load
from spa_compiler.graph.session import open_model, run
from tests.onnx_text import model_from

C, N = 4, 6


def layer_and_norm(
    op: str, shape: tuple[int, ...], *, bias: bool, dtype: Any = np.float32, **attributes: Any
) -> onnx.ModelProto:
    """x -> op(W, maybe b) -> BatchNormalization -> y, with weights drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal(shape)}
    if bias:
        arrays["b"] = rng.standard_normal(N)
    arrays |= {name: rng.standard_normal(N) for name in ("gamma", "beta", "mean")}
    arrays["var"] = rng.random(N) + 0.5
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    rank = 2 if op == "Gemm" else 4
    graph = helper.make_graph(
        [
            helper.make_node(op, ["x", "w", *(["b"] if bias else [])], ["h"], name="layer", **attributes),
            helper.make_node(
                "BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], name="norm", epsilon=1e-3
            ),
        ],
        "bn",
        [helper.make_tensor_value_info("x", kind, ["batch", C, *([8, 8] if rank == 4 else [])])],
        [helper.make_tensor_value_info("y", kind, ["batch", N, *(["h", "w"] if rank == 4 else [])])],
        [numpy_helper.from_array(array.astype(dtype), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


CASES = [
    ("Conv", (N, C, 3, 3), {}),
    ("Conv", (N, C // 2, 3, 3), {"group": 2}),
    ("ConvTranspose", (C, N, 3, 3), {}),
    ("ConvTranspose", (C, N // 2, 3, 3), {"group": 2}),
    ("Gemm", (C, N), {}),
    ("Gemm", (N, C), {"transB": 1}),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op,shape,attributes", CASES)
def test_folds_exactly(op: str, shape: tuple[int, ...], attributes: dict[str, Any], bias: bool) -> None:
    model = load(layer_and_norm(op, shape, bias=bias, dtype=np.float32, **attributes))
    folded = model.copy()
    assert fold_batchnorm(folded.graph) == 1
    assert [(node.name, node.op) for node in folded.graph.nodes] == [("layer", op)]
    assert [len(node.inputs) for node in folded.graph.nodes] == [3]
    x = np.random.default_rng(1).standard_normal((2, C) if op == "Gemm" else (2, C, 8, 8)).astype(np.float32)
    wanted, got = run(open_model(model), {"x": x})["y"], run(open_model(folded), {"x": x})["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half() -> None:
    model = load(layer_and_norm("Conv", (N, C, 3, 3), bias=False, dtype=np.float16))
    assert fold_batchnorm(model.graph) == 1
    assert {tensor.dtype for tensor in model.graph.nodes[0].inputs[1:]} == {np.dtype(np.float16)}


def test_not_when_the_result_is_used_elsewhere() -> None:
    proto = layer_and_norm("Conv", (N, C, 3, 3), bias=False)
    proto.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    model = load(proto)
    assert fold_batchnorm(model.graph) == 0
    assert [node.op for node in model.graph.nodes] == ["Conv", "BatchNormalization"]


def test_not_when_a_parameter_is_computed() -> None:
    proto = layer_and_norm("Conv", (N, C, 3, 3), bias=False)
    proto.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [N]))
    proto.graph.node[1].input[1] = "scale"
    assert fold_batchnorm(load(proto).graph) == 0


def test_a_shared_weight_is_left_to_its_other_user() -> None:
    proto = layer_and_norm("Conv", (N, C, 3, 3), bias=False)
    proto.graph.node.append(helper.make_node("Conv", ["x", "w"], ["z"], name="other"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", N, "h", "w"]))
    model = load(proto)
    before = model.graph.nodes[2].inputs[1].values.copy()
    assert fold_batchnorm(model.graph) == 1
    assert model.graph.nodes[0].inputs[1].name != "w"
    assert np.array_equal(model.graph.nodes[1].inputs[1].values, before)
    open_model(model)


SPELLED = """g (float["n", 1, 4, 4] x) => (float["n", 2, 4, 4] y)
  <float[2, 1, 1, 1] w = {1, 2}, float[2] b = {3, 4}, float[%s] s = {%s}, float[2, 1, 1] c = {7, 8}> {
  h = Conv(x, w, b)
  m = Mul(s, h)
  y = Add(m, c)
}"""


@pytest.mark.parametrize("dims,values", [("1, 2, 1, 1", "5, 6"), ("2, 1, 1", "5, 6"), ("1", "5")])
def test_mul_and_add_are_folded(dims: str, values: str) -> None:
    model = model_from(SPELLED % (dims, values))
    folded = model.copy()
    assert fold_scales(folded.graph) == 2
    assert [node.op for node in folded.graph.nodes] == ["Conv"]
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    assert np.array_equal(run(open_model(model), {"x": x})["y"], run(open_model(folded), {"x": x})["y"])


@pytest.mark.parametrize("dims,values", [("4", "1, 2, 3, 4"), ("2, 1, 1, 1", "5, 6")])
def test_not_along_other_axes(dims: str, values: str) -> None:
    model = model_from((SPELLED % (dims, values)).replace('float["n", 1', "float[2, 1", 1))
    assert fold_scales(model.graph) == 0
