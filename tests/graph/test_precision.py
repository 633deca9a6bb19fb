"""graph/precision.py, half_plan.py, rounding.py: float32 models in 16 bits, and the way back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.errors import ModelError
from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import NUMPY, convert, halves, widened
from spa_compiler.graph.rounding import fitted, in_types, outputs, overflowing
from spa_compiler.graph.save import to_proto
from tests.networks import WITH_MICROSOFT, mlp, model_of, weight

HALVES = ("fp16", "bf16")
F16, BF16 = TensorProto.FLOAT16, TensorProto.BFLOAT16


def types(model: Model) -> dict[str, int]:
    """Element type of every tensor of the outermost graph, as onnx's inference sees it."""
    proto = to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    return found | {t.name: t.data_type for t in inferred.initializer}


def loaded(proto: onnx.ModelProto) -> Model:
    model = load(proto)
    shapes.infer(model)
    return model


def error(model: Model, half: Any, feed: dict[str, np.ndarray]) -> float:
    (want,), (got,) = outputs(model, [feed]), outputs(convert(model, half).model, [feed])
    return max(float(np.abs(want[n] - got[n]).max() / np.abs(want[n]).max()) for n in want)


@pytest.mark.parametrize("half, kind", [("fp16", F16), ("bf16", BF16)])
def test_weights_and_activations_get_16_bits_and_the_signature_stays(half: Any, kind: int) -> None:
    model = loaded(mlp(0.5, width=32))
    found = types(convert(model, half).model)
    assert found["x"] == found["y"] == TensorProto.FLOAT
    assert {found[n] for n in ("w0", "b0", "w1", "b1", "m0", "a0", "h0", "m1")} == {kind}
    assert types(model)["w0"] == TensorProto.FLOAT  # the model given is as it was
    x = np.random.default_rng(0).standard_normal((2, 3, 32), np.float32)
    assert 0 < error(model, half, {"x": x}) < (2e-3 if half == "fp16" else 2e-2)


def test_zeros_stay_zeros_and_nothing_else_becomes_zero_in_the_weights() -> None:
    model = loaded(mlp(0.3, width=64))
    before = np.count_nonzero(model.graph.nodes[0].inputs[1].values)
    assert np.count_nonzero(convert(model, "fp16").model.graph.nodes[1].inputs[1].values) == before


def test_a_norm_that_is_spelled_out_stays_in_one_piece() -> None:
    rng = np.random.default_rng(1)
    model = model_of(
        """norm (float[2,8] x) => (float[2,8] y) {
            h = MatMul(x, w)  m = ReduceMean <axes=[-1]> (h)  c = Sub(h, m)  s = Pow(c, {2})
            v = ReduceMean <axes=[-1]> (s)  e = Add(v, {1e-12})  d = Sqrt(e)  n = Div(c, d)  y = MatMul(n, u) }""",
        header='<ir_version: 8, opset_import: ["" : 17]>\n',
        w=weight(rng, 8, 8),
        u=weight(rng, 8, 8),
    )
    done = convert(model, "fp16")
    assert set(done.kept) == {"m", "c", "s", "v", "e", "d", "n"}
    casts = [n for n in done.model.graph.nodes if n.op == "Cast"]
    assert len(casts) == 4  # in, into the norm, out of it, out
    x = np.zeros((2, 8), np.float32)  # a variance of 0: in float16 the epsilon would be 0, too
    assert np.isfinite(outputs(done.model, [{"x": x}])[0]["y"]).all()


def test_positions_stay_float32_up_to_their_sines() -> None:
    rng = np.random.default_rng(2)
    model = model_of(
        """rotary (int64["s"] ids, float["s",8] x) => (float["s",8] y) {
            p = Cast <to=1> (ids)  c = Unsqueeze(p, one)  a = Mul(c, f)  t = Cos(a)  h = MatMul(x, w)  y = Mul(h, t) }""",
        f=(10000.0 ** -np.arange(0, 1, 1 / 8)).astype(np.float32)[None],
        one=np.array([1], np.int64),
        w=weight(rng, 8, 8),
    )
    done = convert(model, "fp16")
    assert set(done.kept) == {"p", "c", "a", "t"}
    feed = {"ids": np.arange(3000, 3009), "x": rng.standard_normal((9, 8), np.float32)}
    assert error(model, "fp16", feed) < 2e-3


def test_masks_clamp_and_stay_finite() -> None:
    model = model_of(
        """masked (int64[1,4] mask, float[1,4] x) => (float[1,4] y) {
            f = Cast <to=1> (mask)  i = Sub({1}, f)  m = Mul(i, low)  s = Add(x, m)  y = Softmax(s) }""",
        low=np.array(np.finfo(np.float32).min),
    )
    done = convert(model, "fp16")
    assert not done.kept
    assert any("low" in note for note in done.notes)
    feed = {"mask": np.zeros((1, 4), np.int64), "x": np.ones((1, 4), np.float32)}
    np.testing.assert_allclose(outputs(done.model, [feed])[0]["y"], 0.25, rtol=1e-3)
    assert types(convert(model, "bf16").model)["low"] == BF16  # it has the range


def test_a_weight_beyond_float16_keeps_its_layer_float32() -> None:
    big = np.diag([1e6, 1.0]).astype(np.float32)
    model = model_of(
        "big (float[1,2] x) => (float[1,2] y) { h = MatMul(x, w)  y = Mul(h, v) }", w=big, v=big[:1] / 1e12
    )
    done = convert(model, "fp16")
    assert "h" in done.kept
    assert types(done.model)["w"] == TensorProto.FLOAT
    assert not convert(model, "bf16").kept


def test_results_beyond_float16_are_found_by_running_and_stay_float32() -> None:
    model = model_of(
        "hot (float[1,2] x) => (float[1,2] y) { h = MatMul(x, w)  g = MatMul(h, v)  y = MatMul(g, u) }",
        w=np.full((2, 2), 6e4, np.float32),
        v=np.full((2, 2), 1e-4, np.float32),
        u=np.eye(2, dtype=np.float32),
    )
    feed = {"x": np.array([[3.0, 4.0]], np.float32)}
    assert set(overflowing(model, [feed])) == {"h"}
    assert not np.isfinite(outputs(convert(model, "fp16").model, [feed])[0]["y"]).any()
    done = fitted(model, "fp16", model, [feed])
    assert np.isfinite(outputs(done.model, [feed])[0]["y"]).all()
    assert set(done.kept) == {"h", "g"}
    assert any("h reaches 4.2e+05" in note for note in done.notes)
    assert not fitted(model, "bf16", model, [feed]).kept


def test_an_output_beyond_float16_is_an_error_where_the_signature_asks_for_it() -> None:
    given = loaded(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["y"])],
                "g",
                [helper.make_tensor_value_info("x", F16, [1, 2])],
                [helper.make_tensor_value_info("y", F16, [1, 2])],
                [numpy_helper.from_array(np.full((2, 2), 6e4, np.float16), "w")],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
    )
    wide = widened(given)
    shapes.infer(wide)
    with pytest.raises(ModelError, match="infinite"):
        fitted(wide, "fp16", given, [{"x": np.array([[3.0, 4.0]], np.float32)}])


@pytest.mark.parametrize("half", HALVES)
def test_a_model_of_16_bits_is_widened_and_comes_back_as_it_was(half: Any) -> None:
    rng = np.random.default_rng(3)
    kind = {"fp16": F16, "bf16": BF16}[half]
    values = weight(rng, 64, 64, 0.5).astype(NUMPY[half])
    given = loaded(
        helper.make_model(
            helper.make_graph(
                [
                    helper.make_node("MatMul", ["x", "w"], ["h"]),
                    helper.make_node("Cast", ["h"], ["f"], to=TensorProto.FLOAT),
                    helper.make_node("Cast", ["f"], ["y"], to=kind),
                ],
                "g",
                [helper.make_tensor_value_info("x", kind, ["t", 64])],
                [helper.make_tensor_value_info("y", kind, ["t", 64])],
                [numpy_helper.from_array(values, "w")],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )
    )
    assert halves(given) == {half}
    wide = widened(given)
    assert halves(wide) == set()
    assert {v.dtype for v in wide.signature.inputs} == {np.dtype(np.float32)}
    feed = {"x": rng.standard_normal((3, 64), np.float32)}
    want = feed["x"] @ values.astype(np.float32)
    np.testing.assert_allclose(outputs(wide, [feed])[0]["y"], want, rtol=1e-5, atol=1e-5)
    back = to_proto(convert(wide, half, given).model)
    assert back.graph.input[0].type.tensor_type.elem_type == kind == back.graph.output[0].type.tensor_type.elem_type
    held = {t.name: t for t in back.graph.initializer}["w"]
    assert held.raw_data == values.tobytes()
    assert in_types(given, feed)["x"].dtype == NUMPY[half]


def test_float32_with_the_borders_of_a_16_bit_model() -> None:
    given = loaded(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"])],
                "g",
                [helper.make_tensor_value_info("x", F16, [2])],
                [helper.make_tensor_value_info("y", F16, [2])],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
    )
    wide = widened(given)
    shapes.infer(wide)
    done = convert(wide, None, given)
    assert [n.op for n in done.model.graph.nodes] == ["Cast", "Relu", "Cast"]
    assert not done.notes
    assert types(done.model)["y"] == F16


def test_branches_stay_float32_and_read_what_they_read() -> None:
    rng = np.random.default_rng(4)
    model = model_of(
        """either (bool c, float[2,4] x) => (float[2,4] y) {
            h = MatMul(x, w)
            b = If (c) <then_branch = t () => (float[2,4] p) { p = Mul(h, h) },
                        else_branch = e () => (float[2,4] q) { q = Identity(h) }>
            y = MatMul(b, w) }""",
        w=weight(rng, 4, 4),
    )
    done = convert(model, "fp16")
    assert "b" in done.kept
    x = rng.standard_normal((2, 4), np.float32)
    for c in (True, False):
        assert error(model, "fp16", {"c": np.array(c), "x": x}) < 5e-3


def test_fused_operators_of_microsoft_convert_and_types_reach_what_is_behind_them() -> None:
    rng = np.random.default_rng(5)
    text = """fused (float[2,8] x) => (float[2,8] y) {
        h = MatMul(x, w)  g = com.microsoft.BiasGelu(h, b)  a = Add(g, g)  r = Reshape(a, shape)  y = MatMul(r, w) }"""
    model = model_of(text, WITH_MICROSOFT, w=weight(rng, 8, 8), b=np.ones(8, np.float32), shape=np.array([2, 8]))
    done = convert(model, "fp16")
    assert not done.kept
    assert sum(n.op == "Cast" for n in done.model.graph.nodes) == 2
    assert error(model, "fp16", {"x": rng.standard_normal((2, 8), np.float32)}) < 2e-3


def test_operators_without_a_kernel_stay_float32_between_casts() -> None:
    rng = np.random.default_rng(6)
    model = model_of(
        "grid (float[1,2] x) => (float[1,2] y) { h = MatMul(x, w)  d = Det(q)  g = Asinh(h)  y = MatMul(g, w) }",
        w=weight(rng, 2, 2),
        q=np.eye(2, dtype=np.float32),
    )
    done = convert(model, "fp16")
    assert done.kept["g"] == "no fp16 kernel in ONNX Runtime CUDA"
    # opset 13 is where bfloat16 begins, and convolutions have it from 22 on
    image = model_of(
        "image (float[1,3,4,4] x) => (float[1,2,4,4] y) { y = Conv(x, k) }", k=np.ones((2, 3, 1, 1), np.float32)
    )
    assert "y" in convert(image, "bf16").kept
    assert "y" not in convert(image, "fp16").kept


def test_one_constant_that_both_kinds_of_nodes_read_stays_and_gets_a_twin() -> None:
    model = model_of(
        "twice (float[2,2] x) => (float[2,2] y, float[2,2] z) { y = MatMul(x, w)  z = Asinh(w) }",
        w=np.eye(2, dtype=np.float32),
    )
    found = types(convert(model, "fp16").model)
    assert found["w"] == TensorProto.FLOAT
    assert found["w_fp16"] == F16


def test_an_output_that_other_nodes_read_too() -> None:
    rng = np.random.default_rng(7)
    model = model_of(
        "both (float[2,4] x) => (float[2,4] h, float[2,4] y) { h = MatMul(x, w)  s = Exp(h)  y = MatMul(h, w) }",
        w=weight(rng, 4, 4),
    )
    done = convert(model, "fp16")
    found = types(done.model)
    assert found["h"] == TensorProto.FLOAT
    assert found["h_fp16"] == F16
    assert error(model, "fp16", {"x": rng.standard_normal((2, 4), np.float32)}) < 2e-3


def test_bfloat16_is_read_by_ml_dtypes() -> None:
    assert NUMPY["bf16"] == ml_dtypes.bfloat16
